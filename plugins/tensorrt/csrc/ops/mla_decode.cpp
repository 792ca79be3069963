// MlaDecode: see plugins/kernels/mla_decode.py for the launches and the arithmetic.
#include "checks.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "pieces.h"
#include "plugin.h"

namespace deepseek_trt::mla_decode {
namespace {

struct Op {
    using Spec = spec::MlaDecode;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MlaDecodeSplit, MlaDecodeCombine>;
    using Cut = Pieces<Spec, MlaDecodeSplit, MlaDecodeCombine>;

    static void check(Spec::Attributes const& attributes) {
        check_attribute("kv_lora_rank", attributes.kv_lora_rank, Sizes::L);
    }

    static size_t workspace(Sizes const& largest) { return Cut::workspace(largest); }

    static void enqueue(Call<Op> const& call) { Cut::launch_both(call, call.in.latent, call.out.present_latent); }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_decode
