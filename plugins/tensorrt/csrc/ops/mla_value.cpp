// MlaValue: see plugins/kernels/absorbed/value.py for the launch.
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

namespace deepseek_trt::mla_value {
namespace {

struct Op {
    using Spec = spec::MlaValue;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MlaValue>;

    static void check(Spec::Attributes const&) {}

    static size_t workspace(Sizes const&) { return 0; }

    static void enqueue(Call<Op> const& call) {
        int64_t const tokens = call.sizes.B * call.sizes.S;
        auto const& value = call.kernels.get<MlaValue>(tokens);
        launch(value,
            {Sizes::H * ceil_div(Sizes::V, value.constants().BLOCK_V), ceil_div(tokens, value.constants().BLOCK_T)},
            call.stream, call.in.attended, call.in.w_uv, call.out.values, as_i32(tokens));
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_value
