/* Words for the tile registers: each holds 16 rows of 64 bytes. */
#ifndef KVFABRIC_AMX_TILES_H
#define KVFABRIC_AMX_TILES_H

#include <immintrin.h>
#include <stdint.h>

#define TILE_ROWS 16
#define TILE_PAIRS 32 /* bfloat16 numbers in a row */
#define REGISTER_BYTES 1024

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_shapes;

static inline void tiles_begin(void) {
    tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = TILE_ROWS;
    }
    _tile_loadconfig(&shapes);
}

/* 32 bfloat16 of two vectors, rounded to nearest, as pairs (even[i], odd[i]). */
static inline __m512i paired(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

static inline __m512 even_of(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
static inline __m512 odd_of(__m512i pairs) {
    return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u));
}

/* to[j][i] = from[i][j] of 16 x 16 numbers of 32 bits; rows of `to` are 64 bytes apart. */
static inline void transpose(const __m512i from[16], char *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* b[4 g + i] holds columns i, i+4, i+8, i+12 of rows 4 g .. */
        __m512i x = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x44);
        __m512i y = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xee);
        __m512i z = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x44);
        __m512i w = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xee);
        _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_i32x4(x, z, 0x88));
        _mm512_storeu_si512(to + 64 * (4 + i), _mm512_shuffle_i32x4(x, z, 0xdd));
        _mm512_storeu_si512(to + 64 * (8 + i), _mm512_shuffle_i32x4(y, w, 0x88));
        _mm512_storeu_si512(to + 64 * (12 + i), _mm512_shuffle_i32x4(y, w, 0xdd));
    }
}

#endif
