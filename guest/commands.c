/* What can be typed. Every command ends with one line that begins `ok` or `error:`. */
#include "guest.h"

static char *cursor;

static int word(const char *expected) {
    char *p = cursor;
    while (*expected && *p == *expected)
        p++, expected++;
    if (*expected || (*p && *p != ' '))
        return 0;
    while (*p == ' ')
        p++;
    cursor = p;
    return 1;
}

static int number(u64 *value, u64 base) {
    char *p = cursor;
    u64 result = 0;
    if (base == 16 && p[0] == '0' && p[1] == 'x')
        p += 2;
    char *first = p;
    for (;; p++) {
        u64 digit = *p >= '0' && *p <= '9' ? (u64)(*p - '0') : *p >= 'a' && *p <= 'f' ? (u64)(*p - 'a' + 10) : 99;
        if (digit >= base)
            break;
        result = result * base + digit;
    }
    if (p == first || (*p && *p != ' '))
        return 0;
    while (*p == ' ')
        p++;
    cursor = p;
    *value = result;
    return 1;
}

static int end(void) { return !*cursor; }
static void usage(const char *text) { print_line("error: usage: %s", text); }

static void outcome(const char *problem, const char *done) {
    if (problem)
        print_line("error: %s", problem);
    else
        print_line("ok %s", done);
}

static void help(void) {
    static const char *const lines[] = {
        "status                        counters, what is bad, the nonce",
        "nonce [HEX]                   show it, or give another and write everything anew",
        "check                         look at all memory and all disk slots now",
        "sum                           a checksum of the pattern in memory",
        "hold | go                     stop rewriting memory and disk (checks go on), or go on",
        "wreck                         overwrite memory, disk, code and registers: bad grows",
        "dirty N                       pages rewritten a heartbeat",
        "busy on|off                   rewrite memory without a rest",
        "period MS                     of the heartbeat",
        "heartbeat on|off              print it or not",
        "time                          the `time` CSR, milliseconds since boot, seconds of the RTC",
        "random                        eight bytes of the entropy device",
        "disk[N] read SECTOR           the sector's first eight bytes",
        "disk[N] write SECTOR HEX      fill a sector with eight bytes",
        "disk[N] sum SECTOR COUNT      a checksum of sectors",
        "disk[N] flush | format        flush; or take a foreign disk, whatever it holds",
        "flash[N] read OFFSET          a word; OFFSET and VALUE in hexadecimal",
        "flash[N] write OFFSET VALUE   program a word",
        "flash[N] erase OFFSET         the block around it",
        "sbi TEXT                      print through the firmware",
        "crash                         fault, print it and halt",
        "reboot | poweroff",
    };
    for (u64 i = 0; i < sizeof lines / sizeof *lines; i++)
        print_line("  %s", lines[i]);
    print_line("ok help");
}

static void status(void) {
    print_line("memory=%u pattern=%u sbi=%x.%x hz=%u period=%u dirty=%u held=%u busy=%u", boot_info.ram_size >> 20,
               pattern_pages * PAGE >> 20, sbi_version(), sbi_implementation(), boot_info.frequency,
               period / (boot_info.frequency / 1000), dirty, (u64)held, (u64)busy);
    for (int n = 0; n < disks; n++)
        print_line("disk%u: %u sectors, %s, free from %u", (u64)n, disk_sectors(n), disk_state(n), disk_scratch(n));
    print_line("ok status boot=%u hb=%u t=%u longest_gap=%u disk_operations=%u disk_errors=%u disk_late=%u bad=%u "
               "memory=%u disk=%u mapping=%u code=%u registers=%u clock=%u nonce=%X",
               boots, heartbeats, milliseconds(), longest_gap, disk_operations, disk_errors, disk_late, bad_total(),
               bad[MEMORY], bad[DISK], bad[MAPPING], bad[CODE], bad[REGISTERS], bad[CLOCK], nonce);
}

static void disk_command(int n) {
    static u64 data[WORDS];
    u64 sector, value;
    if (n >= disks)
        return outcome("there is no such disk", 0);
    if (word("flush") && end())
        return outcome(disk_flush(n), "flush");
    if (word("format") && end())
        return outcome(disk_format(n), "format");
    if (word("read") && number(&sector, 10) && end()) {
        const char *problem = disk_transfer(n, 0, sector, data, 1);
        if (problem)
            return outcome(problem, 0);
        return print_line("ok disk%u sector=%u value=%X", (u64)n, sector, data[0]);
    }
    if (word("write") && number(&sector, 10) && number(&value, 16) && end()) {
        for (int i = 0; i < SECTOR / 8; i++)
            data[i] = value;
        return outcome(disk_transfer(n, 1, sector, data, 1), "written");
    }
    if (word("sum") && number(&sector, 10) && number(&value, 10) && end()) {
        u64 sum = 0, last = sector + value;
        for (u64 at = sector; at < last; at++) {
            const char *problem = disk_transfer(n, 0, at, data, 1);
            if (problem)
                return outcome(problem, 0);
            for (int i = 0; i < SECTOR / 8; i++)
                sum = digest(sum, data[i]);
        }
        return print_line("ok disk%u sum=%X sector=%u count=%u", (u64)n, sum, sector, value);
    }
    usage("disk[N] read SECTOR | write SECTOR HEX | sum SECTOR COUNT | flush | format");
}

