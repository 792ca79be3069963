// LinearNarrow of fp8: docs/narrow.md has the bits.
#include "linear_narrow.h"

namespace deepseek_trt::linear_narrow_fp8 {
namespace {

struct Format {
    using Spec = spec::LinearNarrowFp8;
    using Product = LinearNarrow;
    using Sum = LinearNarrowSum;
    static constexpr char const* kName = "fp8";
    static constexpr int64_t kGroup = 128;

    static void check(Spec::Sizes const& sizes) {
        check_share("weight_scale", sizes.in, kGroup, sizes.in_by_128);
        check_share("weight_scale", sizes.out, kGroup, sizes.out_by_128);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<LinearNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::linear_narrow_fp8
