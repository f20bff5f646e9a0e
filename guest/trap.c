/* Interrupts and faults. Interrupt handlers only note what happened; the work is done in main.c's loop. */
#include "guest.h"

static const u64 PLIC = 0x0c000000;
enum { TIMER_BIT = 1 << 5, EXTERNAL_BIT = 1 << 9, SIE = 1 << 1, FLOATING = 1 << 13 };
enum { BREAKPOINT = 3, LOAD_ACCESS = 5, LOAD_PAGE = 13 };

static volatile int tick;
static u64 next_tick, context;
extern char probe_access[], probe_fault[];

static volatile u32 *plic(u64 offset) { return (volatile u32 *)(PLIC + offset); }

void interrupts_init(u64 hart) {
    context = hart * 2 + 1;
    *plic(0x200000 + context * 0x1000) = 0;
    u64 mask = TIMER_BIT | EXTERNAL_BIT, floating = FLOATING;
    __asm__ volatile("csrs sstatus, %0\n\tcsrw sie, %1" : : "r"(floating), "r"(mask));
    next_tick = time_now() + period;
    sbi_set_timer(next_tick);
}

void interrupt_enable(int source) {
    *plic((u64)source * 4) = 1;
    *plic(0x2000 + context * 0x80) |= 1u << source;
}

void interrupts_on(void) { __asm__ volatile("csrsi sstatus, 2" : : : "memory"); }
void interrupts_off(void) { __asm__ volatile("csrci sstatus, 2" : : : "memory"); }
void wait_for_interrupt(void) { __asm__ volatile("wfi" : : : "memory"); }
int tick_pending(void) { return tick; }

int tick_take(void) {
    int was = tick;
    tick = 0;
    return was;
}

/* A beat that comes late does not bring the missed ones along. */
static void timer(void) {
    u64 now = time_now();
    tick = 1;
    next_tick += period;
    if (next_tick <= now || next_tick > now + period)
        next_tick = now + period;
    sbi_set_timer(next_tick);
}

static void external(void) {
    volatile u32 *claim = plic(0x200004 + context * 0x1000);
    for (u32 source; (source = *claim) != 0; *claim = source) {
        if (source == IRQ_UART)
            console_interrupt();
        else if (source >= IRQ_VIRTIO && source < IRQ_VIRTIO + SLOTS)
            virtio_interrupt((int)source - IRQ_VIRTIO);
    }
}

void trap(struct frame *frame) {
    u64 cause, value;
    __asm__ volatile("csrr %0, scause\n\tcsrr %1, stval" : "=r"(cause), "=r"(value));
    if (cause == (1ul << 63 | 5))
        return timer();
    if (cause == (1ul << 63 | 9))
        return external();
    if ((cause == LOAD_ACCESS || cause == LOAD_PAGE) && frame->pc == (u64)probe_access) {
        frame->pc = (u64)probe_fault;
        return;
    }
    print("\r\nPANIC trap cause=%u pc=%x value=%x ra=%x sp=%x\r\n", cause, frame->pc, value, frame->x[0], frame->x[1]);
    panic("unexpected trap");
}

void panic(const char *why) {
    interrupts_off();
    print("\r\nPANIC %s; halted until a reset or a restore\r\n", why);
    u64 none = 0;
    __asm__ volatile("csrw sie, %0" : : "r"(none));
    for (;;)
        wait_for_interrupt();
}
