// An op's tensors as its generated table describes them, and the checks of what TensorRT hands over against it.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace deepseek_trt {

constexpr int32_t kMaxRank = 4;

// One axis: a size that the graph is free to choose, or one fixed by the model that the library was made for.
struct Axis {
    char const* symbol;  // as in the op's contract, e.g. "B" or "N+R"
    int32_t free;        // its place among the op's free sizes, or -1
    int64_t fixed;
};

struct Tensor {
    char const* name;
    nvinfer1::DataType type;
    int32_t alias;   // of an output: the input whose memory it is, or -1
    int32_t before;  // of an input: the one that it continues, right after it in memory, or -1
    int32_t rank;
    Axis axes[kMaxRank];
};

// Inputs, then outputs.
struct TensorTable {
    Tensor const* tensors;
    int32_t inputs;
    int32_t outputs;
};

// Each throws Error where its argument is not what the table says.
void check_counts(TensorTable const& table, int32_t inputs, int32_t outputs);
void check_types(TensorTable const& table, nvinfer1::DataType const* input_types);
void check_fixed_sizes(TensorTable const& table, nvinfer1::DynamicPluginTensorDesc const* inputs);

// Reads the free sizes from the inputs, checking that all axes agree.
void read_free_sizes(TensorTable const& table, nvinfer1::PluginTensorDesc const* inputs, int64_t* free);
// The same at the largest shapes of the optimisation profile; where axes differ, the largest counts.
void read_largest_free_sizes(
    TensorTable const& table, nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t free_count, int64_t* free);

void write_output_shapes(TensorTable const& table, nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
    nvinfer1::IExprBuilder& builder);

// Throws where a part of a tensor does not lie right after the part before it.
void check_parts(TensorTable const& table, void const* const* inputs);

// Throws where an output is not in the memory of the input that it must share.
void check_aliases(TensorTable const& table, void const* const* inputs, void* const* outputs);

}  // namespace deepseek_trt
