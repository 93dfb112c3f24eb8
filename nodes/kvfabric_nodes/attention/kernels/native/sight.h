/* Which rows see which tokens, many at a time; and whether it matters to the values. */
#ifndef KVFABRIC_SIGHT_H
#define KVFABRIC_SIGHT_H

#include "part.h"
#include "vectors.h"

INLINE vi narrow(vl mask) { return __builtin_convertvector(mask, vi); }

/* W tokens from `token` on, for a row. */
INLINE vi seen_by_row(const part *p, int row, const tile *t, int token) {
    vl position;
    memcpy(&position, t->position + token, sizeof position);
    return narrow((position < p->hi[row]) &
                  ((position >= p->lo[row]) | (position < p->call->sinks)));
}

/* A token, for W rows from `row` on. */
INLINE vi seen_by_rows(const part *p, int row, const tile *t, int token) {
    vl lo, hi, position = t->position[token] - (vl){0};
    memcpy(&lo, p->lo + row, sizeof lo);
    memcpy(&hi, p->hi + row, sizeof hi);
    return narrow((position < hi) & ((position >= lo) | (position < p->call->sinks)));
}

INLINE int rows_see_all(const part *p, int from, int to, const tile *t) {
    for (int row = from; row < to; row++)
        if (!row_sees_all(p, row, t)) return 0;
    return 1;
}

/* A weight of zero does not keep such a value away from a row. */
INLINE int any_is_not_finite(const part *p, const tile *t, int element) {
    const int dims = p->call->value_dim, size = element_bytes(element);
    vf zero = {0}; /* x * 0 is NaN for infinities too */
    for (int i = 0; i < t->tokens; i++) {
        int d = 0;
        for (; d + W <= dims; d += W) zero += widen(t->value[i] + d * size, element) * 0.0f;
        if (d < dims) zero += widen_some(t->value[i] + d * size, dims - d, element) * 0.0f;
    }
    return sum(zero) != 0;
}

#endif
