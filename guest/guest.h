/* The bundled guest: a small kernel that knows what its memory, registers, devices and disks must hold, and says so.

   main.c      boot, the heartbeat, the loop           console.c  the UART, printing, the input line
   commands.c  what can be typed                       trap.c     interrupts, faults, the PLIC
   pattern.c   the checked memory                      state.c    checked mappings, code and registers
   disk.c      the checked disks                       virtio.c   the transport beneath
   flash.c     CFI flash                               entropy.c  where the nonce comes from
   paging.c    Sv39                                    fdt.c sbi.c  what the firmware hands over and does

   All numbers are decimal in and out unless named hexadecimal; times are in units of the `time` CSR unless a name says else. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { PAGE = 4096, WORDS = PAGE / 8 };

/* main.c: what is checked, and how often it was found wrong. */
enum check { MEMORY, DISK, MAPPING, CODE, REGISTERS, CLOCK, CHECKS };
extern const char *const check_names[CHECKS];
extern u64 bad[CHECKS];
extern u64 nonce;          /* lives here and nowhere else */
extern u64 heartbeats;     /* so far */
extern u64 boots;          /* of the first disk; 1 without one */
extern u64 period;         /* of the heartbeat, time units */
extern u64 dirty;          /* pages rewritten a heartbeat */
extern u64 longest_gap;    /* between two heartbeats, microseconds */
extern int held, busy, quiet;
u64 bad_total(void);
u64 milliseconds(void);    /* since boot */
void set_nonce(u64 value); /* and all that hangs on it */
void set_period(u64 ms);

/* fdt.c: copied out of the device tree, before its memory is used. */
struct boot_info {
    u64 ram_base, ram_size, frequency, seed;
    int has_seed;
    char arguments[256];
};
extern struct boot_info boot_info;
int fdt_read(const void *blob); /* 0: not a device tree with memory in it */
u64 argument(const char *key, u64 otherwise);

/* sbi.c */
void sbi_set_timer(u64 deadline);
void sbi_reset(int reboot);
u64 sbi_version(void);
u64 sbi_implementation(void);
int sbi_write(const char *text); /* 0: the firmware has no console */

/* trap.c */
struct frame {
    u64 x[31], pc;
};
enum { IRQ_VIRTIO = 1, IRQ_UART = 10 };
void interrupts_init(u64 hart);
void interrupts_on(void);
void interrupts_off(void);
void interrupt_enable(int source);
void wait_for_interrupt(void);
int tick_pending(void);
int tick_take(void);
void panic(const char *why) __attribute__((noreturn));
int probe_read(u64 address, u32 *value);

/* console.c: %s string, %u decimal, %x hexadecimal, %X hexadecimal of 16 digits; the last three take u64. */
void console_init(void);
void console_interrupt(void);
int console_pending(void);
void console_poll(void);
void print(const char *format, ...);
void print_line(const char *format, ...); /* a line of its own, whatever is being typed */

/* commands.c */
void command(char *line);

/* paging.c */
#define PATTERN_ADDRESS 0x1000000000ul
#define WINDOW_ADDRESS 0x2000000000ul
#define CODE_WRITE_ADDRESS 0x2000010000ul
#define CODE_RUN_ADDRESS 0x2000011000ul
#define UNMAPPED_ADDRESS 0x3000000000ul
enum { WINDOWS = 4 };
void paging_init(void);
u64 pattern_limit(void);                 /* pages that the memory has room for */
void paging_pattern(u64 pages);          /* map so many at PATTERN_ADDRESS */
u64 *pattern_versions(void);             /* physical room after the pattern, a u64 a page */
void paging_window(int window, u64 page); /* show pattern page `page` at the window's address, too */

/* pattern.c */
extern u64 pattern_pages;
u64 mix(u64 x);
u64 digest(u64 sum, u64 word);            /* a checksum, a word on */
u64 fill(u64 *page, u64 seed);            /* a page with the sequence of a seed */
int matches(const u64 *page, u64 seed);
void pattern_init(void);
void pattern_write_all(void);
u64 pattern_check_all(void);              /* pages found bad */
u64 pattern_sum(void);
void pattern_beat(void);
void pattern_rewrite(u64 count);
void pattern_wreck(void);
u64 pattern_seed(u64 page);

/* state.c */
void state_init(void);
void state_check(void);
void state_change(void);
void state_wreck(void);

/* virtio.c: one queue of up to five requests of three buffers each. */
enum { SLOTS = 8, QUEUE = 16, REQUESTS = 5, VIRTIO_BLOCK = 2, VIRTIO_ENTROPY = 4 };
struct buffer {
    const void *data;
    u32 size;
    int device_writes;
};
struct virtio {
    volatile u32 *registers;
    int slot;
    u16 seen;
    volatile u8 in_flight[REQUESTS];
    struct {
        u64 address;
        u32 length;
        u16 flags, next;
    } descriptors[QUEUE] __attribute__((aligned(16)));
    struct {
        u16 flags, index, ring[QUEUE], event;
    } available __attribute__((aligned(2)));
    struct {
        u16 flags, index;
        struct {
            u32 id, length;
        } ring[QUEUE];
        u16 event;
    } used __attribute__((aligned(4)));
};
u32 virtio_probe(int slot);               /* device id of a modern device there, 0 without one */
int virtio_init(struct virtio *device, int slot, u64 wanted, u64 *offered);
void virtio_submit(struct virtio *device, int request, const struct buffer *buffers, int count);
int virtio_completed(struct virtio *device); /* a request that is done, -1: none now, -2: one that was never asked for */
void virtio_interrupt(int slot);
int virtio_pending(void);
int virtio_take(void);

/* disk.c */
enum { DISKS = 4, SECTOR = 512 };
extern int disks;
extern u64 disk_errors, disk_late, disk_operations;
void disks_init(void);
void disks_poll(void);
void disks_beat(void);
u64 disks_check_all(void);
void disks_wreck(void);
const char *disk_transfer(int disk, int write, u64 sector, void *data, u64 sectors); /* up to a page; 0 or why not */
u64 disk_sectors(int disk);
const char *disk_state(int disk);
u64 disk_scratch(int disk);               /* the first sector that the checks leave alone */
const char *disk_format(int disk);
const char *disk_flush(int disk);

/* flash.c */
enum { BANKS = 2 };
int flash_present(int bank);
void flash_init(void);
u32 flash_read(int bank, u64 offset);
const char *flash_write(int bank, u64 offset, u32 value);
const char *flash_erase(int bank, u64 offset);
u64 flash_size(void);

/* entropy.c */
extern char entropy_sources[32];
u64 entropy_nonce(void);
int entropy_device(u64 *value);           /* 0: no such device */
u64 clock_seconds(void);                  /* of the RTC, since the epoch; 0 without one */

/* A compiler may call these. */
void *memcpy(void *to, const void *from, u64 size);
void *memset(void *to, int value, u64 size);

static inline u64 time_now(void) {
    u64 now;
    __asm__ volatile("csrr %0, time" : "=r"(now));
    return now;
}

#endif
