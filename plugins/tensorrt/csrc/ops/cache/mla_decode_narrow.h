// MlaDecodeNarrow of any format: see plugins/kernels/cache/decode.py for the launches and the arithmetic.
#pragma once

#include "checks.h"
#include "narrow_write.h"
#include "op_tables.h"
#include "pieces.h"
#include "plugin.h"

namespace deepseek_trt {

// Format has: Spec, Write, Split and Combine, the generated tables of its op and kernels; kName.
template <class Format>
struct MlaDecodeNarrowOp {
    using Spec = typename Format::Spec;
    using Sizes = typename Spec::Sizes;
    using Write = typename Format::Write;
    using Split = typename Format::Split;
    using Combine = typename Format::Combine;
    using Kernels = KernelSet<Write, Split, Combine>;
    using Cut = Pieces<Spec, Split, Combine>;

    static void check(typename Spec::Attributes const& attributes) {
        check_attribute("kv_lora_rank", attributes.kv_lora_rank, Sizes::L);
        check_cache<Write>(attributes, Format::kName);
    }

    static size_t workspace(Sizes const& largest) { return Cut::workspace(largest); }

    static void enqueue(Call<MlaDecodeNarrowOp> const& call) {
        launch_narrow_write<Write>(call);
        Cut::launch_both(call, call.out.present_latent, call.out.present_rope);
    }
};

}  // namespace deepseek_trt
