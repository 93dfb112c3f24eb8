/* Scores of 16 rows in AMX's tile registers: K Q^T with keys as they lie, and their maxima.
 *
 * Products of bfloat16 are exact and summed in float32. What bfloat16 does not hold is split into
 * terms that do, each multiplied by itself: queries of 24 bits into three. */
#ifndef KVFABRIC_AMX_SCORES_H
#define KVFABRIC_AMX_SCORES_H

#include "amx_tiles.h"
#include "part.h"
#include "sight.h"
#include "vectors.h"

typedef struct {
    int terms, steps;   /* of a query; 32 dims of a key each */
    int columns;        /* 16 dims of a value each */
    char *queries;      /* registers [rows / 16][steps][terms] */
    char *values;       /* registers [tokens / 32][columns] */
    char *weights;      /* registers [tokens / 32][2]: terms */
    char *keys;         /* [TILE][steps * 32]: where they cannot be used as they lie */
    int64_t bytes;
} layout;

INLINE layout layout_of(const attend_call *call, int rows, char *memory) {
    layout y;
    y.terms = call->q_element == BFLOAT16 ? 1 : call->q_element == FLOAT16 ? 2 : 3;
    y.steps = rounded(call->key_dim, TILE_PAIRS) / TILE_PAIRS;
    y.columns = rounded(call->value_dim, LANES) / LANES;
    y.queries = memory;
    y.values = y.queries + (int64_t)rounded(rows, LANES) / LANES * y.steps * y.terms * REGISTER_BYTES;
    y.weights = y.values + TILE / 32 * y.columns * REGISTER_BYTES;
    y.keys = y.weights + TILE / 32 * 2 * REGISTER_BYTES;
    y.bytes = y.keys + TILE * y.steps * 64 - memory;
    return y;
}

/* Rows of a register are pairs of dims, its columns are 16 query rows. */
static inline void pack_queries(part *p, const layout *y, int block) {
    for (int step = 0; step < y->steps; step++) {
        char *to = y->queries + ((int64_t)block * y->steps + step) * y->terms * REGISTER_BYTES;
        for (int pair = 0; pair < 16; pair++) {
            int d = step * TILE_PAIRS + 2 * pair;
            float even[LANES] = {0}, odd[LANES] = {0};
            for (int i = 0; i < LANES && d < p->key_pad; i++) {
                const float *q = p->q + (int64_t)(block * LANES + i) * p->key_pad + d;
                even[i] = q[0], odd[i] = q[1];
            }
            __m512 a = load(even), b = load(odd);
            for (int term = 0; term < y->terms; term++) {
                __m512i rounded_off = paired(a, b);
                _mm512_storeu_si512(to + term * REGISTER_BYTES + pair * 64, rounded_off);
                a -= even_of(rounded_off), b -= odd_of(rounded_off);
            }
        }
    }
}

typedef struct {
    const char *from;
    int64_t stride;
} key_rows; /* 16 tokens */

/* Keys as they lie where 16 follow one another and their dims fill registers, else a copy. */
static inline key_rows find_keys(const part *p, const layout *y, const tile *t, int token) {
    const int bytes = p->call->key_dim * 2, padded = y->steps * 64;
    if (token + LANES <= t->tokens && t->run[token] >= LANES && bytes == padded)
        return (key_rows){t->key[token], p->call->key_token_bytes};
    char *copy = y->keys + token * padded;
    memset(copy, 0, (size_t)(LANES * padded));
    for (int i = 0; i < LANES && token + i < t->tokens; i++)
        memcpy(copy + i * padded, t->key[token + i], (size_t)bytes);
    return (key_rows){copy, padded};
}

/* DO(0) .. DO(n - 1): registers are named in the instruction. */
#define FOUR(n, DO) { DO(0); if (n > 1) DO(1); if (n > 2) DO(2); if (n > 3) DO(3); }

/* A line of the values of every other of 16 tokens. */
INLINE void touch_every_other(const part *p, const tile *t, int token, int at) {
    for (int i = 0; i < LANES; i += 2) touch(t->value[p->order[token + i]] + at);
}

