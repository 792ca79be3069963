// MlaPrefillNarrow of fp8: docs/narrow.md has the bits.
#include "mla_prefill_narrow.h"

namespace deepseek_trt::mla_prefill_narrow_fp8 {
namespace {

struct Format {
    using Spec = spec::MlaPrefillNarrowFp8;
    using Write = LatentNarrow;
    using Expand = MlaPrefillExpandNarrow;
    using Attend = MlaPrefillAttend;
    static constexpr char const* kName = "fp8";
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<MlaPrefillNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_prefill_narrow_fp8
