/* The 16550 UART: printing waits for room, input comes by interrupt. Lines end in CR LF. */
#include "guest.h"
#include <stdarg.h>

enum { DATA = 0, ENABLE = 1, FIFO = 2, LINE = 3, MODEM = 4, STATUS = 5 };
enum { RECEIVED = 1, ROOM = 32, INPUT = 256 };

static volatile u8 *const uart = (volatile u8 *)0x10000000;
static volatile char received[INPUT];
static volatile u32 head, tail;
static char line[INPUT];
static u32 typed, column;

void console_init(void) {
    uart[ENABLE] = 0;
    uart[LINE] = 3;
    uart[FIFO] = 7;
    uart[MODEM] = 8;
    uart[ENABLE] = RECEIVED;
}

static void put(char c) {
    while (!(uart[STATUS] & ROOM))
        ;
    uart[DATA] = (u8)c;
    column = c == '\n' || c == '\r' ? 0 : column + 1;
}

void console_interrupt(void) {
    while (uart[STATUS] & RECEIVED) {
        char c = (char)uart[DATA];
        if (head - tail < INPUT)
            received[head++ % INPUT] = c;
    }
}

int console_pending(void) { return head != tail; }

static void number(u64 value, u32 base, int digits) {
    char text[24];
    int n = 0;
    do
        text[n++] = "0123456789abcdef"[value % base];
    while ((value /= base) || n < digits);
    while (n)
        put(text[--n]);
}

static void print_arguments(const char *format, va_list arguments) {
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *text = va_arg(arguments, const char *); *text; text++)
                put(*text);
            break;
        case 'u':
            number(va_arg(arguments, u64), 10, 1);
            break;
        case 'x':
            number(va_arg(arguments, u64), 16, 1);
            break;
        case 'X':
            number(va_arg(arguments, u64), 16, 16);
            break;
        default:
            put(*format);
        }
    }
}

void print(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_arguments(format, arguments);
    va_end(arguments);
}

void print_line(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (column)
        print("\r\n");
    print_arguments(format, arguments);
    print("\r\n");
    for (u32 i = 0; i < typed; i++)
        put(line[i]);
    va_end(arguments);
}

void console_poll(void) {
    while (head != tail) {
        char c = received[tail % INPUT];
        tail++;
        if (c == '\r' || c == '\n') {
            print("\r\n");
            line[typed] = 0;
            typed = 0;
            if (line[0])
                command(line);
        } else if ((c == 8 || c == 127) && typed) {
            typed--;
            print("\b \b");
        } else if (c == 21) {
            for (; typed; typed--)
                print("\b \b");
        } else if (c >= ' ' && c < 127 && typed < INPUT - 1) {
            line[typed++] = c;
            put(c);
        }
    }
}
