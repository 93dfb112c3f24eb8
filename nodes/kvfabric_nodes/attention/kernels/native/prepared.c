#include "prepared.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "small.h"

#define SLOTS 4096 /* a power of 2: an id's lowest bits are its slot */

/* Whoever enters first says that it is busy, then looks whether the id is still that; whoever ends it
 * first clears the id, then looks whether it is busy. So one of them sees the other. */
typedef struct {
    _Atomic int64_t id; /* 0: nothing may begin here */
    _Atomic int busy;
    int taken;
    prepared what;
} slot;

struct table {
    pthread_mutex_t turn;
    _Atomic int waiting; /* for it: connections step back then, or they take it again and again */
    int64_t ids, next;
    _Atomic int64_t calls, rows, read_bytes, kernel_ns, busy;
    slot slots[SLOTS];
};

static slot *slot_of(table *t, int64_t id) { return &t->slots[id & (SLOTS - 1)]; }

void kvfabric_sizes(int64_t sizes[3]) {
    sizes[0] = sizeof(attend_call);
    sizes[1] = sizeof(prepared);
    sizes[2] = sizeof(prepared_counts);
}

table *kvfabric_table(void) {
    table *t = calloc(1, sizeof *t);
    if (t) pthread_mutex_init(&t->turn, 0);
    return t;
}

void kvfabric_table_free(table *t) {
    pthread_mutex_destroy(&t->turn);
    free(t);
}

int64_t kvfabric_prepare(table *t, const prepared *what) {
    for (int tries = 0; tries < SLOTS; tries++) {
        int64_t place = t->next++ & (SLOTS - 1);
        slot *s = &t->slots[place];
        if (s->taken) continue;
        s->taken = 1;
        s->what = *what;
        int64_t id = ++t->ids * SLOTS + place;
        atomic_store(&s->id, id);
        return id;
    }
    return 0;
}

int kvfabric_unprepare(table *t, int64_t id) {
    slot *s = slot_of(t, id);
    atomic_compare_exchange_strong(&s->id, &(int64_t){id}, 0);
    if (atomic_load(&s->busy)) return 1;
    s->taken = 0;
    return 0;
}

void kvfabric_fence(void) { atomic_thread_fence(memory_order_seq_cst); }

static int stands(const prepared *p) {
    return !p->board || __atomic_load_n(&p->board[p->layers], __ATOMIC_ACQUIRE) == p->cuts;
}

const prepared *table_enter(table *t, int64_t id, int64_t owner) {
    slot *s = slot_of(t, id);
    atomic_fetch_add(&s->busy, 1);
    if (id && atomic_load(&s->id) == id && s->what.owner == owner && s->what.until_ns > now_ns() &&
        stands(&s->what))
        return &s->what;
    atomic_fetch_sub(&s->busy, 1);
    return 0;
}

int table_leave(table *t, int64_t id) {
    slot *s = slot_of(t, id);
    atomic_thread_fence(memory_order_acquire); /* what it read, it read before this */
    int stood = atomic_load(&s->id) == id && stands(&s->what);
    atomic_fetch_sub(&s->busy, 1);
    return stood;
}

void kvfabric_turn_take(table *t) {
    atomic_fetch_add(&t->waiting, 1);
    pthread_mutex_lock(&t->turn);
    atomic_fetch_sub(&t->waiting, 1);
}

void kvfabric_turn_give(table *t) { pthread_mutex_unlock(&t->turn); }

int table_try_turn(table *t) {
    return !atomic_load(&t->waiting) && pthread_mutex_trylock(&t->turn) == 0;
}

void table_count(table *t, const prepared *what, int64_t read_bytes, int64_t ns) {
    atomic_fetch_add(&t->calls, 1);
    atomic_fetch_add(&t->rows, what->call.rows);
    atomic_fetch_add(&t->read_bytes, read_bytes);
    atomic_fetch_add(&t->kernel_ns, ns);
}

void table_count_busy(table *t) { atomic_fetch_add(&t->busy, 1); }

void kvfabric_counts(table *t, prepared_counts *counts) {
    *counts = (prepared_counts){atomic_load(&t->calls), atomic_load(&t->rows),
                                atomic_load(&t->read_bytes), atomic_load(&t->kernel_ns),
                                atomic_load(&t->busy)};
}
