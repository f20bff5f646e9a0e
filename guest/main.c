/* Boot, the heartbeat, and the loop that waits for something to do. */
#include "guest.h"

const char *const check_names[CHECKS] = {"memory", "disk", "mapping", "code", "registers", "clock"};
u64 bad[CHECKS];
u64 nonce, heartbeats, boots = 1, period, dirty, longest_gap;
int held, busy, quiet;

static u64 booted, last_beat;

void *memcpy(void *to, const void *from, u64 size) {
    u8 *t = to;
    const u8 *f = from;
    while (size--)
        *t++ = *f++;
    return to;
}

void *memset(void *to, int value, u64 size) {
    u8 *t = to;
    while (size--)
        *t++ = (u8)value;
    return to;
}

u64 bad_total(void) {
    u64 total = 0;
    for (int i = 0; i < CHECKS; i++)
        total += bad[i];
    return total;
}

u64 milliseconds(void) { return (time_now() - booted) / (boot_info.frequency / 1000); }

void set_period(u64 ms) { period = ms * (boot_info.frequency / 1000); }

void set_nonce(u64 value) {
    nonce = value;
    pattern_write_all();
    state_change();
}

static void heartbeat(void) {
    u64 now = time_now();
    if ((long)(now - last_beat) < 0)
        bad[CLOCK]++;
    u64 gap = (now - last_beat) / (boot_info.frequency / 1000000);
    last_beat = now;
    if (heartbeats && gap > longest_gap)
        longest_gap = gap;
    state_check();
    pattern_beat();
    disks_beat();
    heartbeats++;
    if (!held)
        state_change();
    if (!quiet)
        print_line("HB %u t=%u gap=%u bad=%u nonce=%X", heartbeats, milliseconds(), gap, bad_total(), nonce);
}

void start(u64 hart, const void *tree) {
    console_init();
    int known = fdt_read(tree);
    if (!boot_info.frequency)
        boot_info.frequency = 10000000;
    set_period(argument("period", 100));
    dirty = argument("dirty", 16);
    quiet = argument("quiet", 0) != 0;
    paging_init();
    interrupts_init(hart);
    if (!known)
        panic("no device tree with memory in it");
    interrupt_enable(IRQ_UART);
    booted = last_beat = time_now();
    nonce = entropy_nonce();
    interrupts_on();
    pattern_init();
    disks_init();
    flash_init();
    state_init();
    print_line("boot %u nonce=%X from=%s memory=%u pattern=%u disks=%u flash=%u%u sbi=%u.%u", boots, nonce, entropy_sources,
               boot_info.ram_size >> 20, pattern_pages * PAGE >> 20, (u64)disks, (u64)flash_present(0),
               (u64)flash_present(1), sbi_version() >> 24, sbi_version() & 0xffffff);
    for (int n = 0; n < disks; n++)
        print_line("disk%u: %u sectors, %s", (u64)n, disk_sectors(n), disk_state(n));
    print_line("ready; `help` lists the commands");
    for (;;) {
        interrupts_off();
        if (!tick_pending() && !console_pending() && !virtio_pending() && !busy)
            wait_for_interrupt();
        interrupts_on();
        if (virtio_take())
            disks_poll();
        if (tick_take())
            heartbeat();
        console_poll();
        if (busy)
            pattern_rewrite(1);
    }
}
