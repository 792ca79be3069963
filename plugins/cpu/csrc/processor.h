// What this processor and its operating system can do.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace processor {

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

inline Registers identify(uint32_t leaf) {
    Registers r;
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
    return r;
}

inline bool has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

// The register files that the operating system saves.
inline uint64_t saved_state() {
    if (!has(identify(1).c, bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | static_cast<uint64_t>(high) << 32;
}

// AVX2, FMA and F16C, as x86-64-v3 has them.
inline bool supports_v3() {
    return (saved_state() & 0x6) == 0x6 && has(identify(1).c, bit_AVX | bit_FMA | bit_F16C)
        && has(identify(7).b, bit_AVX2 | bit_BMI | bit_BMI2);
}

// AVX-512, as x86-64-v4 has it.
inline bool supports_v4() {
    return supports_v3() && (saved_state() & 0xe6) == 0xe6
        && has(identify(7).b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
}

}  // namespace processor
