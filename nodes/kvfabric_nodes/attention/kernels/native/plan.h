/* How a call is divided: groups of rows of one KV head, times chunks of tokens, taken in turn. */
#ifndef KVFABRIC_PLAN_H
#define KVFABRIC_PLAN_H

#include "part.h"

typedef struct {
    const attend_call *call;
    const level *level;
    int64_t pieces;  /* that some row sees */
    int64_t *piece;  /* [pieces]: their numbers */
    int64_t *before; /* [pieces + 1]: tokens in the ones before */
    int32_t per_kv, group_rows, groups_per_head, tile_tokens;
    int64_t groups, chunk_tokens, chunks; /* chunks of each group */
    int64_t read_bytes;                   /* by all groups together */
} plan;

/* NO_MEMORY, or OK: then the caller ends it. */
int plan_begin(plan *pl, const attend_call *call, const level *level);
void plan_end(plan *pl);

/* Where a thread reads: inside an item, which is one chunk of one group. */
typedef struct {
    const plan *plan;
    int64_t group, token, end; /* tokens as counted by plan.before */
    int64_t index;             /* of the piece that the token is in */
} cursor;

void cursor_enter(cursor *at, int64_t item);

/* Fills in the next tile of the item; 0 at its end. */
int cursor_next(cursor *at, tile *t);

#endif
