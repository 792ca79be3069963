#include "tensors.h"

#include "log.h"

#include <algorithm>
#include <string>

namespace deepseek_trt {
namespace {

using nvinfer1::DataType;

char const* name_of(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
    }
}

std::string axis_name(Tensor const& tensor, int32_t axis) {
    return std::string("input ") + tensor.name + ", axis " + std::to_string(axis) + " (" + tensor.axes[axis].symbol
        + ")";
}

void check_rank(Tensor const& tensor, int32_t rank) {
    if (rank != tensor.rank) {
        throw Error(std::string("input ") + tensor.name + " must have " + std::to_string(tensor.rank)
            + " dimensions, not " + std::to_string(rank));
    }
}

[[noreturn]] void throw_other_model(Tensor const& tensor, int32_t axis, int64_t found) {
    throw Error(axis_name(tensor, axis) + " is " + std::to_string(found)
        + ", but this plugin library was made for a model where it is " + std::to_string(tensor.axes[axis].fixed)
        + "; run `deepseek-trt plugins` for this model");
}

// Calls visit(tensor, axis, its index) for every axis of every input.
template <class Visit>
void for_each_input_axis(TensorTable const& table, Visit visit) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        for (int32_t axis = 0; axis < table.tensors[i].rank; ++axis) {
            visit(table.tensors[i], axis, i);
        }
    }
}

nvinfer1::IDimensionExpr const* find_free(TensorTable const& table, int32_t free, nvinfer1::DimsExprs const* inputs) {
    nvinfer1::IDimensionExpr const* found = nullptr;
    for_each_input_axis(table, [&](Tensor const& tensor, int32_t axis, int32_t i) {
        if (!found && tensor.axes[axis].free == free) {
            found = inputs[i].d[axis];
        }
    });
    return found;
}

}  // namespace

void check_counts(TensorTable const& table, int32_t inputs, int32_t outputs) {
    if (inputs != table.inputs || outputs != table.outputs) {
        throw Error("takes " + std::to_string(table.inputs) + " inputs and gives " + std::to_string(table.outputs)
            + " outputs, all of them wired; the node has " + std::to_string(inputs) + " and "
            + std::to_string(outputs));
    }
}

void check_types(TensorTable const& table, DataType const* input_types) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        Tensor const& tensor = table.tensors[i];
        if (input_types[i] != tensor.type) {
            throw Error(std::string("input ") + tensor.name + " is " + name_of(input_types[i])
                + ", but this plugin library takes " + name_of(tensor.type)
                + "; run `deepseek-trt plugins` for this bundle's dtype");
        }
    }
}

void check_fixed_sizes(TensorTable const& table, nvinfer1::DynamicPluginTensorDesc const* inputs) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        check_rank(table.tensors[i], inputs[i].desc.dims.nbDims);
    }
    for_each_input_axis(table, [&](Tensor const& tensor, int32_t axis, int32_t i) {
        Axis const& expected = tensor.axes[axis];
        int64_t const found = inputs[i].desc.dims.d[axis];
        bool const dynamic = found < 0;
        int64_t const smallest = dynamic ? inputs[i].min.d[axis] : found;
        int64_t const largest = dynamic ? inputs[i].max.d[axis] : found;
        if (expected.free < 0 && (smallest > expected.fixed || largest < expected.fixed)) {
            throw_other_model(tensor, axis, largest);
        }
    });
}

void read_free_sizes(TensorTable const& table, nvinfer1::PluginTensorDesc const* inputs, int64_t* free) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        check_rank(table.tensors[i], inputs[i].dims.nbDims);
    }
    uint32_t seen = 0;
    for_each_input_axis(table, [&](Tensor const& tensor, int32_t axis, int32_t i) {
        Axis const& expected = tensor.axes[axis];
        int64_t const found = inputs[i].dims.d[axis];
        if (expected.free < 0) {
            if (found != expected.fixed) {
                throw_other_model(tensor, axis, found);
            }
            return;
        }
        uint32_t const bit = 1u << expected.free;
        if ((seen & bit) && free[expected.free] != found) {
            throw Error(axis_name(tensor, axis) + " is " + std::to_string(found) + ", but another input's is "
                + std::to_string(free[expected.free]));
        }
        seen |= bit;
        free[expected.free] = found;
    });
}

void read_largest_free_sizes(
    TensorTable const& table, nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t free_count, int64_t* free) {
    std::fill_n(free, free_count, 0);
    for_each_input_axis(table, [&](Tensor const& tensor, int32_t axis, int32_t i) {
        int32_t const place = tensor.axes[axis].free;
        if (place >= 0) {
            free[place] = std::max<int64_t>(free[place], inputs[i].max.d[axis]);
        }
    });
}

void write_output_shapes(TensorTable const& table, nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
    nvinfer1::IExprBuilder& builder) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        check_rank(table.tensors[i], inputs[i].nbDims);
    }
    for (int32_t o = 0; o < table.outputs; ++o) {
        Tensor const& tensor = table.tensors[table.inputs + o];
        outputs[o].nbDims = tensor.rank;
        for (int32_t axis = 0; axis < tensor.rank; ++axis) {
            Axis const& size = tensor.axes[axis];
            outputs[o].d[axis] = size.free < 0 ? builder.constant(size.fixed) : find_free(table, size.free, inputs);
        }
    }
}

void check_parts(TensorTable const& table, void const* const* inputs) {
    for (int32_t i = 0; i < table.inputs; ++i) {
        if (table.tensors[i].before < 0) {
            continue;
        }
        Tensor const& before = table.tensors[table.tensors[i].before];
        int64_t bytes = before.type == DataType::kFLOAT ? 4 : before.type == DataType::kINT8 ? 1 : 2;
        for (int32_t axis = 0; axis < before.rank; ++axis) {
            bytes *= before.axes[axis].fixed;
        }
        if (inputs[i] != static_cast<char const*>(inputs[table.tensors[i].before]) + bytes) {
            throw Error(std::string("input ") + table.tensors[i].name + " must lie right after input " + before.name
                + ", " + std::to_string(bytes) + " bytes on: bind the parts of one tensor in one piece of memory");
        }
    }
}

void check_aliases(TensorTable const& table, void const* const* inputs, void* const* outputs) {
    for (int32_t o = 0; o < table.outputs; ++o) {
        Tensor const& output = table.tensors[table.inputs + o];
        if (output.alias >= 0 && outputs[o] != inputs[output.alias]) {
            throw Error(std::string("output ") + output.name + " must be the memory of input "
                + table.tensors[output.alias].name + "; bind both to one address, and build the plan with "
                + "PreviewFeature.ALIASED_PLUGIN_IO_10_03");
        }
    }
}

}  // namespace deepseek_trt
