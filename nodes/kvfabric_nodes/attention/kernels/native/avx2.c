/* AVX2 with fused products: vectors of 8. Compiled with -mavx2 -mfma -mf16c. */
#define W 8
#define DOT_ROWS 2
#define SUM_ROWS 4
#define SUM_VECTORS 2
#include "cpu.h"
#include "wide.h"

static int has(void) { return this_cpu().avx2; }

const level level_avx2 = {has, wide_tile_tokens, wide_packed_bytes, wide_start, wide_take};
