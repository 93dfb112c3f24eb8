#include "plan.h"

#include <stdlib.h>

#define STATE_BYTES (256 << 10) /* of a group's o: with a tile it stays in the second-level cache */
#define CHUNK_BYTES (256 << 10) /* of keys and values: some 20 us, which is how evenly threads end */

static int64_t ceiling(int64_t n, int64_t by) { return (n + by - 1) / by; }

static void keep_seen_pieces(plan *pl) {
    const attend_call *call = pl->call;
    int64_t lowest = INT64_MAX, end = INT64_MIN;
    for (int64_t r = 0; r < call->rows; r++) {
        lowest = least(lowest, call->lo[r]);
        end = most(end, call->hi[r]);
    }
    pl->before[0] = 0;
    for (int64_t i = 0; i < call->pieces; i++) {
        int64_t first = call->first[i], after = first + call->tokens[i];
        if (first >= end || (after <= lowest && first >= call->sinks)) continue;
        pl->piece[pl->pieces] = i;
        /* What lies behind all that is seen is not read: it may be being written. */
        pl->before[pl->pieces + 1] = pl->before[pl->pieces] + least(after, end) - first;
        pl->pieces++;
    }
}

static void divide(plan *pl) {
    const attend_call *call = pl->call;
    int64_t tokens = pl->before[pl->pieces];
    pl->per_kv = call->heads / call->kv_heads;
    int64_t folded = call->rows * pl->per_kv;
    int64_t fitting = most(LANES, STATE_BYTES / (4 * (int64_t)call->value_dim));
    /* Groups start at a row's first query head, so they hold whole rows. */
    int64_t rows = least(call->rows, most(1, fitting / pl->per_kv));
    pl->group_rows = (int32_t)(folded ? rows * pl->per_kv : 0);
    pl->groups_per_head = (int32_t)ceiling(call->rows, most(1, rows));
    pl->groups = (int64_t)pl->groups_per_head * call->kv_heads;
    pl->tile_tokens = pl->level->tile_tokens(call, pl->group_rows);

    int64_t token_bytes = (call->key_dim + call->value_dim) * element_bytes(call->element);
    pl->read_bytes = tokens * token_bytes * pl->groups;
    int64_t even = ceiling(tokens * pl->groups, most(1, pl->groups) * 4 * call->threads);
    int64_t chunk = least(most(1, CHUNK_BYTES / token_bytes), even);
    pl->chunk_tokens = most(1, ceiling(chunk, pl->tile_tokens)) * pl->tile_tokens;
    pl->chunks = ceiling(tokens, pl->chunk_tokens);
}

int plan_begin(plan *pl, const attend_call *call, const level *level) {
    *pl = (plan){.call = call, .level = level};
    pl->piece = malloc((size_t)(2 * call->pieces + 1) * sizeof *pl->piece);
    if (!pl->piece) return NO_MEMORY;
    pl->before = pl->piece + call->pieces;
    keep_seen_pieces(pl);
    divide(pl);
    return OK;
}

void plan_end(plan *pl) { free(pl->piece); }

void cursor_enter(cursor *at, int64_t item) {
    const plan *pl = at->plan;
    at->group = item / pl->chunks;
    at->token = item % pl->chunks * pl->chunk_tokens;
    at->end = least(at->token + pl->chunk_tokens, pl->before[pl->pieces]);
    int64_t low = 0, high = pl->pieces;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (pl->before[middle] <= at->token) low = middle;
        else high = middle;
    }
    at->index = low;
}

/* Tokens of one piece, from the cursor on. */
static void take_run(cursor *at, tile *t, int count) {
    const plan *pl = at->plan;
    const attend_call *call = pl->call;
    int64_t piece = pl->piece[at->index], from = at->token - pl->before[at->index];
    int64_t head = at->group / pl->groups_per_head;
    const char *key = (const char *)(intptr_t)(call->keys[piece] + call->offset);
    const char *value = (const char *)(intptr_t)(call->values[piece] + call->offset);
    int64_t first = call->first[piece] + from, key_step = call->key_token_bytes;
    int64_t value_step = call->value_token_bytes;
    const int at_token = t->tokens;
    key += head * call->key_head_bytes + from * key_step;
    value += head * call->value_head_bytes + from * value_step;
    /* One loop each: the compiler makes vectors of them. */
    for (int i = 0; i < count; i++) t->key[at_token + i] = key + i * key_step;
    for (int i = 0; i < count; i++) t->value[at_token + i] = value + i * value_step;
    for (int i = 0; i < count; i++) t->position[at_token + i] = first + i;
    for (int i = 0; i < count; i++) t->run[at_token + i] = count - i;
    t->lowest = least(t->lowest, first);
    t->highest = most(t->highest, first + count - 1);
    t->tokens += count;
    at->token += count;
}

int cursor_next(cursor *at, tile *t) {
    const plan *pl = at->plan;
    t->group = at->group;
    t->tokens = 0;
    t->lowest = INT64_MAX;
    t->highest = INT64_MIN;
    while (at->token < at->end && t->tokens < pl->tile_tokens) {
        int64_t left = least(pl->before[at->index + 1], at->end) - at->token;
        if (left == 0) {
            at->index++;
            continue;
        }
        take_run(at, t, (int)least(left, pl->tile_tokens - t->tokens));
    }
    for (int i = t->tokens; t->tokens && i < TILE; i++) { /* for who touches the whole tile */
        t->key[i] = t->key[t->tokens - 1];
        t->value[i] = t->value[t->tokens - 1];
    }
    return t->tokens > 0;
}
