/* Queries that were prepared to be asked again: all of a call but its vectors, its layer, and how far
 * it sees. A table has them by number; connections compute them, and Python, which owns the memory
 * that they name, ends them. */
#ifndef KVFABRIC_PREPARED_H
#define KVFABRIC_PREPARED_H

#include "attend.h"

typedef struct {
    attend_call call; /* its offset, q, lo, hi, o and lse are the connection's */
    int64_t owner;    /* whose connections may ask for it */
    int64_t until_ns; /* of the monotonic clock */
    int64_t layers, layer_bytes;
    int64_t window;       /* a row sees so many tokens back; 0: all */
    int64_t end;          /* what it asks for lies in the pieces, up to this position */
    const int64_t *board; /* [layers]: how far each is written; [layers]: how often it was cut */
    int64_t cuts;         /* when this was prepared */
} prepared;

/* What was computed since the table was made. */
typedef struct {
    int64_t calls, rows, read_bytes, kernel_ns, busy;
} prepared_counts;

typedef struct table table;

/* Of attend_call, prepared and prepared_counts: callers with other ones must not call anything. */
PUBLIC void kvfabric_sizes(int64_t sizes[3]);

PUBLIC table *kvfabric_table(void); /* 0: no memory */
PUBLIC void kvfabric_table_free(table *t);

/* The number of a new one, never 0 and never the same again; 0: the table is full. */
PUBLIC int64_t kvfabric_prepare(table *t, const prepared *what);

/* Nobody begins to compute it any more. Whether somebody still does: then ask again, until its memory
 * may go and its place is free. */
PUBLIC int kvfabric_unprepare(table *t, int64_t id);

/* Between bytes and what a board tells of them. */
PUBLIC void kvfabric_fence(void);

PUBLIC void kvfabric_counts(table *t, prepared_counts *counts);

/* One computes at a time: these are for who computes beside the connections. */
PUBLIC void kvfabric_turn_take(table *t);
PUBLIC void kvfabric_turn_give(table *t);

/* Serves a connection until it ends, or does not speak the protocol (see proto/README.md), or takes
 * longer than `record_ns` to send the rest of a record or to fetch an answer. */
PUBLIC int kvfabric_serve(table *t, int socket, int64_t owner, int64_t record_ns);

/* For the connections: 0, or what they may compute until they leave it. */
const prepared *table_enter(table *t, int64_t id, int64_t owner);
/* Whether what it read meanwhile stood as it was. */
int table_leave(table *t, int64_t id);
int table_try_turn(table *t); /* whether it is theirs */
void table_count(table *t, const prepared *what, int64_t read_bytes, int64_t ns);
void table_count_busy(table *t);

#endif
