/* The Linux guest that checks itself: the first process of a kernel, which knows what its memory and its disk must hold.

   It prints the same heartbeat as the bundled guest, `HB n t=MS gap=US bad=N nonce=HEX`, and reads the same words from the
   console: status, check, wreck, reboot, poweroff. On the kernel's command line: mb= of memory (32), dirty= pages a heartbeat
   (16), period= in ms (50), workers= processes that rewrite memory of their own meanwhile, each on a processor of its own (one for
   every processor but the first). The nonce comes from the kernel's random numbers and is kept in memory alone. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

enum { PAGE = 4096, WORDS = PAGE / 8, SLOTS = 64, CHECKED = 64, FORK_EVERY = 10, WORKERS = 15, WORKER_PAGES = 1024 };

static uint64_t nonce, pages, dirty, period_ms, beats;
static uint64_t bad_memory, bad_shared, bad_disk, bad_clock, bad_process, bad_worker;
static uint64_t *pattern, *shared, *versions; /* shared: a file in tmpfs, mapped */
static uint64_t slot_seed[SLOTS], slot_generation;
static uint64_t *block;
static int disk = -1;
static uint64_t disk_gap;

/* A worker rewrites its pages while the first process reads them on another processor. A version is odd while its page is being
   written, so that a page with the same even version before and after it was read must match that version. */
struct worker {
    _Atomic uint64_t rounds, bad;
    _Atomic uint64_t versions[WORKER_PAGES];
    uint64_t pages[WORKER_PAGES][WORDS] __attribute__((aligned(PAGE)));
};
static struct worker *workers;
static pid_t worker_pids[WORKERS];
static uint64_t worker_count;

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t next(uint64_t x) { return x * 6364136223846793005u + 1442695040888963407u; }

static void fill(uint64_t *page, uint64_t seed) {
    for (int i = 0; i < WORDS; i++)
        page[i] = seed = next(seed);
}

static int matches(const uint64_t *page, uint64_t seed) {
    uint64_t difference = 0;
    for (int i = 0; i < WORDS; i++)
        difference |= page[i] ^ (seed = next(seed));
    return !difference;
}

static uint64_t microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void fatal(const char *what) {
    printf("PANIC %s: %s\n", what, strerror(errno));
    for (;;)
        pause();
}

static uint64_t bad(void) {
    uint64_t sum = bad_memory + bad_shared + bad_disk + bad_clock + bad_process + bad_worker;
    for (uint64_t i = 0; i < worker_count; i++)
        sum += workers[i].bad;
    return sum;
}
static uint64_t seed_of(uint64_t page) { return mix(nonce ^ mix(page << 32 ^ versions[page])); }
static uint64_t *page_at(uint64_t page) { return (page % 4 ? pattern : shared) + page * WORDS; }

static void check_page(uint64_t page) {
    if (!matches(page_at(page), seed_of(page)))
        *(page % 4 ? &bad_memory : &bad_shared) += 1;
}

static void load_modules(void) {
    char name[128];
    FILE *order = fopen("/modules/order", "r");
    while (order && fscanf(order, "%127s", name) == 1) {
        char path[160];
        snprintf(path, sizeof path, "/modules/%s", name);
        int module = open(path, O_RDONLY | O_CLOEXEC);
        if (module < 0 || syscall(SYS_finit_module, module, "", 0))
            printf("module %s: %s\n", name, strerror(errno));
        if (module >= 0)
            close(module);
    }
    if (order)
        fclose(order);
}

static uint64_t argument(const char *key, uint64_t otherwise) {
    static char line[4096];
    if (!line[0]) {
        int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
        if (file < 0 || read(file, line, sizeof line - 1) < 0)
            fatal("/proc/cmdline");
        close(file);
    }
    size_t size = strlen(key);
    for (const char *at = line; (at = strstr(at, key)); at += size)
        if ((at == line || at[-1] == ' ') && at[size] == '=')
            return strtoull(at + size + 1, NULL, 0);
    return otherwise;
}

static off_t slot_offset(int slot) { return (off_t)(PAGE + (uint64_t)slot * disk_gap); }

static void disk_open(void) {
    uint64_t size = 0;
    disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk >= 0 && ioctl(disk, BLKGETSIZE64, &size))
        fatal("/dev/vda");
    disk_gap = size / (SLOTS + 1) & ~(uint64_t)(PAGE - 1);
    if (disk_gap > 65536)
        disk_gap = 65536;
    if (disk >= 0 && !disk_gap) {
        close(disk);
        disk = -1;
    }
    /* Whoever has a disk with something on it keeps it. */
    if (disk >= 0 && (pread(disk, block, PAGE, 0) != PAGE || (block[0] && block[0] != 0x6d61726666697473u))) {
        printf("vda: holds something else, left alone\n");
        close(disk);
        disk = -1;
    }
    if (disk >= 0) {
        block[0] = 0x6d61726666697473u;
        block[1]++;
        if (pwrite(disk, block, PAGE, 0) != PAGE)
            fatal("/dev/vda");
    }
}

