/* virtio over MMIO, version 2 (virtio 1.1, 4.2), with one split queue (2.6) of fixed requests. */
#include "guest.h"

enum { BASE = 0x10001000, STRIDE = 0x1000 };
enum {
    MAGIC = 0x00, VERSION = 0x04, DEVICE = 0x08, OFFERED = 0x10, OFFERED_SELECT = 0x14, TAKEN = 0x20, TAKEN_SELECT = 0x24,
    QUEUE_SELECT = 0x30, QUEUE_MAXIMUM = 0x34, QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50,
    INTERRUPT = 0x60, ACKNOWLEDGE = 0x64, STATUS = 0x70, DESCRIPTORS = 0x80, DRIVER_AREA = 0x90, DEVICE_AREA = 0xa0
};
enum { KNOWN = 1, DRIVER = 2, RUNNING = 4, FEATURES_AGREED = 8, NEXT = 1, WRITES = 2, BUFFERS = 3 };
static const u64 VERSION_1 = 1ul << 32;

static volatile int pending;

static volatile u32 *registers_of(int slot) { return (volatile u32 *)(BASE + (u64)slot * STRIDE); }
static void fence(void) { __asm__ volatile("fence iorw, iorw" : : : "memory"); }

u32 virtio_probe(int slot) {
    volatile u32 *r = registers_of(slot);
    u32 magic;
    if (!probe_read((u64)r, &magic) || magic != 0x74726976 || r[VERSION / 4] != 2)
        return 0;
    return r[DEVICE / 4];
}

static void address(volatile u32 *r, u32 at, const void *where) {
    r[at / 4] = (u32)(u64)where;
    r[at / 4 + 1] = (u32)((u64)where >> 32);
}

int virtio_init(struct virtio *device, int slot, u64 wanted, u64 *offered) {
    volatile u32 *r = registers_of(slot);
    device->registers = r;
    device->slot = slot;
    r[STATUS / 4] = 0;
    r[STATUS / 4] = KNOWN | DRIVER;
    u64 features = 0;
    for (u32 word = 0; word < 2; word++) {
        r[OFFERED_SELECT / 4] = word;
        features |= (u64)r[OFFERED / 4] << (32 * word);
    }
    u64 taken = features & (wanted | VERSION_1);
    for (u32 word = 0; word < 2; word++) {
        r[TAKEN_SELECT / 4] = word;
        r[TAKEN / 4] = (u32)(taken >> (32 * word));
    }
    r[STATUS / 4] = KNOWN | DRIVER | FEATURES_AGREED;
    r[QUEUE_SELECT / 4] = 0;
    if (!(taken & VERSION_1) || !(r[STATUS / 4] & FEATURES_AGREED) || r[QUEUE_MAXIMUM / 4] < QUEUE)
        return 0;
    r[QUEUE_SIZE / 4] = QUEUE;
    address(r, DESCRIPTORS, device->descriptors);
    address(r, DRIVER_AREA, &device->available);
    address(r, DEVICE_AREA, &device->used);
    r[QUEUE_READY / 4] = 1;
    r[STATUS / 4] = KNOWN | DRIVER | FEATURES_AGREED | RUNNING;
    *offered = taken;
    interrupt_enable(IRQ_VIRTIO + slot);
    return 1;
}

void virtio_submit(struct virtio *device, int request, const struct buffer *buffers, int count) {
    int first = request * BUFFERS;
    for (int i = 0; i < count; i++) {
        device->descriptors[first + i].address = (u64)buffers[i].data;
        device->descriptors[first + i].length = buffers[i].size;
        device->descriptors[first + i].flags = (u16)((i + 1 < count ? NEXT : 0) | (buffers[i].device_writes ? WRITES : 0));
        device->descriptors[first + i].next = (u16)(first + i + 1);
    }
    device->in_flight[request] = 1;
    device->available.ring[device->available.index % QUEUE] = (u16)first;
    fence();
    *(volatile u16 *)&device->available.index = (u16)(device->available.index + 1);
    fence();
    device->registers[QUEUE_NOTIFY / 4] = 0;
}

int virtio_completed(struct virtio *device) {
    if (*(volatile u16 *)&device->used.index == device->seen)
        return -1;
    fence();
    u32 id = *(volatile u32 *)&device->used.ring[device->seen % QUEUE].id;
    device->seen++;
    if (id % BUFFERS || id / BUFFERS >= REQUESTS || !device->in_flight[id / BUFFERS])
        return -2;
    device->in_flight[id / BUFFERS] = 0;
    return (int)(id / BUFFERS);
}

void virtio_interrupt(int slot) {
    volatile u32 *r = registers_of(slot);
    r[ACKNOWLEDGE / 4] = r[INTERRUPT / 4];
    pending = 1;
}

int virtio_pending(void) { return pending; }

int virtio_take(void) {
    int was = pending;
    pending = 0;
    return was;
}
