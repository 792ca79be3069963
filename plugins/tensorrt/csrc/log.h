// Messages to TensorRT's logger, and the guard that keeps exceptions inside this library.
#pragma once

#include "error.h"

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace deepseek_trt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To the process's TensorRT logger, or to stderr where there is none yet.
void log_error(std::string const& message) noexcept;
void log_warning(std::string const& message) noexcept;

// The value of `body`, or `failure` after logging what it threw: TensorRT's interfaces are noexcept.
template <class Result, class Body>
Result guarded(char const* plugin, Result failure, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        try {
            log_error(std::string(plugin) + ": " + error.what());
        } catch (...) {  // no memory for the message: the failure code still gets through
        }
    } catch (...) {
        log_error("deepseek-trt plugin: unknown exception");
    }
    return failure;
}

}  // namespace deepseek_trt
