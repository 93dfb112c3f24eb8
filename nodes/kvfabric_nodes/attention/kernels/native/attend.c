/* The entry: threads take items in turn, each merges its parts into the answer. */
#include "attend.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "levels.h"
#include "part_memory.h"

#define MOST_THREADS 256
#define THREAD_BYTES (1 << 20) /* to read, 70 us: for less, starting another takes as long */

typedef struct {
    const plan *plan;
    _Atomic int64_t next; /* item */
    pthread_mutex_t merging;
} job;

typedef struct {
    job *job;
    cursor at;
    part part;
    int64_t group; /* that the part is for; -1: none yet */
    tile tiles[2]; /* one is taken while the next is fetched */
} worker;

/* Whether there was another tile: of this item or of the next that nobody has taken. */
static int next_tile(worker *w, tile *t) {
    const plan *pl = w->job->plan;
    while (!cursor_next(&w->at, t)) {
        int64_t item = atomic_fetch_add(&w->job->next, 1);
        if (item >= pl->groups * pl->chunks) return 0;
        cursor_enter(&w->at, item);
    }
    return 1;
}

static void merge(worker *w) {
    pthread_mutex_lock(&w->job->merging);
    part_merge(&w->part);
    pthread_mutex_unlock(&w->job->merging);
}

static int some_row_sees_some(const part *p, const tile *t) {
    for (int row = 0; row < p->rows; row += p->per_kv)
        if (t->lowest < p->hi[row] && (t->highest >= p->lo[row] || t->lowest < p->call->sinks))
            return 1;
    return 0;
}

static void take(worker *w, const tile *t, const tile *next) {
    const plan *pl = w->job->plan;
    if (t->group != w->group) {
        if (w->group >= 0) merge(w);
        part_start(&w->part, pl, t->group);
        w->group = t->group;
    }
    if (some_row_sees_some(&w->part, t)) pl->level->take(&w->part, t, next);
}

static void *work(void *argument) {
    worker w;
    w.job = argument;
    w.at = (cursor){.plan = w.job->plan};
    w.group = -1;
    if (part_allocate(&w.part, w.job->plan) != OK) return 0; /* others may have more luck */
    int now = 0, more = next_tile(&w, &w.tiles[0]);
    while (more) {
        more = next_tile(&w, &w.tiles[1 - now]);
        take(&w, &w.tiles[now], &w.tiles[more ? 1 - now : now]);
        now = 1 - now;
    }
    if (w.group >= 0) merge(&w);
    part_free(&w.part);
    return 0;
}

/* This thread works too; threads that cannot be had are done without. */
static void work_together(job *j, int threads) {
    pthread_t others[MOST_THREADS];
    int started = 0;
    while (started < threads - 1 && pthread_create(&others[started], 0, work, j) == 0) started++;
    work(j);
    while (started > 0) pthread_join(others[--started], 0);
}

/* All of the exponent's bits: infinite, or no number. */
static int is_finite(const void *numbers, int64_t i, int element) {
    const uint32_t *wide = numbers;
    const uint16_t *narrow = numbers;
    if (element == FLOAT32) return (wide[i] & 0x7f800000) != 0x7f800000;
    uint16_t exponent = element == BFLOAT16 ? 0x7f80 : 0x7c00;
    return (narrow[i] & exponent) != exponent;
}

static int sees_any(const attend_call *call, int64_t row) {
    int64_t hi = call->hi[row], lo = call->lo[row];
    for (int64_t i = 0; i < call->pieces; i++) {
        int64_t first = call->first[i], end = first + call->tokens[i];
        if (first < least(end, hi) && (first < call->sinks || least(end, hi) > lo)) return 1;
    }
    return 0;
}

/* A query that is not all numbers has no answer: maxima pass over NaN, as if it saw nothing. */
static void spoil(const attend_call *call) {
    const int64_t heads = call->heads, dims = call->key_dim, values = call->value_dim;
    for (int64_t asked = 0; asked < call->rows * heads; asked++) {
        int64_t d = 0;
        while (d < dims && is_finite(call->q, asked * dims + d, call->q_element)) d++;
        if (d == dims || !sees_any(call, asked / heads)) continue;
        for (int64_t i = 0; i < values; i++) call->o[asked * values + i] = NAN;
        call->lse[asked] = NAN;
    }
}

static int useful_threads(const plan *pl) {
    int64_t useful = 1 + pl->read_bytes / THREAD_BYTES, threads = pl->call->threads;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    return (int)(threads < useful ? threads : useful);
}

int kvfabric_attend(const attend_call *call) {
    const level *level = find_level(call->level);
    if (!level) return NO_SUCH_LEVEL;
    int64_t answers = call->rows * call->heads;
    memset(call->o, 0, (size_t)(answers * call->value_dim) * sizeof(float));
    for (int64_t i = 0; i < answers; i++) call->lse[i] = -INFINITY;

    plan pl;
    if (plan_begin(&pl, call, level) != OK) return NO_MEMORY;
    job j = {.plan = &pl};
    pthread_mutex_init(&j.merging, 0);
    int64_t items = pl.groups * pl.chunks;
    if (items) work_together(&j, useful_threads(&pl));
    pthread_mutex_destroy(&j.merging);
    plan_end(&pl);
    spoil(call);
    return atomic_load(&j.next) < items ? NO_MEMORY : OK;
}
