/* One row and one token at a time: values that are not finite reach the rows that see them only. */
#include <math.h>

#define W 4
#include "part.h"
#include "vectors.h"

static float element_at(const char *from, int i, int element) {
    return widen_some(from + (int64_t)i * element_bytes(element), 1, element)[0];
}

static void see(part *p, int row, const char *key, const char *value) {
    const attend_call *call = p->call;
    float dot = 0, *o = p->o + (int64_t)row * p->value_pad;
    for (int d = 0; d < call->key_dim; d++)
        dot += p->q[(int64_t)row * p->key_pad + d] * element_at(key, d, call->element);
    float s = logits(all(dot), call->scale, call->softcap)[0];
    float m = p->m[row] > s || isnan(p->m[row]) ? p->m[row] : s;
    float shift = m == -INFINITY ? 0 : m;
    float less = exp2f(p->m[row] - shift), weight = exp2f(s - shift);
    for (int d = 0; d < call->value_dim; d++)
        o[d] = o[d] * less + weight * element_at(value, d, call->element);
    p->l[row] = p->l[row] * less + weight;
    p->m[row] = m;
}

void take_carefully(part *p, const tile *t, const tile *next) {
    (void)next;
    for (int row = 0; row < p->rows; row++)
        for (int i = 0; i < t->tokens; i++)
            if (row_sees(p, row, t->position[i])) see(p, row, t->key[i], t->value[i]);
}
