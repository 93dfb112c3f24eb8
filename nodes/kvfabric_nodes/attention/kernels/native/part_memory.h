/* The life of a part: allocated once per thread, started for each group, merged at its end. */
#ifndef KVFABRIC_PART_MEMORY_H
#define KVFABRIC_PART_MEMORY_H

#include "plan.h"

int part_allocate(part *p, const plan *pl); /* OK or NO_MEMORY */
void part_free(part *p);
void part_start(part *p, const plan *pl, int64_t group);

/* Into call->o and call->lse, which one thread at a time may change. */
void part_merge(part *p);

#endif
