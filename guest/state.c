/* Checked state that is not plain memory: what an address shows, what an instruction does, what a register holds.

   Each heartbeat finds what the last one left and leaves something new. A restore that keeps a stale translation of an address
   or of code, or forgets a register, is found at the first heartbeat after it. */
#include "guest.h"

/* fcsr: rounding modes 0-3 in bits 5-6, the accrued exceptions in bits 0-4. The latter look lost after a savevm and loadvm
   of QEMU's own, 7.2 and 10.0; with `fflags=0` among the arguments they are left out. */
enum { ROUNDING = 0x60, FLAGS = 0x1f };

void registers_fill(u64 seed, u64 control_mask);
u64 registers_differ(u64 seed, u64 control_mask);

static u64 window_page[WINDOWS];
static u64 register_seed, control_mask;
static u32 code_value;

static volatile u32 *const code = (volatile u32 *)CODE_WRITE_ADDRESS;

/* lui a0, HIGH; addiw a0, a0, LOW; ret */
static void write_code(u32 value) {
    code[0] = ((value + 0x800) & 0xfffff000) | 10 << 7 | 0x37;
    code[1] = value << 20 | 10 << 15 | 10 << 7 | 0x1b;
    code[2] = 0x00008067;
    __asm__ volatile("fence.i" : : : "memory");
}

static u32 run_code(void) { return ((u32(*)(void))CODE_RUN_ADDRESS)(); }

void state_init(void) {
    control_mask = argument("fflags", 1) ? ROUNDING | FLAGS : ROUNDING;
    state_change();
}

void state_check(void) {
    for (int i = 0; i < WINDOWS; i++)
        if (!matches((u64 *)(WINDOW_ADDRESS + (u64)i * PAGE), pattern_seed(window_page[i])))
            bad[MAPPING]++;
    if (run_code() != code_value)
        bad[CODE]++;
    bad[REGISTERS] += registers_differ(register_seed, control_mask);
}

void state_change(void) {
    u64 seed = mix(nonce ^ heartbeats);
    for (u64 i = 0; i < WINDOWS; i++) {
        window_page[i] = mix(seed + i) % pattern_pages;
        paging_window((int)i, window_page[i]);
    }
    code_value = (u32)seed;
    write_code(code_value);
    register_seed = mix(seed);
    registers_fill(register_seed, control_mask);
}

void state_wreck(void) {
    write_code(~code_value);
    registers_fill(~register_seed, control_mask);
}
