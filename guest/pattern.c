/* The checked memory. Each page holds a sequence that follows from the nonce, the page's number and its version; versions lie
   behind the pattern. A page that comes from another boot, another time or another place cannot look right. */
#include "guest.h"

enum { CHECKED = 128 };          /* pages looked at a heartbeat, beside those rewritten */

u64 pattern_pages;
static u64 *versions;
static u64 next_check, next_write;

u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

u64 digest(u64 sum, u64 word) {
    sum = (sum ^ word) * 0x9e3779b97f4a7c15;
    return sum ^ sum >> 32;
}

static u64 step(u64 x) { return x * 6364136223846793005 + 1442695040888963407; }

u64 fill(u64 *page, u64 seed) {
    for (int i = 0; i < WORDS; i++)
        page[i] = seed = step(seed);
    return seed;
}

int matches(const u64 *page, u64 seed) {
    u64 difference = 0;
    for (int i = 0; i < WORDS; i++)
        difference |= page[i] ^ (seed = step(seed));
    return !difference;
}

static u64 *page_at(u64 page) { return (u64 *)(PATTERN_ADDRESS + page * PAGE); }
u64 pattern_seed(u64 page) { return mix(nonce ^ mix(page << 32 ^ versions[page])); }

void pattern_init(void) {
    pattern_pages = argument("mb", 32) * (1 << 20) / PAGE;
    if (pattern_pages < 512)
        pattern_pages = 512;
    if (pattern_pages > pattern_limit())
        panic("too little memory for the pattern");
    paging_pattern(pattern_pages);
    versions = pattern_versions();
    memset(versions, 0, pattern_pages * sizeof *versions);
    pattern_write_all();
}

void pattern_write_all(void) {
    for (u64 page = 0; page < pattern_pages; page++)
        fill(page_at(page), pattern_seed(page));
}

static u64 check(u64 page) {
    if (matches(page_at(page), pattern_seed(page)))
        return 0;
    bad[MEMORY]++;
    return 1;
}

u64 pattern_check_all(void) {
    u64 found = 0;
    for (u64 page = 0; page < pattern_pages; page++)
        found += check(page);
    return found;
}

u64 pattern_sum(void) {
    u64 sum = 0;
    for (u64 page = 0; page < pattern_pages; page++)
        for (int i = 0; i < WORDS; i++)
            sum = digest(sum, page_at(page)[i]);
    return sum;
}

void pattern_rewrite(u64 count) {
    for (u64 i = 0; i < count; i++) {
        u64 page = next_write++ % pattern_pages;
        check(page);
        versions[page]++;
        fill(page_at(page), pattern_seed(page));
    }
}

void pattern_beat(void) {
    for (u64 i = 0; i < CHECKED; i++)
        check(next_check++ % pattern_pages);
    if (!held)
        pattern_rewrite(dirty);
}

void pattern_wreck(void) {
    for (u64 page = 0; page < pattern_pages; page += 4)
        fill(page_at(page), ~time_now());
}
