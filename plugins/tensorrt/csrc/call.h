// What one launch of an op is given, and helpers to hand it on to kernels.
#pragma once

#include "kernels.h"
#include "log.h"

#include <cstdint>
#include <string>

namespace deepseek_trt {

// Lays out a workspace: with base 0 it only counts.
class Arena {
public:
    explicit Arena(void* base = nullptr) : base_(reinterpret_cast<uint64_t>(base)) {}

    template <class Element>
    Ptr<Element> take(int64_t bytes) {
        Ptr<Element> const taken{base_ + size_};
        size_ += static_cast<uint64_t>(ceil_div(bytes, kAlignment) * kAlignment);
        return taken;
    }

    size_t size() const { return size_; }

private:
    static constexpr int64_t kAlignment = 256;

    uint64_t base_;
    uint64_t size_ = 0;
};

// A size as a kernel takes it.
inline int32_t as_i32(int64_t size) {
    if (size < 0 || size > INT32_MAX) {
        throw Error("a size of " + std::to_string(size) + " does not fit the kernels' 32 bits; use smaller batches");
    }
    return static_cast<int32_t>(size);
}

// The attention kernels' softmax is in powers of two: the scale times log2(e).
inline float base_2_scale(float scale) { return static_cast<float>(scale * 1.4426950408889634); }

// All that one launch of an op knows.
template <class Op>
struct Call {
    typename Op::Spec::Attributes const& attributes;
    typename Op::Spec::Sizes sizes;
    typename Op::Spec::Inputs in;
    typename Op::Spec::Outputs out;
    typename Op::Kernels const& kernels;
    void* workspace;
    cudaStream_t stream;
};

}  // namespace deepseek_trt
