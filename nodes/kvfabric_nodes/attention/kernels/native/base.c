/* The level that every CPU has: vectors of 4, which is SSE2 and NEON. */
#define W 4
#define DOT_ROWS 2
#define SUM_ROWS 2
#define SUM_VECTORS 4
#include "wide.h"

static int always(void) { return 1; }

const level level_base = {always, wide_tile_tokens, wide_packed_bytes, wide_start, wide_take};
