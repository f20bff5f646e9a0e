/* A guest's stores: one to each page of a list, and how long each took. See stalls.py. */

#include <stdint.h>
#include <time.h>

enum { STANDS = 0, RUNS = 1, OVER = 2 };

static int64_t now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

/* Stores in the order of `pages`, of 4096 bytes each, while `phase` is RUNS. Returns how many before it was OVER; `took` has the
 * nanoseconds of each. */
long store(volatile uint8_t *memory, const uint32_t *pages, long count, const volatile int *phase, uint32_t *took)
{
    for (long i = 0; i < count; i++) {
        int64_t begun;
        while (*phase == STANDS)
            ;
        if (*phase == OVER)
            return i;
        begun = now();
        memory[(uint64_t)pages[i] << 12]++;
        took[i] = (uint32_t)(now() - begun);
    }
    return count;
}
