#include "log.h"

#include "logger_abi.h"

#include <atomic>
#include <cstdio>

namespace deepseek_trt {
namespace {
std::atomic<void*> logger_finder{nullptr};

void log(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept {
    if (!log_through(logger_finder, severity, message.c_str())) {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(std::string const& message) noexcept { log(nvinfer1::ILogger::Severity::kERROR, message); }

void log_warning(std::string const& message) noexcept { log(nvinfer1::ILogger::Severity::kWARNING, message); }

}  // namespace deepseek_trt
