/* What this x86 CPU has and its system saves (compilers' own builtins differ in what they know). */
#ifndef KVFABRIC_CPU_H
#define KVFABRIC_CPU_H

#include <cpuid.h>
#include <stdint.h>

typedef struct {
    int avx2, avx512, amx;
} cpu;

static inline uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static inline int bits(uint64_t word, uint64_t wanted) { return (word & wanted) == wanted; }

#define BIT(n) (1ull << (n))

static inline cpu this_cpu(void) {
    uint32_t a, b, c, d, b7, c7, d7, a71;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bits(c, BIT(27))) return (cpu){0}; /* OSXSAVE */
    uint64_t saved = saved_registers();
    int has_fma_f16c = bits(c, BIT(12) | BIT(29));
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return (cpu){0};
    if (!__get_cpuid_count(7, 1, &a71, &b, &c, &d)) a71 = 0;
    cpu has;
    has.avx2 = bits(saved, 0x6) && has_fma_f16c && bits(b7, BIT(5));
    /* F, DQ, BW, VL */
    has.avx512 = has.avx2 && bits(saved, 0xe6) && bits(b7, BIT(16) | BIT(17) | BIT(30) | BIT(31));
    /* AMX-BF16 and AMX-TILE; AVX512_BF16 */
    has.amx = has.avx512 && bits(saved, BIT(17) | BIT(18)) && bits(d7, BIT(22) | BIT(24)) &&
              bits(a71, BIT(5));
    return has;
}

#endif
