/* bfloat16 keys and values in AMX's tile registers; other elements go the AVX-512 way.
 *
 * Per tile and 16 rows: scores; weights, of which bfloat16 holds two terms, which leaves 2^-18 of
 * them; o += weights V, for which the weights are transposed and V is paired by token. Compiled
 * with the AVX-512 options, -mavx512bf16, -mamx-tile and -mamx-bf16. */
#define W 16
#define SUM_ROWS 4
#define SUM_VECTORS 4
#define FEW 8 /* rows */
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_scores.h"
#include "cpu.h"
#include "levels.h"
#include "values.h"

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
    int tokens = a->next->tokens;
    int last = a->next->key[0] == a->next->value[0] ? tokens : 2 * tokens; /* MLA: the same memory */
    if (a->row == last) a->row = 0;
    int i = a->row % tokens;
    a->from = a->row < tokens ? a->next->key[i] : a->next->value[i];
    a->bytes = 2 * (a->row < tokens ? call->key_dim : call->value_dim);
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
    int times = t->tokens / 2 + blocks * (t->tokens / 2 + t->tokens * y->columns / 32);
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

/* scores to weights, in the two terms and the order that the registers want. */
static void weigh(part *p, const layout *y, const tile *t, int row, ahead *a) {
    maxima m = look_over(p, t, row);
    const vf shift = shift_of(m);
    vf l = {0};
    for (int i = 0; i < t->tokens; i += 32) {
        __m512i high[16], low[16];
        for (int j = 0; j < 16; j++) {
            const float *s = p->s + (i + 2 * j) * LANES;
            vf even = power2(load(s) * m.factor - shift);
            vf odd = power2(load(s + LANES) * m.factor - shift);
            l += even + odd;
            high[j] = paired(even, odd);
            low[j] = paired(even - even_of(high[j]), odd - odd_of(high[j]));
            touch_some(a);
        }
        char *weights = y->weights + i / 32 * 2 * REGISTER_BYTES;
        transpose(high, weights);
        transpose(low, weights + REGISTER_BYTES);
    }
    settle(p, row, m, l);
}

/* o += weights V for up to four columns of 16 dims */
static void add_columns(const part *p, const layout *y, const tile *t, int row, int column, int n,
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
    score_tile(p, y, t, 0, keys, row);
    weigh(p, y, t, row, a);
    for (int i = 0; i < y->columns; i += 4)
        add_columns(p, y, t, row, i, y->columns - i < 4 ? y->columns - i : 4, a);
}

/* Few rows: their weights stay as they are, and sums of values go the AVX-512 way. */
static void weigh_few(part *p, const tile *t) {
    maxima m = look_over(p, t, 0);
    const int bytes = p->call->value_dim * 2;
    const vf shift = shift_of(m);
    vf l = {0};
    for (int i = 0; i < t->tokens; i++) {
        vf weight = power2(load(p->s + i * LANES) * m.factor - shift);
        store(p->s + i * LANES, weight);
        l += weight;
        if (i % 2)
            for (int b = 0; b < bytes; b += 64) touch(t->value[p->order[i]] + b);
    }
    settle(p, 0, m, l);
}

/* Four rows and fewer leave so much of a register empty that AVX-512 is as fast. */
static int worthwhile(const attend_call *call, int rows) {
    return call->element == BFLOAT16 && rows > 4;
}

/* With many rows whatever a tile needs should stay in the first-level cache. */
static int amx_tile_tokens(const attend_call *call, int rows) {
    if (!worthwhile(call, rows)) return level_avx512.tile_tokens(call, rows);
    return rows > FEW && call->key_dim <= 64 ? TILE / 2 : TILE;
}

static int64_t amx_packed_bytes(const attend_call *call, int rows) {
    char nothing;
    int64_t here = layout_of(call, rows, &nothing).bytes;
    int64_t there = level_avx512.packed_bytes(call, rows);
    return here > there ? here : there;
}

static void amx_start(part *p) {
    if (!worthwhile(p->call, p->rows)) {
        level_avx512.start(p);
        return;
    }
    layout y = layout_of(p->call, p->rows, p->packed);
    for (int block = 0; block * LANES < p->rows; block++) pack_queries(p, &y, block);
}

static void take_few(part *p, const layout *y, const tile *t, const tile *next,
                     const key_rows *keys) {
    tiles_begin();
    score_tile(p, y, t, t, keys, 0);
    _tile_release();
    weigh_few(p, t);
    add_values(p, t, next, 1, LANES, BFLOAT16);
}

static void take_many(part *p, const layout *y, const tile *t, const tile *next,
                      const key_rows *keys) {
    ahead a = begin_ahead(p, y, t, next);
    tiles_begin();
    pack_values(p, y, t, &a);
    for (int row = 0; row < p->rows; row += LANES) take_block(p, y, t, row, keys, &a);
    _tile_release();
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
    if (p->rows <= FEW) take_few(p, &y, t, next, keys);
    else take_many(p, &y, t, next, keys);
}

/* Linux gives tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
static int has(void) {
    return this_cpu().amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const level level_amx = {has, amx_tile_tokens, amx_packed_bytes, amx_start, amx_take};
