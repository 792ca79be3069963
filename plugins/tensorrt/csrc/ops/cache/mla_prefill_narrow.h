// MlaPrefillNarrow of any format: see plugins/kernels/cache/prefill.py for the launches and the arithmetic.
#pragma once

#include "heads.h"
#include "narrow_write.h"
#include "op_tables.h"
#include "plugin.h"

namespace deepseek_trt {

// Format has: Spec, Write, Expand and Attend, the generated tables of its op and kernels; kName.
template <class Format>
struct MlaPrefillNarrowOp {
    using Spec = typename Format::Spec;
    using Sizes = typename Spec::Sizes;
    using Write = typename Format::Write;
    using Expand = typename Format::Expand;
    using Attend = typename Format::Attend;
    using Kernels = KernelSet<Write, Expand, Attend>;
    using All = Heads<Spec, Expand, Attend>;

    static void check(typename Spec::Attributes const& attributes) { check_cache<Write>(attributes, Format::kName); }

    static size_t workspace(Sizes const& largest) { return All::workspace(largest); }

    static void enqueue(Call<MlaPrefillNarrowOp> const& call) {
        launch_narrow_write<Write>(call);
        All::launch_all(call, call.out.present_latent, call.out.present_rope);
    }
};

}  // namespace deepseek_trt