static void check_slot(int slot) {
    if (disk >= 0 && slot_seed[slot] &&
        (pread(disk, block, PAGE, slot_offset(slot)) != PAGE || !matches(block, slot_seed[slot])))
        bad_disk++;
}

static void write_slot(int slot) {
    if (disk < 0)
        return;
    uint64_t seed = mix(nonce ^ mix((uint64_t)slot << 40 ^ ++slot_generation)) | 1;
    fill(block, seed);
    slot_seed[slot] = pwrite(disk, block, PAGE, slot_offset(slot)) == PAGE ? seed : 0;
    if (!slot_seed[slot])
        printf("vda: %s\n", strerror(errno));
}

static uint64_t worker_seed(uint64_t worker, uint64_t page, uint64_t version) {
    return mix(nonce ^ mix((worker + 1) << 52 ^ page << 40 ^ version));
}

static void check_worker_page(uint64_t worker, uint64_t page) {
    struct worker *its = &workers[worker];
    uint64_t version = atomic_load_explicit(&its->versions[page], memory_order_acquire);
    if (version & 1)
        return;
    int same = matches(its->pages[page], worker_seed(worker, page, version));
    atomic_thread_fence(memory_order_acquire);
    if (!same && atomic_load_explicit(&its->versions[page], memory_order_relaxed) == version)
        bad_worker++;
}

static void write_worker_page(uint64_t worker, uint64_t page) {
    struct worker *its = &workers[worker];
    uint64_t version = its->versions[page];
    atomic_store_explicit(&its->versions[page], version + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    fill(its->pages[page], worker_seed(worker, page, version + 2));
    atomic_store_explicit(&its->versions[page], version + 2, memory_order_release);
}

static void stay_on(uint64_t processor) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (sched_setaffinity(0, sizeof one, &one))
        fatal("sched_setaffinity");
}

static void work(uint64_t worker) {
    struct worker *its = &workers[worker];
    uint64_t written = 0;
    struct timespec rest = {(time_t)(period_ms / 1000), (long)(period_ms % 1000 * 1000000)};
    for (;; its->rounds++) {
        for (uint64_t i = 0; i < dirty; i++) {
            uint64_t page = written++ % WORKER_PAGES;
            if (!matches(its->pages[page], worker_seed(worker, page, its->versions[page])))
                its->bad++;
            write_worker_page(worker, page);
        }
        nanosleep(&rest, NULL);
    }
}

static void start_workers(void) {
    uint64_t processors = (uint64_t)sysconf(_SC_NPROCESSORS_ONLN);
    worker_count = argument("workers", processors - 1);
    if (worker_count > WORKERS)
        worker_count = WORKERS;
    if (!worker_count)
        return;
    workers = mmap(NULL, worker_count * sizeof *workers, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (workers == MAP_FAILED)
        fatal("memory of workers");
    for (uint64_t i = 0; i < worker_count; i++) {
        for (uint64_t page = 0; page < WORKER_PAGES; page++)
            write_worker_page(i, page);
        fflush(stdout);
        worker_pids[i] = fork();
        if (worker_pids[i] < 0)
            fatal("fork");
        if (!worker_pids[i]) {
            stay_on((i + 1) % processors);
            work(i);
        }
    }
    stay_on(0);
}

/* Workers that ended are as wrong as pages that do not match. */
static void check_workers(uint64_t pages_of_each) {
    for (uint64_t i = 0; i < worker_count; i++) {
        for (uint64_t page = 0; page < pages_of_each; page++)
            check_worker_page(i, mix(beats << 10 ^ page) % WORKER_PAGES);
        if (worker_pids[i] && waitpid(worker_pids[i], NULL, WNOHANG)) {
            bad_worker++;
            worker_pids[i] = 0;
        }
    }
}

/* A process of its own sees the same memory, and its end is seen. */
static void check_in_a_child(void) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        uint64_t before = bad();
        for (uint64_t i = 0; i < CHECKED; i++)
            check_page(mix(beats * CHECKED + i) % pages);
        _exit(bad() == before ? 0 : 1);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status)
        bad_process++;
}

