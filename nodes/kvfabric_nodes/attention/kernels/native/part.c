/* A part of the answer: laying out its rows, and merging it into what others have found. */
#include "part_memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STREAMS 8
#define W 4
#include "vectors.h"

static void *line_up(char **from, int64_t bytes) {
    char *here = *from;
    *from = here + (bytes + 63) / 64 * 64;
    return here;
}

/* STREAMS tokens at a time, from as many ends of the tile: the CPU looks ahead within a page of
 * memory only, so that reading several pages at once hides the wait at the start of each. Measured
 * for keys of 16 and 32 KiB: 8 are as good as the plain read limit, 1, 4 and 16 a sixth slower. */
static void order_touches(part *p, int tile_tokens) {
    for (int i = 0; i < TILE; i++)
        p->order[i] = (uint8_t)(i % STREAMS * (tile_tokens / STREAMS) + i / STREAMS);
}

int part_allocate(part *p, const plan *pl) {
    const attend_call *call = pl->call;
    int64_t rows = rounded(pl->group_rows, LANES);
    *p = (part){.call = call, .per_kv = pl->per_kv};
    p->key_pad = rounded(call->key_dim, LANES);
    p->value_pad = rounded(call->value_dim, LANES);
    int64_t packed = pl->level->packed_bytes(call, pl->group_rows);
    int64_t row_bytes = 2 * 8 + 2 * 4 + 4 * (int64_t)(p->key_pad + p->value_pad + TILE);
    p->memory = aligned_alloc(64, (size_t)((rows * row_bytes + packed + 64 * 16) / 64 * 64));
    if (!p->memory) return NO_MEMORY;
    char *from = p->memory;
    p->lo = line_up(&from, rows * 8);
    p->hi = line_up(&from, rows * 8);
    p->m = line_up(&from, rows * 4);
    p->l = line_up(&from, rows * 4);
    p->q = line_up(&from, rows * p->key_pad * 4);
    p->o = line_up(&from, rows * p->value_pad * 4);
    p->s = line_up(&from, rows * TILE * 4);
    p->packed = from;
    order_touches(p, pl->tile_tokens);
    return OK;
}

void part_free(part *p) { free(p->memory); }

/* The query row and query head of a folded row, as an index into [rows, heads]. */
static int64_t asked_by(const part *p, int row) {
    return (p->from + row / p->per_kv) * p->call->heads + p->head * p->per_kv + row % p->per_kv;
}

static void load_row(part *p, int row) {
    const attend_call *call = p->call;
    const int size = element_bytes(call->q_element);
    const char *from = (const char *)call->q + asked_by(p, row) * call->key_dim * size;
    float *q = p->q + (int64_t)row * p->key_pad;
    for (int d = 0; d < p->key_pad; d += W) {
        int left = call->key_dim - d;
        store(q + d, left >= W  ? widen(from + d * size, call->q_element)
                     : left > 0 ? widen_some(from + d * size, left, call->q_element)
                                : (vf){0});
    }
    p->lo[row] = call->lo[p->from + row / p->per_kv];
    p->hi[row] = call->hi[p->from + row / p->per_kv];
    p->m[row] = -INFINITY;
}

void part_start(part *p, const plan *pl, int64_t group) {
    p->head = group / pl->groups_per_head;
    p->from = group % pl->groups_per_head * (pl->group_rows / pl->per_kv);
    int64_t left = (p->call->rows - p->from) * pl->per_kv;
    p->rows = (int32_t)(left < pl->group_rows ? left : pl->group_rows);
    int64_t padded = rounded(p->rows, LANES);
    memset(p->q, 0, (size_t)(padded * p->key_pad) * 4);
    memset(p->o, 0, (size_t)(padded * p->value_pad) * 4);
    memset(p->l, 0, (size_t)padded * 4);
    memset(p->lo, 0, (size_t)padded * 8);
    memset(p->hi, 0, (size_t)padded * 8);
    for (int row = 0; row < padded; row++) p->m[row] = -INFINITY;
    for (int row = 0; row < p->rows; row++) load_row(p, row);
    pl->level->start(p);
}

/* lse = log(exp(a) + exp(b)); the o of each counts by its share. */
static void merge_row(part *p, int row) {
    if (p->m[row] == -INFINITY) return; /* saw nothing */
    const int64_t at = asked_by(p, row);
    const int dims = p->call->value_dim;
    float *o = p->call->o + at * dims, *lse = p->call->lse + at;
    const float *mine = p->o + (int64_t)row * p->value_pad;
    double here = (p->m[row] + log2((double)p->l[row])) * 0.69314718055994530942;
    double both = *lse == -INFINITY ? here : fmax(here, *lse) + log1p(exp(-fabs(here - *lse)));
    if (isnan(here) || isnan(*lse)) both = NAN;
    float theirs = (float)exp(*lse - both), ours = (float)(exp(here - both) / (double)p->l[row]);
    for (int d = 0; d < dims; d++) o[d] = o[d] * theirs + mine[d] * ours;
    *lse = (float)both;
}

void part_merge(part *p) {
    for (int row = 0; row < p->rows; row++) merge_row(p, row);
}
