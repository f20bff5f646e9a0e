/* Entry, traps, and what C cannot say: an access that may fault, and values kept in the floating-point registers. */

    .section .text.start, "ax"
    .global _start
_start:                             /* a0: hart, a1: device tree; paging off, S-mode */
    csrw sie, zero
    csrw sip, zero
    la sp, stack_top
    la t0, image_bss
    la t1, image_end
1:  sd zero, 0(t0)
    addi t0, t0, 8
    bltu t0, t1, 1b
    la t0, trap_entry
    csrw stvec, t0
    call start
2:  wfi
    j 2b

    .text
/* struct frame of guest.h: x1..x31, then sepc. Traps come from S-mode only and use the stack that they interrupted. */
    .balign 4
trap_entry:
    addi sp, sp, -256
    .irp n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd x\n, (\n * 8 - 8)(sp)
    .endr
    addi t0, sp, 256
    sd t0, 8(sp)
    csrr t0, sepc
    sd t0, 248(sp)
    mv a0, sp
    call trap
    ld t0, 248(sp)
    csrw sepc, t0
    .irp n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld x\n, (\n * 8 - 8)(sp)
    .endr
    addi sp, sp, 256
    sret

/* int probe_read(u64 address, u32 *value): 1, or 0 where nothing answers; trap() moves the fault to probe_fault. */
    .global probe_read, probe_access, probe_fault
probe_read:
    .option push
    .option norvc
probe_access:
    lwu t0, 0(a0)
    .option pop
    sw t0, 0(a1)
    li a0, 1
    ret
probe_fault:
    li a0, 0
    ret

/* The floating-point registers hold a sequence that starts at a seed; fcsr holds a rounding mode and flags. */
    .option arch, +f, +d
    .macro step                     /* a0 = a0 * t1 + t2 */
    mul a0, a0, t1
    add a0, a0, t2
    .endm
    .macro control                  /* t3 = what fcsr holds: of the seed in a0 the bits of the mask in a1 */
    and t3, a0, a1
    .endm

    .global registers_fill          /* void registers_fill(u64 seed, u64 control_mask) */
registers_fill:
    li t1, 6364136223846793005
    li t2, 1442695040888963407
    control
    csrw fcsr, t3
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    step
    fmv.d.x f\n, a0
    .endr
    ret

    .global registers_differ        /* u64 registers_differ(u64 seed, u64 control_mask): how many of the 33 are not as filled */
registers_differ:
    li t1, 6364136223846793005
    li t2, 1442695040888963407
    control
    csrr t4, fcsr
    and t4, t4, a1
    xor t4, t4, t3
    snez t5, t4
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    step
    fmv.x.d t4, f\n
    xor t4, t4, a0
    snez t4, t4
    add t5, t5, t4
    .endr
    mv a0, t5
    ret

    .bss
    .balign 16
    .space 32768
stack_top:
    .section .note.GNU-stack, "", @progbits
