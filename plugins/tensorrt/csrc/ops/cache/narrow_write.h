// What both ops over a narrow cache launch first, and check: see plugins/kernels/cache/write.py.
#pragma once

#include "call.h"
#include "checks.h"
#include "kernels.h"
#include "narrow_checks.h"

#include <string>

namespace deepseek_trt {

template <class Write, class Attributes>
void check_cache(Attributes const& attributes, char const* format) {
    for (auto const& row : Write::rows()) {
        check_format(attributes, format, row.constants.GROUP);
    }
}

template <class Write, class Op>
void launch_narrow_write(Call<Op> const& call) {
    auto const& write = call.kernels.template get<Write>(call.sizes.S);
    check_page(write.constants().PAGE, Op::Sizes::page);
    launch(write, {ceil_div(call.sizes.S, write.constants().BLOCK_S), call.sizes.B}, call.stream,
        call.out.present_latent, call.out.present_rope, call.in.latent, call.in.page_table, call.in.past_lengths,
        call.in.sequence_lengths, as_i32(call.sizes.S), as_i32(call.sizes.M), as_i32(call.sizes.P));
}

}  // namespace deepseek_trt
