/* The firmware's services (RISC-V SBI 2.0): timer, system reset, console. */
#include "guest.h"

struct answer {
    long error;
    u64 value;
};

enum { LEGACY_PUTCHAR = 1, LEGACY_SHUTDOWN = 8, BASE = 0x10 };
enum { TIMER = 0x54494D45, RESET = 0x53525354, DEBUG_CONSOLE = 0x4442434E };

static struct answer call(u64 extension, u64 function, u64 first, u64 second, u64 third) {
    register u64 a0 __asm__("a0") = first;
    register u64 a1 __asm__("a1") = second;
    register u64 a2 __asm__("a2") = third;
    register u64 a6 __asm__("a6") = function;
    register u64 a7 __asm__("a7") = extension;
    __asm__ volatile("ecall" : "+r"(a0), "+r"(a1) : "r"(a2), "r"(a6), "r"(a7) : "memory");
    return (struct answer){(long)a0, a1};
}

static int available(u64 extension) { return call(BASE, 3, extension, 0, 0).value != 0; }

u64 sbi_version(void) { return call(BASE, 0, 0, 0, 0).value; }
u64 sbi_implementation(void) { return call(BASE, 1, 0, 0, 0).value; }
void sbi_set_timer(u64 deadline) { call(TIMER, 0, deadline, 0, 0); }

void sbi_reset(int reboot) {
    if (available(RESET))
        call(RESET, 0, reboot ? 1 : 0, 0, 0);
    call(LEGACY_SHUTDOWN, 0, 0, 0, 0);
}

int sbi_write(const char *text) {
    u64 size = 0;
    while (text[size])
        size++;
    if (available(DEBUG_CONSOLE))
        return call(DEBUG_CONSOLE, 0, size, (u64)text, 0).error == 0;
    if (!available(LEGACY_PUTCHAR))
        return 0;
    for (; *text; text++)
        call(LEGACY_PUTCHAR, 0, *(const u8 *)text, 0, 0);
    return 1;
}
