/* What the device tree says that cannot be assumed: memory, the clock's rate, arguments, a seed. */
#include "guest.h"

struct boot_info boot_info;

enum { MAGIC = 0xd00dfeed, BEGIN_NODE = 1, END_NODE = 2, PROP = 3, NOP = 4, DEPTH = 8 };

static u32 big32(const u8 *p) { return (u32)p[0] << 24 | (u32)p[1] << 16 | (u32)p[2] << 8 | p[3]; }
static u64 big64(const u8 *p) { return (u64)big32(p) << 32 | big32(p + 4); }

static int equal(const char *a, const char *b) {
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static int starts(const char *text, const char *prefix) {
    while (*prefix)
        if (*text++ != *prefix++)
            return 0;
    return 1;
}

static void property(const char *node, const char *name, const u8 *value, u32 size) {
    if (starts(node, "memory@") && equal(name, "reg") && size >= 16 && !boot_info.ram_size) {
        boot_info.ram_base = big64(value);
        boot_info.ram_size = big64(value + 8);
    } else if (equal(name, "timebase-frequency") && size >= 4) {
        boot_info.frequency = big32(value);
    } else if (equal(node, "chosen") && equal(name, "bootargs")) {
        for (u32 i = 0; i < size && i < sizeof boot_info.arguments - 1; i++)
            boot_info.arguments[i] = (char)value[i];
    } else if (equal(node, "chosen") && equal(name, "rng-seed") && size >= 8) {
        boot_info.has_seed = 1;
        for (u32 i = 0; i + 8 <= size; i += 8)
            boot_info.seed = mix(boot_info.seed ^ big64(value + i));
    }
}

int fdt_read(const void *blob) {
    const u8 *base = blob;
    if (!base || ((u64)base & 3) || big32(base) != MAGIC)
        return 0;
    const u8 *p = base + big32(base + 8);
    const char *strings = (const char *)base + big32(base + 12);
    const char *path[DEPTH] = {""};
    int depth = 0;
    for (;;) {
        u32 token = big32(p);
        p += 4;
        if (token == BEGIN_NODE) {
            const char *name = (const char *)p;
            while (*p++)
                ;
            p = (const u8 *)(((u64)p + 3) & ~3ul);
            if (++depth < DEPTH)
                path[depth] = name;
        } else if (token == PROP) {
            u32 size = big32(p);
            if (depth > 0 && depth < DEPTH)
                property(path[depth], strings + big32(p + 4), p + 8, size);
            p += 8 + ((size + 3) & ~3u);
        } else if (token == END_NODE) {
            depth--;
        } else if (token != NOP) {
            return boot_info.ram_size != 0;
        }
    }
}

u64 argument(const char *key, u64 otherwise) {
    for (const char *p = boot_info.arguments; *p;) {
        const char *k = key;
        while (*k && *p == *k)
            p++, k++;
        if (!*k && *p == '=' && p[1] >= '0' && p[1] <= '9') {
            u64 value = 0;
            for (p++; *p >= '0' && *p <= '9'; p++)
                value = value * 10 + (u64)(*p - '0');
            return value;
        }
        while (*p && *p != ' ')
            p++;
        while (*p == ' ')
            p++;
    }
    return otherwise;
}
