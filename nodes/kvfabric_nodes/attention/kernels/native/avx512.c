/* AVX-512: vectors of 16. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl. */
#define W 16
#define DOT_ROWS 4
#define SUM_ROWS 4
#define SUM_VECTORS 4
#include "cpu.h"
#include "wide.h"

static int has(void) { return this_cpu().avx512; }

const level level_avx512 = {has, wide_tile_tokens, wide_packed_bytes, wide_start, wide_take};
