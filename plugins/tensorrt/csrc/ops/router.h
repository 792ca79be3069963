// What both routers check: the library's kernel was compiled for the node's attributes.
#pragma once

#include "checks.h"

namespace deepseek_trt {

template <class Kernel, class Attributes>
void check_routing(Attributes const& attributes) {
    bool const limited = attributes.topk_group < attributes.n_group;
    bool const normalised = attributes.norm_topk_prob && attributes.top_k > 1;
    for (auto const& row : Kernel::rows()) {
        check_attribute("top_k", attributes.top_k, row.constants.TOPK);
        check_attribute("n_group", limited ? attributes.n_group : 1, row.constants.GROUPS);
        check_attribute("topk_group", limited ? attributes.topk_group : 1, row.constants.TOPK_GROUPS);
        check_attribute("norm_topk_prob", normalised, row.constants.NORMALISE);
    }
}

}  // namespace deepseek_trt