static void beat(void) {
    static uint64_t last, checked, written;
    uint64_t now = microseconds();
    if (now < last)
        bad_clock++;
    uint64_t gap = last ? now - last : period_ms * 1000;
    last = now;
    for (uint64_t i = 0; i < CHECKED; i++)
        check_page(checked++ % pages);
    for (uint64_t i = 0; i < dirty; i++) {
        uint64_t page = written++ % pages;
        check_page(page);
        versions[page]++;
        fill(page_at(page), seed_of(page));
    }
    check_slot((int)(mix(beats) % SLOTS));
    write_slot((int)(beats % SLOTS));
    if (beats % FORK_EVERY == 0)
        check_in_a_child();
    check_workers(CHECKED / 4);
    printf("HB %lu t=%lu gap=%lu bad=%lu nonce=%016lx\n", ++beats, now / 1000, gap, bad(), nonce);
}

static void wreck(void) {
    for (uint64_t page = 0; page < pages; page += 3)
        fill(page_at(page), ~microseconds());
    for (uint64_t i = 0; i < worker_count; i++)
        for (uint64_t page = 0; page < WORKER_PAGES; page += 3)
            fill(workers[i].pages[page], ~microseconds());
    for (int slot = 0; disk >= 0 && slot < SLOTS; slot++) {
        fill(block, ~microseconds());
        if (pwrite(disk, block, PAGE, slot_offset(slot)) != PAGE)
            printf("vda: %s\n", strerror(errno));
    }
    printf("ok wreck\n");
}

static void command(const char *line) {
    if (!strcmp(line, "status")) {
        uint64_t rounds = 0, worker_bad = bad_worker;
        for (uint64_t i = 0; i < worker_count; i++) {
            rounds += workers[i].rounds;
            worker_bad += workers[i].bad;
        }
        printf("ok status hb=%lu bad=%lu memory=%lu shared=%lu disk=%lu clock=%lu process=%lu worker=%lu disks=%d workers=%lu "
               "rounds=%lu nonce=%016lx\n",
               beats, bad(), bad_memory, bad_shared, bad_disk, bad_clock, bad_process, worker_bad, disk >= 0, worker_count, rounds,
               nonce);
    } else if (!strcmp(line, "check")) {
        for (uint64_t page = 0; page < pages; page++)
            check_page(page);
        for (int slot = 0; slot < SLOTS; slot++)
            check_slot(slot);
        check_workers(WORKER_PAGES);
        printf("ok check bad=%lu\n", bad());
    } else if (!strcmp(line, "wreck")) {
        wreck();
    } else if (!strcmp(line, "poweroff") || !strcmp(line, "reboot")) {
        printf("ok %s\n", line);
        reboot(*line == 'r' ? RB_AUTOBOOT : RB_POWER_OFF);
    } else {
        printf("error: the commands are status, check, wreck, reboot, poweroff\n");
    }
}

static void input(void) {
    static char line[128];
    static size_t size;
    char c;
    if (read(0, &c, 1) != 1)
        return;
    if (c == '\n' || c == '\r') {
        line[size] = 0;
        if (size)
            command(line);
        size = 0;
    } else if (size < sizeof line - 1) {
        line[size++] = c;
    }
}

int main(void) {
    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    mkdir("/tmp", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, "size=95%");
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    for (int i = 0; console >= 0 && i < 3; i++)
        dup2(console, i);
    setvbuf(stdout, NULL, _IOLBF, 512);
    load_modules();

    pages = argument("mb", 32) * (1 << 20) / PAGE;
    dirty = argument("dirty", 16);
    period_ms = argument("period", 50);
    if (pages < 64)
        pages = 64;
    if (getrandom(&nonce, sizeof nonce, 0) != sizeof nonce)
        fatal("getrandom");
    int file = open("/tmp/shared", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)(pages * PAGE)))
        fatal("/tmp/shared");
    shared = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    pattern = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    block = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    versions = calloc(pages, sizeof *versions);
    if (shared == MAP_FAILED || pattern == MAP_FAILED || block == MAP_FAILED || !versions)
        fatal("memory");
    for (uint64_t page = 0; page < pages; page++)
        fill(page_at(page), seed_of(page));
    disk_open();
    start_workers();
    printf("boot nonce=%016lx pattern=%lu disks=%d\n", nonce, pages * PAGE >> 20, disk >= 0);

    for (uint64_t due = microseconds();;) {
        uint64_t now = microseconds();
        if (now >= due) {
            beat();
            due = now + period_ms * 1000;
            continue;
        }
        struct pollfd typed = {0, POLLIN, 0};
        if (poll(&typed, 1, (int)((due - now) / 1000 + 1)) > 0)
            input();
    }
}
