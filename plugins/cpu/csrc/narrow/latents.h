// Cached latents as codes of 8 bits, each group of a token's with a scale: written once, and widened where they are
// read. A number read is code * scale in float32, whatever reads it, so that results depend on nothing else.
#pragma once

#include <algorithm>

#include "fp8.h"

namespace ISA {

constexpr float INT8_TOP = 127.0f, FP8_TOP = 448.0f;

// The largest of a group / the largest code; NaN where a number of it is not finite.
inline float exact_scale(const float* numbers, int64_t count, float top) {
    float most = 0.0f, strange = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        most = std::max(most, std::fabs(numbers[i]));
        strange += numbers[i] * 0.0f;
    }
    return most / top + strange;
}

// x to the nearest whole number, ties to even.
inline int8_t int8_code(float x) { return std::isnan(x) ? 0 : static_cast<int8_t>(std::nearbyint(x)); }

// The bits of x as float8 E4M3, at most 448, to the nearest, ties to even.
inline int8_t fp8_code(float x) {
    const float size = std::fabs(x);
    uint32_t code = 0;
    if (size < 0.015625f) {  // subnormal: whole numbers of 2^-9
        code = static_cast<uint32_t>(std::nearbyint(size * 512.0f));
    } else {
        std::memcpy(&code, &size, sizeof code);
        code = (code + 0x7ffff + ((code >> 20) & 1)) >> 20;
        code -= (127 - 7) << 3;
    }
    return static_cast<int8_t>((code & 0x7f) | (std::signbit(x) ? 0x80 : 0));
}

// One token's latent to its slot: codes, and scales behind the rope part, which whoever calls writes.
template <class P>
inline void write_codes(const AttentionArgs& a, const float* latent, int64_t slot, P* rest) {
    auto* codes = reinterpret_cast<int8_t*>(a.pool) + slot * a.rank;
    const bool is_fp8 = a.cache == CacheFormat::FP8;
    const float top = is_fp8 ? FP8_TOP : INT8_TOP;
    const int64_t groups = a.rank / a.group;
    P* scales = rest + a.rest_width - groups;
    for (int64_t g = 0; g < groups; ++g) {
        const float* numbers = latent + g * a.group;
        put(scales + g, exact_scale(numbers, a.group, top));
        const float stored = one(scales + g), scale = stored == 0.0f ? 1.0f : stored;
        for (int64_t i = 0; i < a.group; ++i) {
            const float x = std::min(std::max(numbers[i] / scale, -top), top);
            codes[g * a.group + i] = is_fp8 ? fp8_code(x) : int8_code(x);
        }
    }
}

INLINE v16 load(const int8_t* p) {
    const i16 wide = __builtin_convertvector(*reinterpret_cast<const b16*>(p), i16);
    return __builtin_convertvector(wide, v16);
}
INLINE float one(const int8_t* p) { return static_cast<float>(*p); }

// Codes times their scale, `factor` of which the loaded numbers lack.
template <class C, class P>
INLINE void widen_codes(const C* codes, const P* scales, int64_t rank, int64_t group, float factor, float* to) {
    for (int64_t from = 0; from < rank; from += group, ++scales) {
        const float scale = one(scales) * factor;
        int64_t i = from;
        for (; i + LANES <= from + group; i += LANES) store(to + i, load(codes + i) * scale);
        for (; i < from + group; ++i) to[i] = one(codes + i) * scale;
    }
}

// The latent and the rope part in a slot of a narrow cache, in float32.
inline void read_narrow(const AttentionArgs& a, int64_t slot, float* to) {
    with_type(a.rest, a.pool_type, [&](auto* rest) INLINE_BODY {
        const auto* row = rest + slot * a.rest_width;
        const int64_t rope = a.rest_width - a.rank / a.group;
        const char* codes = a.pool + slot * a.rank;
        if (a.cache == CacheFormat::FP8)
            widen_codes(reinterpret_cast<const Fp8*>(codes), row + rope, a.rank, a.group, FP8_FACTOR, to);
        else
            widen_codes(reinterpret_cast<const int8_t*>(codes), row + rope, a.rank, a.group, 1.0f, to);
        for (int64_t i = 0; i < rope; ++i) to[a.rank + i] = one(row + i);
    });
}

}  // namespace ISA
