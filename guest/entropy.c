/* Where a nonce comes from: everything at hand that another boot would not repeat. */
#include "guest.h"

static struct virtio device;
static int present;
static const u64 RTC = 0x101000;

char entropy_sources[32];

static void source(const char *name) {
    char *end = entropy_sources;
    while (*end)
        end++;
    if (end != entropy_sources)
        *end++ = ',';
    while (*name)
        *end++ = *name++;
}

static u64 clock_nanoseconds(void) {
    u32 low;
    if (!probe_read(RTC, &low))
        return 0;
    return (u64) * (volatile u32 *)(RTC + 4) << 32 | low;
}

u64 clock_seconds(void) { return clock_nanoseconds() / 1000000000; }

int entropy_device(u64 *value) {
    if (!present)
        return 0;
    struct buffer buffer = {value, sizeof *value, 1};
    virtio_submit(&device, 0, &buffer, 1);
    while (virtio_completed(&device) != 0)
        ;
    __asm__ volatile("" : : : "memory");
    return 1;
}

u64 entropy_nonce(void) {
    u64 value = mix(time_now()), random, offered;
    for (int slot = 0; slot < SLOTS && !present; slot++)
        if (virtio_probe(slot) == VIRTIO_ENTROPY)
            present = virtio_init(&device, slot, 0, &offered);
    if (entropy_device(&random)) {
        value = mix(value ^ random);
        source("rng");
    }
    if (boot_info.has_seed) {
        value = mix(value ^ boot_info.seed);
        source("seed");
    }
    u64 clock = clock_nanoseconds();
    if (clock) {
        value = mix(value ^ clock);
        source("rtc");
    }
    source("time");
    return mix(value ^ time_now());
}
