/* A level in float32: elements are widened as they are loaded, products are fused.
 *
 * Dot products take 4 tokens and DOT_ROWS rows at a time: as many as the registers hold. As bytes
 * are taken, as many are touched, evenly: a CPU waits for few lines of memory at a time, so one
 * burst would stand still where a steady trickle costs nothing. Included once per vector width. */
#include "part.h"
#include "sight.h"
#include "values.h"
#include "vectors.h"

#define TILE_KEY_BYTES (32 << 10) /* they stay in the first-level cache */

static int wide_tile_tokens(const attend_call *call, int rows) {
    (void)rows;
    int tokens = TILE_KEY_BYTES / (call->key_dim * element_bytes(call->element)) / LANES * LANES;
    return tokens < LANES ? LANES : tokens > TILE ? TILE : tokens;
}

/* s[row][token] for 4 tokens: q.k */
INLINE void dots(const part *p, const char *const *key, const char *const *ahead, int row, int rows,
                 int turns, int token, int element) {
    const int dims = p->call->key_dim, size = element == FLOAT32 ? 4 : 2;
    const int pairs = element == BFLOAT16, step = pairs ? 2 * W : W;
    const float *q = (pairs ? (const float *)p->packed : p->q) + (int64_t)row * p->key_pad;
    vf a[MOST_ROWS][4] = {0};
    int d = 0;
    for (; d + step <= dims; d += step) {
        int line = d * size / LINE;
        if (d * size % LINE == 0 && (line & turns) == row / DOT_ROWS)
            for (int j = 0; j < 4; j++) touch(ahead[j] + d * size);
        vf k[4], odd[4];
        for (int j = 0; j < 4; j++)
            if (pairs) widen_pairs(key[j] + d * size, &k[j], &odd[j]);
            else k[j] = widen(key[j] + d * size, element);
        for (int i = 0; i < rows; i++) {
            vf x = load(q + i * p->key_pad + d);
            for (int j = 0; j < 4; j++) a[i][j] += x * k[j];
            if (!pairs) continue;
            x = load(q + i * p->key_pad + d + W);
            for (int j = 0; j < 4; j++) a[i][j] += x * odd[j];
        }
    }
    for (; d < dims; d += W)
        for (int j = 0; j < 4; j++) {
            vf k = dims - d >= W ? widen(key[j] + d * size, element)
                                 : widen_some(key[j] + d * size, dims - d, element);
            for (int i = 0; i < rows; i++) a[i][j] += load(q + i * p->key_pad + d) * k;
        }
    for (int i = 0; i < rows; i++) {
        v4 x = sums(a[i][0], a[i][1], a[i][2], a[i][3]);
        memcpy(p->s + (int64_t)(row + i) * TILE + token, &x, sizeof x);
    }
}

INLINE void all_dots(part *p, const tile *t, int element) {
    const int turns = turns_of(p->rows, DOT_ROWS), full = p->rows / DOT_ROWS * DOT_ROWS;
    for (int token = 0; token < t->tokens; token += 4) {
        const char *key[4], *ahead[4];
        for (int j = 0; j < 4; j++) {
            key[j] = t->key[token + j < t->tokens ? token + j : t->tokens - 1]; /* then ignored */
            ahead[j] = t->value[p->order[token + j]];
        }
        for (int row = 0; row < full; row += DOT_ROWS)
            dots(p, key, ahead, row, DOT_ROWS, turns, token, element);
        switch (p->rows - full) {
        case 1: dots(p, key, ahead, full, 1, turns, token, element); break;
        case 2: dots(p, key, ahead, full, 2, turns, token, element); break;
        case 3: dots(p, key, ahead, full, 3, turns, token, element); break;
        }
    }
}

/* s[row]: dot products to weights; m and l and o of the row follow. */
INLINE void weigh(part *p, const tile *t, int row) {
    const int padded = rounded(t->tokens, LANES);
    float *s = p->s + (int64_t)row * TILE;
    for (int i = t->tokens; i < padded; i++) s[i] = 0;
    for (int i = 0; i < padded; i += W)
        store(s + i, logits(load(s + i), p->call->scale, p->call->softcap));
    for (int i = t->tokens; i < padded; i++) s[i] = -INFINITY;
    if (!row_sees_all(p, row, t))
        for (int i = 0; i < padded; i += W)
            store(s + i, choose(seen_by_row(p, row, t, i), load(s + i), all(-INFINITY)));

    vf most = all(p->m[row]);
    for (int i = 0; i < padded; i += W) most = larger(load(s + i), most);
    const float m = largest(most);
    vf shift = all(m == -INFINITY ? 0 : m), l = {0};
    for (int i = 0; i < padded; i += W) {
        vf weight = power2(load(s + i) - shift);
        store(s + i, weight);
        l += weight;
    }
    if (m != p->m[row]) {
        float *o = p->o + (int64_t)row * p->value_pad;
        vf less = power2(all(p->m[row]) - shift);
        for (int d = 0; d < p->value_pad; d += W) store(o + d, load(o + d) * less);
        p->l[row] *= less[0];
        p->m[row] = m;
    }
    p->l[row] += sum(l);
}

INLINE void take(part *p, const tile *t, const tile *next, int element) {
    if (!rows_see_all(p, 0, p->rows, t) && any_is_not_finite(p, t, element)) {
        take_carefully(p, t, next);
        return;
    }
    all_dots(p, t, element);
    for (int row = 0; row < p->rows; row++) weigh(p, t, row);
    add_values(p, t, next, TILE, 1, element);
}

static void wide_take(part *p, const tile *t, const tile *next) {
    switch (p->call->element) {
    case FLOAT32: take(p, t, next, FLOAT32); break;
    case BFLOAT16: take(p, t, next, BFLOAT16); break;
    default: take(p, t, next, FLOAT16);
    }
}

static int64_t wide_packed_bytes(const attend_call *call, int rows) {
    return (int64_t)rows * rounded(call->key_dim, LANES) * 4;
}

/* Queries in the order in which widen_pairs gives keys. */
static void wide_start(part *p) {
    float *packed = p->packed;
    memcpy(packed, p->q, (size_t)((int64_t)p->rows * p->key_pad) * 4);
    for (int row = 0; row < p->rows; row++, packed += p->key_pad)
        for (int d = 0; d + 2 * W <= p->call->key_dim; d += 2 * W) {
            vf a = load(packed + d), b = load(packed + d + W);
            unzip(&a, &b);
            store(packed + d, a);
            store(packed + d + W, b);
        }
}
