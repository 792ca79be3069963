// MoeExpertsNarrow of fp8: docs/narrow.md has the bits.
#include "moe_experts_narrow.h"

namespace deepseek_trt::moe_experts_narrow_fp8 {
namespace {

struct Format {
    using Spec = spec::MoeExpertsNarrowFp8;
    using Count = MoeDispatchCount;
    using Offsets = MoeDispatchOffsets;
    using Scatter = MoeDispatchScatter;
    using GateUp = MoeGateUpNarrow;
    using Down = MoeDownNarrow;
    using Combine = MoeCombine;
    static constexpr char const* kName = "fp8";
    static constexpr int64_t kGroup = 128;
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<MoeExpertsNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::moe_experts_narrow_fp8