static void flash_command(int bank) {
    u64 offset, value;
    if (bank < 0)
        bank = flash_present(1) ? 1 : 0;
    if (!flash_present(bank))
        return outcome("there is no such flash", 0);
    int reads = word("read"), writes = !reads && word("write"), erases = !reads && !writes && word("erase");
    if (!(reads || writes || erases) || !number(&offset, 16) || (writes && !number(&value, 16)) || !end())
        return usage("flash[N] read OFFSET | write OFFSET VALUE | erase OFFSET, in hexadecimal");
    if (offset % 4 || offset >= flash_size() || (writes && value >> 32))
        return outcome("a flash word is 32 bits at an offset that 4 divides", 0);
    const char *problem = writes ? flash_write(bank, offset, (u32)value) : erases ? flash_erase(bank, offset) : 0;
    if (problem)
        return outcome(problem, 0);
    print_line("ok flash%u offset=%x value=%x", (u64)bank, offset, (u64)flash_read(bank, offset));
}

static int unit(const char *name, int otherwise, int *n) {
    char *p = cursor;
    while (*name)
        if (*p++ != *name++)
            return 0;
    *n = otherwise;
    if (*p >= '0' && *p <= '9')
        *n = *p++ - '0';
    if (*p && *p != ' ')
        return 0;
    while (*p == ' ')
        p++;
    cursor = p;
    return 1;
}

static int on_off(const char *name, int *flag, int on) {
    if (!word(name))
        return 0;
    if (word("on") && end())
        *flag = on;
    else if (word("off") && end())
        *flag = !on;
    else
        return usage("busy on|off, heartbeat on|off"), 1;
    print_line("ok %s", name);
    return 1;
}

static void set_number(const char *name, u64 least, u64 most, void (*set)(u64)) {
    u64 value;
    if (!number(&value, 10) || !end() || value < least || value > most)
        return print_line("error: usage: %s NUMBER, from %u to %u", name, least, most);
    set(value);
    print_line("ok %s %u", name, value);
}

static void set_dirty(u64 pages) { dirty = pages; }

void command(char *line) {
    u64 value;
    int n;
    cursor = line;
    while (*cursor == ' ')
        cursor++;
    if (word("help")) {
        help();
    } else if (word("status")) {
        status();
    } else if (word("nonce")) {
        if (number(&value, 16) && end())
            set_nonce(value);
        else if (!end())
            return usage("nonce [HEX]");
        print_line("ok nonce=%X", nonce);
    } else if (word("check")) {
        state_check();
        u64 pages = pattern_check_all(), slots = disks_check_all();
        print_line("ok check bad=%u pages=%u slots=%u", bad_total(), pages, slots);
    } else if (word("sum")) {
        print_line("ok sum=%X pages=%u", pattern_sum(), pattern_pages);
    } else if (word("hold")) {
        held = 1;
        print_line("ok hold");
    } else if (word("go")) {
        held = 0;
        print_line("ok go");
    } else if (word("wreck")) {
        pattern_wreck();
        disks_wreck();
        state_wreck();
        print_line("ok wreck");
    } else if (word("dirty")) {
        set_number("dirty", 0, pattern_pages, set_dirty);
    } else if (word("period")) {
        set_number("period", 1, 10000, set_period);
    } else if (word("time")) {
        print_line("ok time=%u ms=%u rtc=%u", time_now(), milliseconds(), clock_seconds());
    } else if (word("random")) {
        if (entropy_device(&value))
            print_line("ok random=%X", value);
        else
            outcome("there is no entropy device", 0);
    } else if (word("sbi")) {
        outcome(sbi_write(cursor) && sbi_write("\r\n") ? 0 : "the firmware has no console", "sbi");
    } else if (word("crash")) {
        print_line("ok crash");
        *(volatile u64 *)UNMAPPED_ADDRESS = 0;
    } else if (word("reboot")) {
        print_line("ok reboot");
        sbi_reset(1);
    } else if (word("poweroff")) {
        print_line("ok poweroff");
        sbi_reset(0);
    } else if (unit("disk", 0, &n)) {
        disk_command(n);
    } else if (unit("flash", -1, &n)) {
        flash_command(n);
    } else if (!on_off("busy", &busy, 1) && !on_off("heartbeat", &quiet, 0)) {
        print_line("error: no command %s; `help` lists them", cursor);
    }
}
