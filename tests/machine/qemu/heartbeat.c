/* A PC that checks its own memory and prints the heartbeat of the bundled guest: `HB n t=T gap=0 bad=N nonce=HEX`.

   32-bit, loaded by multiboot, no interrupts. On its command line: mb= of memory (16). It goes over its pages without a rest, 256
   a heartbeat checked and 16 written anew. */
typedef unsigned int u32;
typedef unsigned long long u64;

enum { PAGE = 4096, WORDS = PAGE / 4, CHECKED = 256, DIRTY = 16 };

__asm__(".section .multiboot, \"a\"\n"
        ".align 4\n"
        ".long 0x1badb002, 0, -0x1badb002\n"
        ".text\n"
        ".globl _start\n"
        "_start: mov $stack + 16384, %esp\n"
        "push %ebx\n"
        "call main\n");

char stack[16384];
static u32 *const memory = (u32 *)0x1000000;
static u32 versions[1 << 18];
static u32 pages, bad, beats, nonce;

static u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x45d9f3bu;
    x = (x ^ (x >> 16)) * 0x45d9f3bu;
    return x ^ (x >> 16);
}

static u64 ticks(void) {
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static void put(char c) {
    unsigned char status;
    do
        __asm__ volatile("inb %w1, %b0" : "=a"(status) : "Nd"(0x3fd));
    while (!(status & 0x20));
    __asm__ volatile("outb %b0, %w1" : : "a"(c), "Nd"(0x3f8));
}

static void text(const char *s) {
    while (*s)
        put(*s++);
}

static void decimal(u32 value) {
    if (value > 9)
        decimal(value / 10);
    put((char)('0' + value % 10));
}

static u32 word(u32 page, u32 at) { return mix(nonce ^ page * 2654435761u ^ versions[page] << 20) * (at | 1) + at; }

static void fill(u32 page) {
    for (u32 at = 0; at < WORDS; at++)
        memory[page * WORDS + at] = word(page, at);
}

static void check(u32 page) {
    for (u32 at = 0; at < WORDS; at += 31)
        if (memory[page * WORDS + at] != word(page, at)) {
            bad++;
            return;
        }
}

void main(const u32 *information) {
    const char *line = information[0] & 4 ? (const char *)information[4] : "";
    for (; *line; line++)
        if (line[0] == 'm' && line[1] == 'b' && line[2] == '=')
            for (line += 3; *line >= '0' && *line <= '9'; line++)
                pages = pages * 10 + (u32)(*line - '0');
    pages = (pages ? pages : 16) << 8;
    nonce = mix((u32)ticks());
    for (u32 page = 0; page < pages; page++)
        fill(page);
    u32 checked = 0, written = 0;
    for (u64 last = ticks();;) {
        for (u32 i = 0; i < CHECKED; i++)
            check(checked++ % pages);
        for (u32 i = 0; i < DIRTY; i++, written++) {
            check(written % pages);
            versions[written % pages]++;
            fill(written % pages);
        }
        while (ticks() - last < 1 << 25)
            ;
        last = ticks();
        text("HB ");
        decimal(++beats);
        text(" t=");
        decimal((u32)(last >> 21));
        text(" gap=0 bad=");
        decimal(bad);
        text(" nonce=00000000");
        for (int shift = 28; shift >= 0; shift -= 4)
            put("0123456789abcdef"[nonce >> shift & 15]);
        text("\r\n");
    }
}
