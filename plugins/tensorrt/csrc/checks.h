// Checks that a graph fits the library's kernels, and the kernels each other.
#pragma once

#include "log.h"

#include <cstdint>
#include <string>

namespace deepseek_trt {

inline void check_attribute(char const* name, int64_t found, int64_t compiled) {
    if (found != compiled) {
        throw Error("attribute \"" + std::string(name) + "\" asks for " + std::to_string(found)
            + ", but this plugin library was made for a model where it is " + std::to_string(compiled)
            + "; run `deepseek-trt plugins` for this model");
    }
}

// Two kernels of one op that share a tile must have been compiled with the same one.
inline void check_alike(char const* tile, int64_t first, int64_t second) {
    if (first != second) {
        throw Error(std::string("two kernels disagree on ") + tile + " (" + std::to_string(first) + " and "
            + std::to_string(second) + "); run `deepseek-trt plugins` again");
    }
}

// A kernel takes the page size as a constant.
inline void check_page(int64_t compiled, int64_t page) { check_alike("the page size", compiled, page); }

}  // namespace deepseek_trt