/* scores[token][lane] for up to four times 16 tokens */
INLINE void score(const layout *y, const key_rows *keys, int n, const char *queries, float *scores,
                  const part *p, const tile *touched, int token) {
    FOUR(n, _tile_zero)
    for (int step = 0; step < y->steps; step++) {
        for (int term = 0; term < y->terms; term++, queries += REGISTER_BYTES) {
            _tile_loadd(7, queries, 64);
#define MULTIPLY(j) \
    _tile_loadd(4, keys[j].from + 64 * step, keys[j].stride); \
    _tile_dpbf16ps(j, 4, 7); \
    if (touched) touch_every_other(p, touched, token + j * LANES, 64 * step);
            FOUR(n, MULTIPLY)
        }
    }
#define KEEP(j) _tile_stored(j, scores + j * LANES * LANES, 64)
    FOUR(n, KEEP)
}

/* p->s[token][lane] for the 16 rows from `row` on; half of `touched`'s values on the way. */
INLINE void score_tile(const part *p, const layout *y, const tile *t, const tile *touched,
                       const key_rows *keys, int row) {
    const int groups = rounded(t->tokens, LANES) / LANES;
    const char *queries = y->queries + (int64_t)row / LANES * y->steps * y->terms * REGISTER_BYTES;
    for (int i = 0; i < groups; i += 4)
        score(y, keys + i, groups - i < 4 ? groups - i : 4, queries, p->s + i * LANES * LANES, p,
              touched, i * LANES);
}

typedef struct {
    vf before, now; /* the rows' maxima; */
    float factor;   /* what is left in p->s, times this, is logits */
} maxima;

/* The logits of a token; -infinity where a row does not see it. */
INLINE vf logits_of(const part *p, const tile *t, int row, int token, int mixed) {
    float *s = p->s + token * LANES;
    vf x = logits(load(s), p->call->scale, p->call->softcap);
    if (mixed) x = choose(seen_by_rows(p, row, t, token), x, all(-INFINITY));
    store(s, x);
    return x;
}

/* The maxima with those of the tile; what a row does not see is taken out. */
INLINE maxima look_over(const part *p, const tile *t, int row) {
    const int last = row + LANES < p->rows ? row + LANES : p->rows, n = t->tokens;
    const int mixed = !rows_see_all(p, row, last, t);
    const int as_they_are = !mixed && p->call->softcap == 0 && p->call->scale > 0;
    const float factor = as_they_are ? p->call->scale * LOG2E : 1;
    vf even = all(-INFINITY), odd = even; /* two chains take half the time */
    if (as_they_are) {
        for (int i = 0; i < n - 1; i += 2) {
            even = larger(load(p->s + i * LANES), even);
            odd = larger(load(p->s + (i + 1) * LANES), odd);
        }
        if (n % 2) even = larger(load(p->s + (n - 1) * LANES), even);
    } else
        for (int i = 0; i < n; i++) even = larger(logits_of(p, t, row, i, mixed), even);
    for (int i = n; i < rounded(n, 32); i++) store(p->s + i * LANES, all(-INFINITY));
    vf before = load(p->m + row);
    return (maxima){before, larger(larger(even, odd) * factor, before), factor};
}

/* What weights are 2 to the power of less; 0 where nothing was seen yet. */
INLINE vf shift_of(maxima m) { return choose(m.now == -INFINITY, (vf){0}, m.now); }

/* o, l and m of 16 rows, before and after what is added: `added` to l. */
INLINE void settle(part *p, int row, maxima m, vf added) {
    vf less = choose(m.now == -INFINITY, all(1), power2(m.before - shift_of(m)));
    store(p->l + row, load(p->l + row) * less + added);
    store(p->m + row, m.now);
    for (int i = 0; i < LANES; i++) {
        if (less[i] == 1) continue;
        float *o = p->o + (int64_t)(row + i) * p->value_pad;
        for (int d = 0; d < p->value_pad; d += W) store(o + d, load(o + d) * less[i]);
    }
}

#endif
