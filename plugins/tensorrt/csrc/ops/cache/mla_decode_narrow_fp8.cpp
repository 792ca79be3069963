// MlaDecodeNarrow of fp8: docs/narrow.md has the bits.
#include "mla_decode_narrow.h"

namespace deepseek_trt::mla_decode_narrow_fp8 {
namespace {

struct Format {
    using Spec = spec::MlaDecodeNarrowFp8;
    using Write = LatentNarrow;
    using Split = MlaDecodeSplitNarrow;
    using Combine = MlaDecodeCombine;
    static constexpr char const* kName = "fp8";
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<MlaDecodeNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_decode_narrow_fp8
