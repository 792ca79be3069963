// LinearNarrow of int4: docs/narrow.md has the bits.
#include "linear_narrow.h"

namespace deepseek_trt::linear_narrow_int4 {
namespace {

struct Format {
    using Spec = spec::LinearNarrowInt4;
    using Product = LinearNarrow;
    using Sum = LinearNarrowSum;
    static constexpr char const* kName = "int4";
    static constexpr int64_t kGroup = 32;

    static void check(Spec::Sizes const& sizes) {
        check_share("weight", sizes.in, 2, sizes.in_by_2);
        check_share("weight_scale", sizes.in, kGroup, sizes.in_by_32);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<LinearNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::linear_narrow_int4
