/* The interface of the kernel: one plain struct in, float32 (o, lse) out.
 *
 * The keys and values lie in pieces scattered in memory. Query row r sees the key at position t
 * iff t < hi[r] and (t >= lo[r] or t < sinks). Query head h belongs to KV head h / (heads /
 * kv_heads). o is normalised; a row that sees nothing gets o = 0 and lse = -inf, one that sees
 * something and whose query is not finite gets NaN. */
#ifndef KVFABRIC_ATTEND_H
#define KVFABRIC_ATTEND_H

#include <stdint.h>

#define PUBLIC __attribute__((visibility("default")))

enum element { FLOAT32, BFLOAT16, FLOAT16 };

/* Ways to compute, each faster than the one before where the CPU has it. */
enum { BEST, BASE, AVX2, AVX512, AMX, LEVELS };

enum status { OK, NO_MEMORY, NO_SUCH_LEVEL };

typedef struct {
    int64_t pieces;
    const int64_t *keys;   /* address of a piece's first key of KV head 0, each */
    const int64_t *values; /* likewise; may be the same memory (MLA) */
    const int32_t *tokens; /* in a piece */
    const int64_t *first;  /* position of its first token */
    int64_t offset;        /* added to all of these addresses: of a layer, say */
    int64_t key_token_bytes, key_head_bytes, value_token_bytes, value_head_bytes; /* strides */
    int64_t rows;
    const void *q;          /* [rows, heads, key_dim] */
    const int64_t *lo, *hi; /* [rows] */
    int64_t sinks;
    int32_t element, q_element;
    int32_t heads, kv_heads, key_dim, value_dim;
    float scale, softcap; /* logit = softcap * tanh(scale * q.k / softcap); 0: no cap */
    int32_t threads, level;
    float *o;   /* [rows, heads, value_dim] */
    float *lse; /* [rows, heads] */
} attend_call;

PUBLIC int kvfabric_attend(const attend_call *call);

/* Whether this CPU, its system and this build have a level. */
PUBLIC int kvfabric_attend_has(int level);

#endif
