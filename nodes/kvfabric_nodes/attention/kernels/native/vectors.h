/* Vectors of W floats in the compiler's own extension: the same source for every CPU. */
#ifndef KVFABRIC_VECTORS_H
#define KVFABRIC_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
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

/* 2 W bfloat16 in float32: those with even numbers, those with odd ones. Cheaper than in order. */
INLINE void widen_pairs(const char *from, vf *even, vf *odd) {
    vu pairs;
    memcpy(&pairs, from, sizeof pairs);
    *even = (vf)(pairs << 16);
    *odd = (vf)(pairs & 0xffff0000u);
}

#if W == 16
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(x, y) __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(x, y) __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif W == 8
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(x, y) __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15)
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(x, y) __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 2, 4, 6)
#define ODD(x, y) __builtin_shufflevector(x, y, 1, 3, 5, 7)
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 4, 1, 5)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 6, 3, 7)
#endif

/* 2 W numbers in order to those with even and with odd numbers, and back. */
INLINE void unzip(vf *a, vf *b) { vf x = *a, y = *b; *a = EVEN(x, y), *b = ODD(x, y); }
INLINE void zip(vf *a, vf *b) { vf x = *a, y = *b; *a = LOW(x, y), *b = HIGH(x, y); }

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

INLINE float largest(vf x) {
    for (int step = 1; step < W; step *= 2) {
        vf y;
        for (int i = 0; i < W; i++) y[i] = x[i ^ step];
        x = larger(x, y);
    }
    return x[0];
}

/* 2^x for x up to 127, to 2e-7; 0 below -127, NaN for NaN. */
INLINE vf power2(vf x) {
    const float magic = 0x1.8p23f + 127; /* rounds to integers, whose last bits are an exponent */
    x = choose(x < -127.0f, all(-127.0f), x);
    vf n = x + magic;
    vf f = x - (n - magic);
    vf y = all(0.00132764718f); /* minimax over [-1/2, 1/2] */
    y = y * f + 0.00967554133f;
    y = y * f + 0.0555071327f;
    y = y * f + 0.240221197f;
    y = y * f + 0.693146967f;
    y = y * f + 1.00000007f;
    return y * (vf)((vu)n << 23);
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
