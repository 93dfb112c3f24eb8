/* What one thread works with: tiles of tokens, and the part of the answer it has so far.
 *
 * A group is a range of query rows that belong to one KV head, folded: its row i is query
 * row `from + i / per_kv` and query head `head * per_kv + i % per_kv`. */
#ifndef KVFABRIC_PART_H
#define KVFABRIC_PART_H

#include "small.h"

#define TILE 128 /* tokens at most; a multiple of 32 */
#define LANES 16 /* rows and value dims are padded to this */

/* Tokens by their addresses, so that a tile may span pieces of any size. */
typedef struct {
    int64_t group;
    int32_t tokens;
    int32_t run[TILE]; /* tokens from here on that follow one another in one piece */
    const char *key[TILE], *value[TILE];
    int64_t position[TILE];
    int64_t lowest, highest; /* positions */
} tile;

typedef struct {
    const attend_call *call;
    int64_t head, from;      /* the group: its KV head, its first query row, */
    int32_t per_kv, rows;    /* query heads per KV head, folded rows */
    int32_t key_pad, value_pad; /* dims, rounded up */
    int64_t *lo, *hi;        /* [rows] */
    float *q;                /* [rows][key_pad], zeros beyond key_dim */
    float *m, *l;            /* [rows]: maximum (times log2 e) and sum of what was seen */
    float *o;                /* [rows padded][value_pad]: not normalised */
    float *s;                /* [rows padded][TILE]: logits, then weights */
    uint8_t order[TILE];     /* of a tile's tokens, to touch */
    void *packed;            /* the level's own */
    void *memory;            /* all of these arrays */
} part;

/* Takes a tile into the part. Memory is touched half a tile ahead: the tile's values while its keys
 * are taken, the next tile's keys (or any others, at the end) while its values are. */
typedef void take_tile(part *p, const tile *t, const tile *next);

typedef struct {
    int (*has)(void);
    int (*tile_tokens)(const attend_call *call, int rows); /* at most TILE */
    int64_t (*packed_bytes)(const attend_call *call, int rows);
    void (*start)(part *p); /* a new group: p->q is laid out */
    take_tile *take;
} level;

/* One row at a time, in plain C: where a row must not touch what it does not see. */
take_tile take_carefully;

static inline int row_sees(const part *p, int row, int64_t position) {
    return position < p->hi[row] && (position >= p->lo[row] || position < p->call->sinks);
}

/* Whether a row sees all of a tile. False is no promise that it does not. */
static inline int row_sees_all(const part *p, int row, const tile *t) {
    return t->highest < p->hi[row] && (t->lowest >= p->lo[row] || t->highest < p->call->sinks);
}

static inline int rounded(int n, int to) { return (n + to - 1) / to * to; }

#endif
