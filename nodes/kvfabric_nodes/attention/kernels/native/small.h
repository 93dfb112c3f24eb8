/* What several of these files need that is too small for one of its own. */
#ifndef KVFABRIC_SMALL_H
#define KVFABRIC_SMALL_H

#include <time.h>

#include "attend.h"

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int element_bytes(int element) { return element == FLOAT32 ? 4 : 2; }

/* By the monotonic clock. */
static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#endif
