// Sixteen floats at a time; the compiler maps them to the instruction set that the file is compiled for.
//
// Everything lies in a namespace of that instruction set, so that no inline function of one is linked into the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "args.h"

namespace ISA {

// So that vectors wider than the registers are never arguments of a call.
#define INLINE_BODY __attribute__((always_inline))  // of a lambda
#define INLINE inline INLINE_BODY

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef v16 v16_unaligned __attribute__((aligned(4)));
typedef i16 i16_unaligned __attribute__((aligned(4)));
typedef u16 u16_unaligned __attribute__((aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef _Float16 f16x16 __attribute__((vector_size(32), aligned(2)));

constexpr int LANES = 16;
constexpr int64_t AHEAD = 4096;  // bytes: how far before they are needed weights are fetched

// Asks for the cache line that lies AHEAD of p. It may be anywhere: where nothing is, nothing is read. The processor's
// own prefetching begins anew at each page, and is not far enough ahead where there is something to compute.
INLINE void fetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD); }

struct Bfloat16 {
    uint16_t bits;
};

INLINE v16 fma(v16 a, v16 b, v16 c) { return __builtin_elementwise_fma(a, b, c); }
INLINE v16 all(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }
INLINE v16 load(const _Float16* p) { return __builtin_convertvector(*reinterpret_cast<const f16x16*>(p), v16); }
INLINE v16 load(const Bfloat16* p) {
    const u16 wide = __builtin_convertvector(*reinterpret_cast<const h16*>(p), u16) << 16;
    return reinterpret_cast<v16>(wide);
}
INLINE i16 load(const int32_t* p) { return *reinterpret_cast<const i16_unaligned*>(p); }
INLINE u16 load(const uint32_t* p) { return *reinterpret_cast<const u16_unaligned*>(p); }
INLINE void store(int32_t* p, i16 x) { *reinterpret_cast<i16_unaligned*>(p) = x; }
INLINE void store(uint32_t* p, u16 x) { *reinterpret_cast<u16_unaligned*>(p) = x; }
INLINE void store(float* p, v16 x) { *reinterpret_cast<v16_unaligned*>(p) = x; }

// The first n < 16 numbers at p, then zeros.
template <class T>
INLINE v16 load_some(const T* p, int64_t n) {
    T buffer[LANES] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
INLINE void store_some(float* p, v16 x, int64_t n) { std::memcpy(p, &x, n * sizeof(float)); }

INLINE float one(const float* p) { return *p; }
INLINE float one(const _Float16* p) { return static_cast<float>(*p); }
INLINE float one(const Bfloat16* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(_Float16* p, float x) { *p = static_cast<_Float16>(x); }
INLINE void put(Bfloat16* p, float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    p->bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// The sum of all lanes, always in the same order.
INLINE float sum(v16 x) {
    const v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7)
        + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    const v4 c = b + __builtin_shufflevector(b, b, 2, 3, 0, 1);
    return c[0] + c[1];
}

// Four such sums.
INLINE v4 sums(v16 a, v16 b, v16 c, v16 d) {
    const auto quarter = [](v16 x) INLINE_BODY {
        const v8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7)
            + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
        return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
    };
    const v4 w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
    const v4 wx = __builtin_shufflevector(w, x, 0, 1, 4, 5) + __builtin_shufflevector(w, x, 2, 3, 6, 7);
    const v4 yz = __builtin_shufflevector(y, z, 0, 1, 4, 5) + __builtin_shufflevector(y, z, 2, 3, 6, 7);
    return __builtin_shufflevector(wx, yz, 0, 2, 4, 6) + __builtin_shufflevector(wx, yz, 1, 3, 5, 7);
}

// exp to 2 units in the last place: 2^n times a polynomial in the rest; 0 below -87.
INLINE v16 exp(v16 x) {
    const v16 low = all(-87.0f), high = all(88.0f);
    const v16 inside = __builtin_elementwise_min(__builtin_elementwise_max(x, low), high);
    const v16 n = __builtin_elementwise_roundeven(inside * 1.44269504088896341f);
    v16 r = fma(n, all(-0.693359375f), inside);
    r = fma(n, all(2.12194440e-4f), r);
    v16 p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, all(c));
    p = fma(p, r * r, r + 1.0f);
    const i16 scale = (__builtin_convertvector(n, i16) + 127) << 23;
    const v16 result = p * reinterpret_cast<v16>(scale);
    return x < low ? v16{} : result;
}

// Calls body with a pointer of the type that the numbers at `data` have.
template <class Body>
INLINE void with_type(const char* data, Type type, Body body) {
    switch (type) {
    case Type::FLOAT32: return body(reinterpret_cast<const float*>(data));
    case Type::FLOAT16: return body(reinterpret_cast<const _Float16*>(data));
    case Type::BFLOAT16: return body(reinterpret_cast<const Bfloat16*>(data));
    }
}

}  // namespace ISA
