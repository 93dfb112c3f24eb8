/* Sums of values by weights: SUM_ROWS rows and SUM_VECTORS vectors at a time, in registers. */
#ifndef KVFABRIC_VALUES_H
#define KVFABRIC_VALUES_H

#include "part.h"
#include "vectors.h"

#define MOST_ROWS 4 /* at a time */
#define LINE 64

/* Blocks of rows take turns in touching: block i at the steps where step & turns == i. */
INLINE int turns_of(int rows, int block_rows) {
    int blocks = (rows + block_rows - 1) / block_rows, turns = 1;
    while (turns * 2 <= blocks) turns *= 2;
    return turns - 1;
}

/* Vectors of values; bfloat16 by pairs, where their number is even. */
INLINE void widen_values(const char *from, vf *v, int vectors, int element) {
    if (element == BFLOAT16 && vectors % 2 == 0)
        for (int c = 0; c < vectors; c += 2) widen_pairs(from + c * W * 2, v + c, v + c + 1);
    else
        for (int c = 0; c < vectors; c++)
            v[c] = widen(from + c * W * element_bytes(element), element);
}

/* o[row] += sum of weights V, for some rows and the value dims from d on; `last`: that there are
 * fewer dims than W. A weight is at s[row * row_step + token * token_step]. */
INLINE void add_some(part *p, const tile *t, const tile *next, const float *s, int row_step,
                     int token_step, int row, int rows, int turns, int d, int vectors, int last,
                     int element) {
    const int size = element == FLOAT32 ? 4 : 2, bytes = vectors * W * size;
    const int pairs = element == BFLOAT16 && vectors % 2 == 0;
    float *o = p->o + (int64_t)row * p->value_pad + d;
    vf a[MOST_ROWS][SUM_VECTORS];
    for (int i = 0; i < rows; i++) {
        for (int c = 0; c < vectors; c++) a[i][c] = load(o + i * p->value_pad + c * W);
        for (int c = 0; pairs && c < vectors; c += 2) unzip(&a[i][c], &a[i][c + 1]);
    }
    for (int token = 0; token < t->tokens; token++) {
        if (d * size % LINE == 0 && (token & turns) == row / SUM_ROWS)
            for (int b = 0; b < bytes; b += LINE) touch(next->key[p->order[token]] + d * size + b);
        const char *value = t->value[token] + d * size;
        vf v[SUM_VECTORS];
        if (last) v[0] = widen_some(value, last, element);
        else widen_values(value, v, vectors, element);
        for (int i = 0; i < rows; i++) {
            float weight = s[(row + i) * row_step + token * token_step];
            for (int c = 0; c < vectors; c++) a[i][c] += weight * v[c];
        }
    }
    for (int i = 0; i < rows; i++) {
        for (int c = 0; pairs && c < vectors; c += 2) zip(&a[i][c], &a[i][c + 1]);
        for (int c = 0; c < vectors; c++) store(o + i * p->value_pad + c * W, a[i][c]);
    }
}

/* For all rows, so many value dims at a time: those stay near until the last row has had them. */
INLINE void add_to_all(part *p, const tile *t, const tile *next, int row_step, int token_step,
                       int d, int vectors, int last, int element) {
    const int turns = turns_of(p->rows, SUM_ROWS), full = p->rows / SUM_ROWS * SUM_ROWS;
#define ADD_TO(row, rows) \
    add_some(p, t, next, p->s, row_step, token_step, row, rows, turns, d, vectors, last, element)
    for (int row = 0; row < full; row += SUM_ROWS) ADD_TO(row, SUM_ROWS);
    switch (p->rows - full) {
    case 1: ADD_TO(full, 1); break;
    case 2: ADD_TO(full, 2); break;
    case 3: ADD_TO(full, 3); break;
    }
#undef ADD_TO
}

/* All of a tile. Touches the next tile's keys. */
INLINE void add_values(part *p, const tile *t, const tile *next, int row_step, int token_step,
                       int element) {
    const int dims = p->call->value_dim;
    int d = 0;
#define ADD(vectors, last) add_to_all(p, t, next, row_step, token_step, d, vectors, last, element)
    for (; d + SUM_VECTORS * W <= dims; d += SUM_VECTORS * W) ADD(SUM_VECTORS, 0);
    for (; d + 2 * W <= dims; d += 2 * W) ADD(2, 0);
    for (; d + W <= dims; d += W) ADD(1, 0);
    if (d < dims) ADD(1, dims - d);
#undef ADD
}

#endif
