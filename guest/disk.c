/* The checked disks. What was written where is remembered in memory, so that memory and disk from different times disagree.

   sector 0          the guest's mark and the count of boots
   4096 + n * gap    slot n of the journal, a page: the lower half of the disk
   upper half        left alone, for the console's `disk write`

   A disk whose first sector holds anything else is somebody's: it is read on command, never written by the checks. */
#include "guest.h"

enum { IN = 0, OUT = 1, FLUSH = 4 };
enum { JOURNAL = 64, GAP = 65536, BATCH = 2, COMMAND = REQUESTS - 1, CAPACITY = 0x100 };
static const u64 READ_ONLY = 1ul << 5, FLUSHES = 1ul << 9;
static const u64 MARK = 0x6d61726666697473;

struct request {
    struct {
        u32 type, reserved;
        u64 sector;
    } header;
    volatile u8 status;
    int slot;                   /* of the journal; -1 for none */
    u64 seed;
    u64 data[WORDS] __attribute__((aligned(PAGE)));
};

static struct disk {
    struct virtio device;
    struct request requests[REQUESTS];
    u64 sectors, features, slots, gap, next_write, next_check, generation;
    u64 expected[JOURNAL];      /* seeds; 0: not known */
    const char *state;
} disk[DISKS];

int disks;
u64 disk_errors, disk_late, disk_operations;

static int ours(const struct disk *d) { return d->state[0] == 'c'; }
u64 disk_sectors(int n) { return disk[n].sectors; }
const char *disk_state(int n) { return disk[n].state; }
u64 disk_scratch(int n) { return ours(&disk[n]) ? disk[n].sectors / 2 : 1; }

static void submit(struct disk *d, int n, u32 type, u64 sector, u32 size) {
    struct request *r = &d->requests[n];
    r->header.type = type;
    r->header.sector = sector;
    r->status = 255;
    struct buffer buffers[3] = {{&r->header, sizeof r->header, 0}, {r->data, size, type == IN}, {(void *)&r->status, 1, 1}};
    if (!size)
        buffers[1] = buffers[2];
    disk_operations++;
    virtio_submit(&d->device, n, buffers, size ? 3 : 2);
}

static void finish(struct disk *d, struct request *r) {
    if (r->status != 0) {
        disk_errors++;
        print_line("disk%u: error %u, sector %u", (u64)(d - disk), (u64)r->status, r->header.sector);
    }
    if (r->slot < 0)
        return;
    if (r->header.type == OUT)
        d->expected[r->slot] = r->status == 0 ? r->seed : 0;
    else if (r->status == 0 && !matches(r->data, r->seed))
        bad[DISK]++;
}

void disks_poll(void) {
    for (int n = 0; n < disks; n++)
        for (int done; (done = virtio_completed(&disk[n].device)) != -1;) {
            if (done == -2)
                bad[DISK]++;
            else
                finish(&disk[n], &disk[n].requests[done]);
        }
}

static int background(const struct disk *d) {
    int flying = 0;
    for (int n = 0; n < COMMAND; n++)
        flying |= d->device.in_flight[n];
    return flying;
}

static void wait(void) {
    interrupts_off();
    if (!virtio_pending())
        wait_for_interrupt();
    interrupts_on();
    virtio_take();
    disks_poll();
}

/* One request to its end; 0, or the device's status. */
static u8 perform(struct disk *d, u32 type, u64 sector, u32 size) {
    d->requests[COMMAND].slot = -1;
    submit(d, COMMAND, type, sector, size);
    while (d->device.in_flight[COMMAND])
        wait();
    return d->requests[COMMAND].status;
}

static u64 slot_sector(const struct disk *d, u64 slot) { return (PAGE + slot * d->gap) / SECTOR; }

static void claim(struct disk *d) {
    d->slots = JOURNAL;
    d->gap = d->sectors / 2 * SECTOR / (JOURNAL + 1) & ~(u64)(PAGE - 1);
    if (d->gap > GAP)
        d->gap = GAP;
    if (!d->gap)
        d->state = "too small to check";
    else if (d->features & READ_ONLY)
        d->state = "read-only";
    else
        d->state = "checked";
}

/* Counts the boot on a disk that is blank or ours. */
static u64 mark(struct disk *d) {
    u64 *first = d->requests[COMMAND].data, used = 0;
    d->state = "unreadable";
    if (perform(d, IN, 0, SECTOR))
        return 1;
    for (int i = 0; i < SECTOR / 8; i++)
        used |= first[i];
    if (used && first[0] != MARK) {
        d->state = "holds something else, left alone";
        return 1;
    }
    claim(d);
    if (!ours(d))
        return 1;
    first[0] = MARK;
    u64 count = ++first[1];
    if (perform(d, OUT, 0, SECTOR))
        d->state = "unwritable";
    return count;
}

