// MoeExpertsNarrow of int4: docs/narrow.md has the bits.
#include "moe_experts_narrow.h"

namespace deepseek_trt::moe_experts_narrow_int4 {
namespace {

struct Format {
    using Spec = spec::MoeExpertsNarrowInt4;
    using Count = MoeDispatchCount;
    using Offsets = MoeDispatchOffsets;
    using Scatter = MoeDispatchScatter;
    using GateUp = MoeGateUpNarrow;
    using Down = MoeDownNarrow;
    using Combine = MoeCombine;
    static constexpr char const* kName = "int4";
    static constexpr int64_t kGroup = 32;
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<MoeExpertsNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::moe_experts_narrow_int4
