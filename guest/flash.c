/* Two banks of CFI flash, each two 16-bit chips side by side (command set 0001, as Intel's). */
#include "guest.h"

enum { BANK = 0x02000000, BASE = 0x20000000 };
enum { QUERY = 0x00980098, ARRAY = 0x00ff00ff, PROGRAM = 0x00400040, ERASE = 0x00200020, CONFIRM = 0x00d000d0 };
enum { READY = 0x00800080, FAILED = 0x003a003a, CLEAR = 0x00500050, READ_STATUS = 0x00700070 };

static int present[BANKS];

static volatile u32 *word(int bank, u64 offset) { return (volatile u32 *)(BASE + (u64)bank * BANK + offset); }

int flash_present(int bank) { return bank >= 0 && bank < BANKS && present[bank]; }
u64 flash_size(void) { return BANK; }

void flash_init(void) {
    for (int bank = 0; bank < BANKS; bank++) {
        u32 value;
        if (!probe_read((u64)word(bank, 0), &value))
            continue;
        *word(bank, 0x55 * 4) = QUERY;
        present[bank] = (*word(bank, 0x10 * 4) & 0xff) == 'Q' && (*word(bank, 0x11 * 4) & 0xff) == 'R' &&
                        (*word(bank, 0x12 * 4) & 0xff) == 'Y';
        *word(bank, 0) = ARRAY;
    }
}

u32 flash_read(int bank, u64 offset) { return *word(bank, offset); }

/* Waits for the chips, returns to reading, and says what they thought. */
static const char *finish(int bank, u64 offset) {
    *word(bank, offset) = READ_STATUS;
    u32 status;
    do
        status = *word(bank, offset);
    while ((status & READY) != READY);
    *word(bank, 0) = CLEAR;
    *word(bank, 0) = ARRAY;
    return status & FAILED ? "the flash reports a failure, as when it is read-only" : 0;
}

const char *flash_write(int bank, u64 offset, u32 value) {
    *word(bank, offset) = PROGRAM;
    *word(bank, offset) = value;
    const char *problem = finish(bank, offset);
    if (!problem && *word(bank, offset) != value)
        problem = "it reads back otherwise: erase it first";
    return problem;
}

const char *flash_erase(int bank, u64 offset) {
    *word(bank, offset) = ERASE;
    *word(bank, offset) = CONFIRM;
    return finish(bank, offset);
}
