// The two symbols that TensorRT's plugin registry looks for.
#include "binary.h"
#include "log.h"

#include <NvInferRuntime.h>

namespace deepseek_trt {
Rows<nvinfer1::IPluginCreatorInterface* const> creators();  // defined in the generated tables
}

#define DEEPSEEK_TRT_EXPORT extern "C" __attribute__((visibility("default")))

DEEPSEEK_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { deepseek_trt::set_logger_finder(finder); }

DEEPSEEK_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    auto const creators = deepseek_trt::creators();
    count = static_cast<int32_t>(creators.count);
    return creators.first;
}
