// The compiled kernels that the library carries, and which of them a chip runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepseek_trt {

// One kernel compiled for one chip and one bucket of token counts.
struct Binary {
    int32_t sm;  // e.g. 86
    bool is_ptx;
    int32_t max_tokens;  // the bucket's largest token count; 0: any
    char const* entry;
    int32_t shared_bytes;
    int32_t threads;
    bool overlaps;  // it waits for the kernel before it by itself, and may be started before that ends
    unsigned char const* image;
};

// A generated table: contiguous, static.
template <class Row>
struct Rows {
    Row const* first;
    size_t count;

    Row const* begin() const { return first; }
    Row const* end() const { return first + count; }
};

// What code was compiled for: a chip's own code, or PTX that the driver compiles for any later chip.
struct Target {
    int32_t sm = 0;
    bool is_ptx = false;

    bool operator==(Target const& other) const { return sm == other.sm && is_ptx == other.is_ptx; }
};

inline Target target_of(Binary const& binary) { return {binary.sm, binary.is_ptx}; }

// Compiled code runs on its own chip; within 8.x also on later minors.
inline bool runs_on(Target target, int32_t sm) {
    if (target.is_ptx) {
        return target.sm <= sm;
    }
    return target.sm == sm || (target.sm / 10 == 8 && sm / 10 == 8 && target.sm <= sm);
}

// Whether `a` suits a chip that runs both better than `b` does.
inline bool is_closer(Target a, Target b) { return a.is_ptx != b.is_ptx ? b.is_ptx : a.sm > b.sm; }

}  // namespace deepseek_trt
