/* bfloat16 keys and values in AMX's tile registers, 16 rows and 16 or 32 tokens at a time.
 *
 * Products are exact and summed in float32. What bfloat16 does not hold is split into terms
 * that do, each multiplied by itself: queries of 24 bits into three, weights into two, which
 * leaves 2^-18 of a weight. Other elements go the AVX-512 way.
 *
 * A tile's steps: scores[token][row] = K Q^T with keys as they lie; weights, row by row of
 * scores; o += weights V, for which the weights are transposed and V is paired by token.
 * Compiled with the AVX-512 options, -mavx512bf16, -mamx-tile and -mamx-bf16. */
#define W 16
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tiles.h"
#include "cpu.h"
#include "levels.h"
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

static layout layout_of(const attend_call *call, int rows, char *memory) {
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

static int64_t amx_packed_bytes(const attend_call *call, int rows) {
    char nothing;
    return layout_of(call, rows, &nothing).bytes;
}

/* Few rows leave most of a register empty: memory is as slow for AVX-512. */
static int worthwhile(const attend_call *call, int rows) {
    return call->element == BFLOAT16 && rows > 8;
}

static int amx_tile_tokens(const attend_call *call, int rows) {
    if (!worthwhile(call, rows)) return level_avx512.tile_tokens(call, rows);
    return rows > LANES ? TILE : 64;
}

/* Rows of a register are pairs of dims, its columns are 16 query rows. */
static void pack_queries(part *p, const layout *y, int block) {
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

static void amx_start(part *p) {
    if (!worthwhile(p->call, p->rows)) return;
    layout y = layout_of(p->call, p->rows, p->packed);
    for (int block = 0; block * LANES < p->rows; block++) pack_queries(p, &y, block);
}

typedef struct {
    const char *from;
    int64_t stride;
} key_rows; /* 16 tokens */

/* Keys as they lie where 16 follow one another and their dims fill registers, else a copy. */
static key_rows find_keys(const part *p, const layout *y, const tile *t, int token) {
    const int bytes = p->call->key_dim * 2, padded = y->steps * 64;
    if (token + LANES <= t->tokens && t->run[token] >= LANES && bytes == padded)
        return (key_rows){t->key[token], p->call->key_token_bytes};
    char *copy = y->keys + token * padded;
    memset(copy, 0, (size_t)(LANES * padded));
    for (int i = 0; i < LANES && token + i < t->tokens; i++)
        memcpy(copy + i * padded, t->key[token + i], (size_t)bytes);
    return (key_rows){copy, padded};
}

#define FOUR(n, DO) { DO(0); if (n > 1) DO(1); if (n > 2) DO(2); if (n > 3) DO(3); }

/* scores[token][lane] for up to four times 16 tokens */
static void score(const layout *y, const key_rows *keys, int n, const char *queries, float *scores) {
    FOUR(n, _tile_zero)
    for (int step = 0; step < y->steps; step++) {
        for (int term = 0; term < y->terms; term++, queries += REGISTER_BYTES) {
            _tile_loadd(7, queries, 64);
#define MULTIPLY(j) \
    _tile_loadd(4, keys[j].from + 64 * step, keys[j].stride); \
    _tile_dpbf16ps(j, 4, 7);
            FOUR(n, MULTIPLY)
        }
    }
#define KEEP(j) _tile_stored(j, scores + j * LANES * LANES, 64)
    FOUR(n, KEEP)
}

/* The next tile's memory, a few lines now and then: see wide.h. */
typedef struct {
    const part *part;
    const tile *next;
    const char *from; /* the key or value at hand, */
    int at, bytes;    /* of which this far */
    int row, each;    /* keys, then values; lines at a time */
} ahead;

static void next_row(ahead *a) {
    const attend_call *call = a->part->call;
    int last = a->next->key[0] == a->next->value[0] ? TILE : 2 * TILE; /* MLA: the same memory */
    if (a->row == last) a->row = 0;
    int i = a->part->order[a->row % TILE];
    a->from = a->row < TILE ? a->next->key[i] : a->next->value[i];
    a->bytes = 2 * (a->row < TILE ? call->key_dim : call->value_dim);
    a->at = 0;
    a->row++;
}

static inline void touch_some(ahead *a) {
    for (int i = 0; i < a->each; i++) {
        touch(a->from + a->at);
        a->at += 64;
        if (a->at >= a->bytes) next_row(a);
    }
}

static ahead begin_ahead(const part *p, const layout *y, const tile *t, const tile *next) {
    int lines = t->tokens * (y->steps + (next->key[0] == next->value[0] ? 0 : (y->columns + 1) / 2));
    int blocks = rounded(p->rows, LANES) / LANES;
    int times = t->tokens / 2 + blocks * (t->tokens + t->tokens * y->columns / 32);
    ahead a = {.part = p, .next = next, .each = (lines + times - 1) / (times ? times : 1)};
    next_row(&a);
    return a;
}

/* Rows of a register are pairs of tokens, its columns are 16 dims. */
static void pack_values(const part *p, const layout *y, const tile *t, ahead *a) {
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const int dims = p->call->value_dim;
    for (int token = 0; token < rounded(t->tokens, 32); token += 2) {
        char *to = y->values + token / 32 * y->columns * REGISTER_BYTES + token % 32 / 2 * 64;
        for (int d = 0; d < dims; d += 32) {
            __mmask32 there = dims - d >= 32 ? 0xffffffffu : (1u << (dims - d)) - 1;
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (token < t->tokens) even = _mm512_maskz_loadu_epi16(there, t->value[token] + 2 * d);
            if (token + 1 < t->tokens)
                odd = _mm512_maskz_loadu_epi16(there, t->value[token + 1] + 2 * d);
            __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
            char *column = to + d / LANES * REGISTER_BYTES;
            _mm512_storeu_si512(column, _mm512_permutex2var_epi64(low, first, high));
            if (dims - d > LANES)
                _mm512_storeu_si512(column + REGISTER_BYTES,
                                    _mm512_permutex2var_epi64(low, second, high));
        }
        touch_some(a);
    }
}

static void rescale(part *p, int row, vf less) {
    for (int i = 0; i < LANES; i++) {
        if (less[i] == 1) continue;
        float *o = p->o + (int64_t)(row + i) * p->value_pad;
        for (int d = 0; d < p->value_pad; d += W) store(o + d, load(o + d) * less[i]);
    }
}

/* scores to weights, in the two terms and the order that the registers want. */
static void weigh(part *p, const layout *y, const tile *t, int row, ahead *a) {
    const int padded = rounded(t->tokens, 32);
    const int mixed = !rows_see_all(p, row, row + LANES < p->rows ? row + LANES : p->rows, t);
    float *s = p->s;
    vf before = load(p->m + row), most[2] = {before, before};
    for (int i = 0; i < t->tokens; i++) {
        if (i & 1) touch_some(a);
        vf x = logits(load(s + i * LANES), p->call->scale, p->call->softcap);
        if (mixed) x = choose(seen_by_rows(p, row, t, i), x, all(-INFINITY));
        store(s + i * LANES, x);
        most[i & 1] = larger(x, most[i & 1]);
    }
    for (int i = t->tokens; i < padded; i++) store(s + i * LANES, all(-INFINITY));

    vf m = larger(most[0], most[1]);
    vf shift = choose(m == -INFINITY, (vf){0}, m), l = {0};
    for (int i = 0; i < padded; i += 32) {
        __m512i high[16], low[16];
        for (int j = 0; j < 16; j++) {
            vf even = power2(load(s + (i + 2 * j) * LANES) - shift);
            vf odd = power2(load(s + (i + 2 * j + 1) * LANES) - shift);
            l += even + odd;
            touch_some(a);
            high[j] = paired(even, odd);
            low[j] = paired(even - even_of(high[j]), odd - odd_of(high[j]));
        }
        transpose(high, y->weights + i / 32 * 2 * REGISTER_BYTES);
        transpose(low, y->weights + i / 32 * 2 * REGISTER_BYTES + REGISTER_BYTES);
    }
    vf less = power2(before - shift);
    rescale(p, row, choose(m == -INFINITY, all(1), less));
    store(p->l + row, load(p->l + row) * choose(m == -INFINITY, all(1), less) + l);
    store(p->m + row, m);
}

/* o += weights V for up to four columns of 16 dims */
static void add_values(const part *p, const layout *y, const tile *t, int row, int column, int n,
                       ahead *a) {
    float *o = p->o + (int64_t)row * p->value_pad + column * LANES;
    const int stride = p->value_pad * 4;
#define FETCH(j) _tile_loadd(j, o + j * LANES, stride)
    FOUR(n, FETCH)
    for (int i = 0; i < rounded(t->tokens, 32) / 32; i++) {
        const char *values = y->values + (i * y->columns + column) * REGISTER_BYTES;
        _tile_loadd(4, y->weights + i * 2 * REGISTER_BYTES, 64);
        _tile_loadd(5, y->weights + i * 2 * REGISTER_BYTES + REGISTER_BYTES, 64);
#define ADD(j) \
    _tile_loadd(6, values + j * REGISTER_BYTES, 64); \
    _tile_dpbf16ps(j, 4, 6); \
    _tile_dpbf16ps(j, 5, 6); \
    touch_some(a);
        FOUR(n, ADD)
    }
#define PUT_BACK(j) _tile_stored(j, o + j * LANES, stride)
    FOUR(n, PUT_BACK)
}

static void take_block(part *p, const layout *y, const tile *t, int row, const key_rows *keys,
                       ahead *a) {
    const int groups = rounded(t->tokens, LANES) / LANES;
    const char *queries = y->queries + (int64_t)row / LANES * y->steps * y->terms * REGISTER_BYTES;
    for (int i = 0; i < groups; i += 4)
        score(y, keys + i, groups - i < 4 ? groups - i : 4, queries, p->s + i * LANES * LANES);
    weigh(p, y, t, row, a);
    for (int i = 0; i < y->columns; i += 4)
        add_values(p, y, t, row, i, y->columns - i < 4 ? y->columns - i : 4, a);
}

static void amx_take(part *p, const tile *t, const tile *next) {
    if (!worthwhile(p->call, p->rows)) {
        level_avx512.take(p, t, next);
        return;
    }
    if (!rows_see_all(p, 0, p->rows, t) && any_is_not_finite(p, t, BFLOAT16)) {
        take_carefully(p, t, next);
        return;
    }
    layout y = layout_of(p->call, p->rows, p->packed);
    key_rows keys[TILE / LANES];
    for (int i = 0; i < t->tokens; i += LANES) keys[i / LANES] = find_keys(p, &y, t, i);
    tiles_begin();
    ahead a = begin_ahead(p, &y, t, next);
    pack_values(p, &y, t, &a);
    for (int row = 0; row < p->rows; row += LANES) take_block(p, &y, t, row, keys, &a);
    _tile_release();
}

/* Linux gives tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
static int has(void) {
    return this_cpu().amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const level level_amx = {has, amx_tile_tokens, amx_packed_bytes, amx_start, amx_take};
