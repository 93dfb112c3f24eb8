/* Vectors of W floats in the compiler's own extension: the same source for every CPU. */
#ifndef KVFABRIC_VECTORS_H
#define KVFABRIC_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "attend.h"

#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.44269504088896340736f

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int64_t vl __attribute__((vector_size(8 * W)));
typedef float v4 __attribute__((vector_size(16)));

INLINE vf all(float x) { return x - (vf){0}; }
INLINE vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf widen_half(vh h) {
#if W == 16 && defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif W == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else /* scaling by 2^112 moves the exponent to where it belongs, subnormals included */
    vu w = __builtin_convertvector(h, vu);
    vf scaled = (vf)((w & 0x7fff) << 13) * 0x1p112f;
    vi special = (vi)((w & 0x7c00) == 0x7c00);
    return (vf)((vu)scaled | ((vu)special & 0x7f800000) | (w & 0x8000) << 16);
#endif
}

/* Fetches a line of memory to the second-level cache; from any address, bad ones included. */
INLINE void touch(const char *from) { __builtin_prefetch(from, 0, 2); }

/* W elements in float32. */
INLINE vf widen(const char *from, int element) {
    if (element == FLOAT32) return load((const float *)from);
    vh h;
    memcpy(&h, from, sizeof h);
    if (element == FLOAT16) return widen_half(h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

/* The first n < W of them, then zeros; reads no further. */
INLINE vf widen_some(const char *from, int n, int element) {
    char padded[4 * W] = {0};
    memcpy(padded, from, (size_t)n * (element == FLOAT32 ? 4 : 2));
    return widen(padded, element);
}

/* Shuffles 4 numbers of x and y (those from 4 on) in each 4 of the vector. */
#define FOURS(i, j, k, l, at) i + at, j + at, k + at, l + at
#if W == 16
#define SHUFFLE(x, y, i, j, k, l) \
    __builtin_shufflevector(x, y, FOURS(i, j, k, l, 0), FOURS(i, j, k, l, 4), \
                            FOURS(i, j, k, l, 8), FOURS(i, j, k, l, 12))
#elif W == 8
#define SHUFFLE(x, y, i, j, k, l) \
    __builtin_shufflevector(x, y, FOURS(i, j, k, l, 0), FOURS(i, j, k, l, 4))
#else
#define SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#endif

/* The sum of the vector's fours. */
INLINE v4 folded(vf x) {
#if W == 16
    typedef float v8 __attribute__((vector_size(32)));
    v8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#elif W == 8
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
    return x;
#endif
}

/* The sums of four vectors, side by side. */
INLINE v4 sums(vf a, vf b, vf c, vf d) {
    vf ab = SHUFFLE(a, b, 0, W, 1, W + 1) + SHUFFLE(a, b, 2, W + 2, 3, W + 3);
    vf cd = SHUFFLE(c, d, 0, W, 1, W + 1) + SHUFFLE(c, d, 2, W + 2, 3, W + 3);
    return folded(SHUFFLE(ab, cd, 0, 1, W, W + 1) + SHUFFLE(ab, cd, 2, 3, W + 2, W + 3));
}

INLINE float sum(vf x) {
    v4 y = folded(x);
    return (y[0] + y[1]) + (y[2] + y[3]);
}

/* Either where one is NaN. */
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

/* 2^x for x <= 0 or so, to 2e-7; 0 far below, NaN for NaN. */
INLINE vf power2(vf x) {
#if W == 16 && defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = choose(x < -150.0f, all(-150.0f), x); /* NaN stays */
    vf n = (x + 0x1.8p23f) - 0x1.8p23f; /* the nearest integer */
    vf f = x - n;
#endif
    vf y = all(0.00132764718f); /* minimax over [-1/2, 1/2] */
    y = y * f + 0.00967554133f;
    y = y * f + 0.0555071327f;
    y = y * f + 0.240221197f;
    y = y * f + 0.693146967f;
    y = y * f + 1.00000007f;
#if W == 16 && defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    vi exponent = __builtin_convertvector(n, vi) + 127;
    return y * (vf)((exponent & (exponent > 0)) << 23);
#endif
}

/* 6e-7 relative. */
INLINE vf hyperbolic_tangent(vf x) {
    vf e = power2(choose(x > 9.0f, all(9.0f), x) * (2 * LOG2E)); /* beyond 9 it is 1 */
    vf large = (e - 1.0f) / (e + 1.0f);
    vf z = x * x;
    vf small = x + x * z * (-1.0f / 3 + z * (2.0f / 15 + z * (-17.0f / 315 + z * (62.0f / 2835))));
    return choose((z < 0.0625f), small, large);
}

/* Dot products to logits, in units of log2 so that 2^x takes them as they are. */
INLINE vf logits(vf dots, float scale, float softcap) {
    if (softcap == 0) return dots * (scale * LOG2E);
    return hyperbolic_tangent(dots * (scale / softcap)) * (softcap * LOG2E);
}

#endif
