// MlaDecodeNarrow of int8: docs/narrow.md has the bits.
#include "mla_decode_narrow.h"

namespace deepseek_trt::mla_decode_narrow_int8 {
namespace {

struct Format {
    using Spec = spec::MlaDecodeNarrowInt8;
    using Write = LatentNarrow;
    using Split = MlaDecodeSplitNarrow;
    using Combine = MlaDecodeCombine;
    static constexpr char const* kName = "int8";
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<MlaDecodeNarrowOp<Format>> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_decode_narrow_int8
