// Calls TensorRT's ILoggerFinder and ILogger, whose layout changed: TensorRT 11 and later TensorRT-RTX put
// IVersionedInterface under both, which moves their functions in the virtual table (C++ API reference, 10.14.1 and
// 11.2.1). The headers say only what they were made for, so the run-time type names decide: nvinfer1::ILogger is the
// old one, nvinfer1::v_1_0::ILogger the new one.
#pragma once

#include <NvInferRuntime.h>

namespace deepseek_trt {

// False where there is no finder, no logger, or one of unknown layout.
bool log_through(void* finder, nvinfer1::ILogger::Severity severity, char const* message) noexcept;

}  // namespace deepseek_trt
