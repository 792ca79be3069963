// What the plugins over narrow weights check: that codes and scales are those of their format.
#pragma once

#include "kernels.h"
#include "log.h"

#include <cstdint>
#include <string>

namespace deepseek_trt {

template <class Attributes>
void check_format(Attributes const& attributes, char const* format, int64_t group) {
    if (attributes.format != format || attributes.group != group) {
        throw Error("attributes \"format\" and \"group\" are \"" + attributes.format + "\" and "
            + std::to_string(attributes.group) + ", but this plugin reads \"" + format + "\" in groups of "
            + std::to_string(group) + "; build the plan again");
    }
}

// Throws unless `part` of `whole` numbers have a share in `found`: codes in bytes, numbers in groups.
inline void check_share(char const* tensor, int64_t whole, int64_t part, int64_t found) {
    if (ceil_div(whole, part) != found) {
        throw Error(std::string("input ") + tensor + " has " + std::to_string(found) + " for " + std::to_string(whole)
            + " numbers, where there should be " + std::to_string(ceil_div(whole, part)) + "; export the bundle again");
    }
}

}  // namespace deepseek_trt
