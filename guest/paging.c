/* Sv39: rights for the image, everything else data that cannot be run, and three ranges that show RAM at another address.

   0x00_0000_0000  devices, one page of 1 GiB          rw
   0x00_8020_0000  the image in pages of 4 KiB         text rx, constants r, data rw
   0x00_8040_0000  the rest of RAM, pages of 2 MiB     rw
   0x10_0000_0000  the pattern: 2 MiB in pages of 4 KiB, then pages of 2 MiB
   0x20_0000_0000  four windows, moved over the pattern at every heartbeat
   0x20_0001_0000  a page of code to write, and the same page to run                                       */
#include "guest.h"

enum { V = 1, R = 2, W = 4, X = 8, A = 64, D = 128 };
enum { DATA = V | R | W | A | D, CONSTANT = V | R | A, TEXT = V | R | X | A };
enum { MEGAPAGE = 1 << 21, IMAGE = 0x80200000, PATTERN = 0x80400000 };

typedef u64 table[512] __attribute__((aligned(PAGE)));

static table root, ram, image, pattern, pattern_first, special, special_pages;
static u8 code_page[PAGE] __attribute__((aligned(PAGE)));
extern char image_rodata[], image_data[], image_end[];

static u64 leaf(u64 physical, u64 rights) { return physical >> 2 | rights; }
static u64 branch(const u64 *next) { return (u64)next >> 2 | V; }
static u64 top(u64 address) { return address >> 30 & 511; }

static void forget(u64 address) { __asm__ volatile("sfence.vma %0" : : "r"(address) : "memory"); }

void paging_init(void) {
    u64 end = boot_info.ram_base + boot_info.ram_size;
    root[0] = leaf(0, DATA);
    root[top(boot_info.ram_base)] = branch(ram);
    for (u64 i = 2; i < 512 && boot_info.ram_base + i * MEGAPAGE < end; i++)
        ram[i] = leaf(boot_info.ram_base + i * MEGAPAGE, DATA);
    ram[1] = branch(image);
    for (u64 at = IMAGE; at < (u64)image_end; at += PAGE)
        image[(at - IMAGE) / PAGE] =
            leaf(at, at < (u64)image_rodata ? TEXT : at < (u64)image_data ? CONSTANT : DATA);
    root[top(PATTERN_ADDRESS)] = branch(pattern);
    root[top(WINDOW_ADDRESS)] = branch(special);
    special[0] = branch(special_pages);
    special_pages[(CODE_WRITE_ADDRESS - WINDOW_ADDRESS) / PAGE] = leaf((u64)code_page, DATA);
    special_pages[(CODE_RUN_ADDRESS - WINDOW_ADDRESS) / PAGE] = leaf((u64)code_page, TEXT);
    __asm__ volatile("sfence.vma\n\tcsrw satp, %0\n\tsfence.vma" : : "r"(8ul << 60 | (u64)root >> 12) : "memory");
}

u64 pattern_limit(void) {
    u64 size = boot_info.ram_size < 1ul << 30 ? boot_info.ram_size : 1ul << 30;
    u64 below = PATTERN - boot_info.ram_base;
    return size <= below ? 0 : (size - below) / (PAGE + sizeof(u64));
}

u64 *pattern_versions(void) { return (u64 *)(PATTERN + pattern_pages * PAGE); }

void paging_pattern(u64 pages) {
    pattern[0] = branch(pattern_first);
    for (u64 i = 0; i < 512 && i < pages; i++)
        pattern_first[i] = leaf(PATTERN + i * PAGE, DATA);
    for (u64 i = 1; i * 512 < pages; i++)
        pattern[i] = leaf(PATTERN + i * MEGAPAGE, DATA);
    forget(PATTERN_ADDRESS);
    __asm__ volatile("sfence.vma" : : : "memory");
}

void paging_window(int window, u64 page) {
    special_pages[window] = leaf(PATTERN + page * PAGE, DATA);
    forget(WINDOW_ADDRESS + (u64)window * PAGE);
}
