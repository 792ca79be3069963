// LinearNarrow of int8: docs/narrow.md has the bits.
#include "linear_narrow.h"

namespace deepseek_trt::linear_narrow_int8 {
namespace {

struct Format {
    using Spec = spec::LinearNarrowInt8;
    using Product = LinearNarrow;
    using Sum = LinearNarrowSum;
    static constexpr char const* kName = "int8";
    static constexpr int64_t kGroup = 32;

    static void check(Spec::Sizes const& sizes) { check_share("weight_scale", sizes.in, kGroup, sizes.in_by_32); }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<LinearNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::linear_narrow_int8
