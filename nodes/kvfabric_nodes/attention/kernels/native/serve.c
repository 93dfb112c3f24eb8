/* A connection of prepared queries: a record and vectors in, a record with o and lse out. No step of it
 * needs Python, whose code lies in no cache any more when a kernel has swept them. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "prepared.h"
#include "small.h"

#define MOST_VECTORS (512 << 10) /* bytes, as of an Attend */
#define MOST_OUTPUTS (960 << 10)
#define MOST_ROWS (MOST_VECTORS / 2)
#define HEAD 64 /* the answer's record ends here, so that o is aligned */

enum verdict { DONE, BUSY, GONE };

typedef struct {
    int64_t id, visible;
    uint32_t layer, bytes; /* of the vectors that follow */
} request;

typedef struct {
    uint32_t verdict, bytes; /* of o and lse that follow */
    int64_t tokens, read_bytes, kernel_ns;
} answer;

typedef struct {
    table *table;
    int socket;
    int64_t owner, record_ns; /* for a record to come, and for its answer to be fetched */
    char *vectors, *out; /* HEAD bytes, then o and lse */
    int64_t *lo, *hi;
} connection;

static int may_be_written(int socket, int ms) {
    struct pollfd one = {.fd = socket, .events = POLLOUT};
    int n;
    while ((n = poll(&one, 1, ms)) < 0 && errno == EINTR) {}
    return n > 0;
}

/* Whether all of it came in time. A single call ends by the socket's own time limit. */
static int receive(int socket, void *place, size_t bytes, int64_t until_ns) {
    char *at = place;
    while (bytes) {
        ssize_t n = recv(socket, at, bytes, MSG_WAITALL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return 0;
        at += n, bytes -= (size_t)n;
        if (bytes && now_ns() > until_ns) return 0;
    }
    return 1;
}

/* Whether all of it went in time. */
static int send_all(int socket, const char *at, size_t bytes, int64_t until_ns) {
    while (bytes) {
        ssize_t n = send(socket, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            at += n, bytes -= (size_t)n;
            continue;
        }
        int64_t left_ms = (until_ns - now_ns()) / 1000000;
        if (errno == EINTR) continue;
        if (errno != EAGAIN || left_ms <= 0 || !may_be_written(socket, (int)left_ms)) return 0;
    }
    return 1;
}

/* As masks.py has it for rows without positions: they stand right behind all that they see. */
static void look(const connection *c, const prepared *p, int64_t visible) {
    int64_t lo = p->window ? most(0, visible - p->window + 1) : 0;
    for (int64_t r = 0; r < p->call.rows; r++) c->lo[r] = lo, c->hi[r] = visible;
}

/* Tokens of the pieces that rows see which see all the same. */
static int64_t seen_tokens(const attend_call *call, int64_t lo, int64_t hi) {
    int64_t sinks = least(call->sinks, least(lo, hi)), tokens = 0;
    for (int64_t i = 0; i < call->pieces; i++) {
        int64_t first = call->first[i], end = first + call->tokens[i];
        tokens += most(0, least(end, hi) - most(first, lo)) + most(0, least(end, sinks) - first);
    }
    return tokens;
}

static int is_askable(const prepared *p, const request *r) {
    const attend_call *call = &p->call;
    return r->layer < p->layers && r->visible >= 0 && r->visible <= p->end &&
           r->bytes == call->rows * call->heads * call->key_dim * element_bytes(call->q_element) &&
           (!p->board || r->visible <= __atomic_load_n(&p->board[r->layer], __ATOMIC_ACQUIRE));
}

static int compute(const connection *c, const prepared *p, const request *r, answer *a) {
    if (!is_askable(p, r)) return GONE;
    if (!table_try_turn(c->table)) return BUSY;
    attend_call call = p->call;
    int64_t o_bytes = call.rows * call.heads * call.value_dim * 4;
    look(c, p, r->visible);
    call.offset = r->layer * p->layer_bytes;
    call.q = c->vectors;
    call.lo = c->lo, call.hi = c->hi;
    call.o = (float *)(c->out + HEAD);
    call.lse = (float *)(c->out + HEAD + o_bytes);
    int64_t began_ns = now_ns();
    int status = kvfabric_attend(&call);
    a->kernel_ns = now_ns() - began_ns;
    kvfabric_turn_give(c->table);
    if (status != OK) return BUSY; /* no memory: another way has its own errors */
    int64_t token = call.key_dim + (call.values == call.keys ? 0 : call.value_dim);
    a->bytes = (uint32_t)(o_bytes + call.rows * call.heads * 4);
    a->tokens = seen_tokens(&call, c->lo[0], c->hi[0]);
    a->read_bytes = a->tokens * call.kv_heads * token * element_bytes(call.element);
    table_count(c->table, p, a->read_bytes, a->kernel_ns);
    return DONE;
}

static answer answer_to(const connection *c, const request *r) {
    answer a = {0};
    const prepared *p = table_enter(c->table, r->id, c->owner);
    a.verdict = GONE;
    if (p) {
        a.verdict = (uint32_t)compute(c, p, r, &a);
        if (!table_leave(c->table, r->id)) a.verdict = GONE;
    }
    if (a.verdict == BUSY) table_count_busy(c->table);
    if (a.verdict != DONE) a = (answer){.verdict = a.verdict};
    return a;
}

/* The next record without its vectors, however long that takes to begin. */
static int receive_request(const connection *c, request *r) {
    ssize_t n;
    do n = recv(c->socket, r, sizeof *r, MSG_WAITALL);
    while (n < 0 && (errno == EINTR || errno == EAGAIN));
    return n > 0 &&
           receive(c->socket, (char *)r + n, sizeof *r - (size_t)n, now_ns() + c->record_ns);
}

static int serve_one(const connection *c) {
    request r;
    if (!receive_request(c, &r) || r.bytes > MOST_VECTORS) return 0;
    if (!receive(c->socket, c->vectors, r.bytes, now_ns() + c->record_ns)) return 0;
    answer *a = (answer *)(c->out + HEAD) - 1;
    *a = answer_to(c, &r);
    return send_all(c->socket, (const char *)a, sizeof *a + a->bytes, now_ns() + c->record_ns);
}

int kvfabric_serve(table *t, int socket, int64_t owner, int64_t record_ns) {
    connection c = {.table = t, .socket = socket, .owner = owner, .record_ns = record_ns};
    int64_t bounds = 2 * (int64_t)sizeof(int64_t) * MOST_ROWS;
    char *memory = aligned_alloc(64, HEAD + MOST_OUTPUTS + MOST_VECTORS + (size_t)bounds);
    if (!memory) return NO_MEMORY;
    c.out = memory;
    c.vectors = memory + HEAD + MOST_OUTPUTS;
    c.lo = (int64_t *)(c.vectors + MOST_VECTORS);
    c.hi = c.lo + MOST_ROWS;
    while (serve_one(&c)) {}
    free(memory);
    return OK;
}
