// Attributes to and from TensorRT's plugin fields, through the op's generated list of them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace deepseek_trt {

// Says which build of the library wrote a plan: its workspace sizes hold for that build only.
constexpr char const* kLibraryField = "deepseek_trt_library";

// Takes one attribute after another from what TensorRT hands to a creator. Throws Error naming the field, what was
// expected and what was found; the parser itself checks nothing.
class FieldReader {
public:
    explicit FieldReader(nvinfer1::PluginFieldCollection const* fields) : fields_(fields) {}

    void operator()(char const* name, int32_t& value);
    void operator()(char const* name, float& value);
    void operator()(char const* name, std::string& value);

    // The plan's library must be `id`. Absent while a network is being built.
    void library(std::string const& id, nvinfer1::TensorRTPhase phase);
    // After all attributes: nothing may be left over.
    void finish() const;

private:
    nvinfer1::PluginField const* find(char const* name);
    nvinfer1::PluginField const& get(char const* name, nvinfer1::PluginFieldType type);

    nvinfer1::PluginFieldCollection const* fields_;
    std::vector<std::string> known_;
};

// Lists attributes as fields that point at them.
class FieldWriter {
public:
    void operator()(char const* name, int32_t const& value);
    void operator()(char const* name, float const& value);
    void operator()(char const* name, std::string const& value);

    // Valid while this writer and the attributes live.
    nvinfer1::PluginFieldCollection const* fields();

private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace deepseek_trt
