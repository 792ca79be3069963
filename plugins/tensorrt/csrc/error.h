// What goes wrong in this library.
#pragma once

#include <stdexcept>

namespace deepseek_trt {

// What a user can mend: the message says what happened, the offending value and the mend.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace deepseek_trt
