/* The levels of this build. */
#ifndef KVFABRIC_LEVELS_H
#define KVFABRIC_LEVELS_H

#include "part.h"

extern const level level_base, level_avx2, level_avx512, level_amx;

/* The best for BEST; null where this CPU or this build lacks it. */
const level *find_level(int number);

#endif