void disks_init(void) {
    for (int slot = 0; slot < SLOTS && disks < DISKS; slot++) {
        struct disk *d = &disk[disks];
        if (virtio_probe(slot) != VIRTIO_BLOCK || !virtio_init(&d->device, slot, READ_ONLY | FLUSHES, &d->features))
            continue;
        d->sectors = d->device.registers[CAPACITY / 4] | (u64)d->device.registers[CAPACITY / 4 + 1] << 32;
        disks++;
        u64 count = mark(d);
        if (disks == 1)
            boots = count;
    }
}

static void write_slot(struct disk *d, int n) {
    struct request *r = &d->requests[n];
    r->slot = (int)(d->next_write++ % d->slots);
    r->seed = mix(nonce ^ mix((u64)(d - disk) << 56 ^ (u64)r->slot << 40 ^ ++d->generation)) | 1;
    fill(r->data, r->seed);
    submit(d, n, OUT, slot_sector(d, (u64)r->slot), PAGE);
}

static void check_slot(struct disk *d, int n) {
    struct request *r = &d->requests[n];
    for (u64 tried = 0; tried < d->slots; tried++) {
        u64 slot = d->next_check++ % d->slots;
        if (!d->expected[slot])
            continue;
        r->slot = (int)slot;
        r->seed = d->expected[slot];
        submit(d, n, IN, slot_sector(d, slot), PAGE);
        return;
    }
}

/* Reads and writes take turns, so that a slot is never read while it is written. */
void disks_beat(void) {
    for (int n = 0; n < disks; n++) {
        struct disk *d = &disk[n];
        if (!ours(d))
            continue;
        if (background(d)) {
            disk_late++;
            continue;
        }
        if (heartbeats % 16 == 15 && (d->features & FLUSHES)) {
            d->requests[0].slot = -1;
            submit(d, 0, FLUSH, 0, 0);
            continue;
        }
        for (int i = 0; i < BATCH; i++) {
            if (heartbeats % 2 == 0 && !held)
                write_slot(d, i);
            else
                check_slot(d, i);
        }
    }
}

static void quiesce(struct disk *d) {
    while (background(d))
        wait();
}

u64 disks_check_all(void) {
    u64 before = bad[DISK];
    for (int n = 0; n < disks; n++) {
        struct disk *d = &disk[n];
        quiesce(d);
        for (u64 slot = 0; ours(d) && slot < d->slots; slot++)
            if (d->expected[slot] && !perform(d, IN, slot_sector(d, slot), PAGE) &&
                !matches(d->requests[COMMAND].data, d->expected[slot]))
                bad[DISK]++;
    }
    return bad[DISK] - before;
}

void disks_wreck(void) {
    for (int n = 0; n < disks; n++) {
        struct disk *d = &disk[n];
        quiesce(d);
        for (u64 slot = 0; ours(d) && slot < d->slots; slot++) {
            fill(d->requests[COMMAND].data, ~time_now());
            perform(d, OUT, slot_sector(d, slot), PAGE);
        }
    }
}

const char *disk_transfer(int n, int write, u64 sector, void *data, u64 sectors) {
    struct disk *d = &disk[n];
    if (n >= disks)
        return "there is no such disk";
    if (sectors * SECTOR > PAGE || sector >= d->sectors || sectors > d->sectors - sector)
        return "the disk has no such sectors";
    if (write && (d->features & READ_ONLY))
        return "the disk is read-only";
    if (write)
        memcpy(d->requests[COMMAND].data, data, sectors * SECTOR);
    if (perform(d, write ? OUT : IN, sector, (u32)(sectors * SECTOR)))
        return "the disk answers with an error";
    if (!write)
        memcpy(data, d->requests[COMMAND].data, sectors * SECTOR);
    return 0;
}

const char *disk_flush(int n) {
    if (n >= disks)
        return "there is no such disk";
    if (!(disk[n].features & FLUSHES))
        return 0;
    return perform(&disk[n], FLUSH, 0, 0) ? "the disk answers with an error" : 0;
}

const char *disk_format(int n) {
    if (n >= disks)
        return "there is no such disk";
    struct disk *d = &disk[n];
    quiesce(d);
    memset(d->expected, 0, sizeof d->expected);
    memset(d->requests[COMMAND].data, 0, SECTOR);
    if ((d->features & READ_ONLY) || perform(d, OUT, 0, SECTOR))
        return "the disk cannot be written";
    mark(d);
    return ours(d) ? 0 : d->state;
}
