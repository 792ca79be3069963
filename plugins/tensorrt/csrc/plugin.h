// What all plugins share: TensorRT's four plugin interfaces and the creator, around a small class an op.
#pragma once

#include "call.h"
#include "fields.h"
#include "log.h"
#include "tensors.h"

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace deepseek_trt {

constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";

// Identifies this build; defined in the generated tables.
extern char const* const kLibraryId;

// The plugin of one op. Op has:
//   Spec, its generated tables; Kernels, a KernelSet;
//   check(attributes), which throws where the library's kernels do not fit them;
//   workspace(sizes), the bytes needed at most for sizes up to these;
//   enqueue(call), which launches the kernels and does nothing else: CUDA graphs may capture it.
template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
    using Spec = typename Op::Spec;
    using Attributes = typename Spec::Attributes;
    using Sizes = typename Spec::Sizes;
    using TensorDesc = nvinfer1::PluginTensorDesc;
    using DynamicDesc = nvinfer1::DynamicPluginTensorDesc;

public:
    Plugin(Attributes attributes, nvinfer1::TensorRTPhase phase, typename Op::Kernels const* kernels = nullptr)
        : attributes_(std::move(attributes)), phase_(phase), kernels_(kernels) {}

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<IPluginV3*>(Spec::kName, nullptr, [&] { return new Plugin(attributes_, phase_, kernels_); });
    }

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return Spec::kName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return Spec::kTensors.outputs; }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
        int32_t input_count) const noexcept override {
        return succeeds([&] {
            check_counts(Spec::kTensors, input_count, output_count);
            check_types(Spec::kTensors, inputs);
            for (int32_t o = 0; o < output_count; ++o) {
                outputs[o] = Spec::kTensors.tensors[input_count + o].type;
            }
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
        return succeeds([&] {
            check_counts(Spec::kTensors, input_count, output_count);
            write_output_shapes(Spec::kTensors, inputs, outputs, builder);
        });
    }

    bool supportsFormatCombination(int32_t position, DynamicDesc const* tensors, int32_t, int32_t) noexcept override {
        TensorDesc const& found = tensors[position].desc;
        return found.format == nvinfer1::TensorFormat::kLINEAR && found.type == Spec::kTensors.tensors[position].type;
    }

    int32_t configurePlugin(
        DynamicDesc const* inputs, int32_t input_count, DynamicDesc const*, int32_t output_count) noexcept override {
        return succeeds([&] {
            check_counts(Spec::kTensors, input_count, output_count);
            check_fixed_sizes(Spec::kTensors, inputs);
        });
    }

    size_t getWorkspaceSize(DynamicDesc const* inputs, int32_t, DynamicDesc const*, int32_t) const noexcept override {
        return guarded<size_t>(Spec::kName, 0, [&] {
            int64_t largest[Spec::kFreeSizes];
            read_largest_free_sizes(Spec::kTensors, inputs, Spec::kFreeSizes, largest);
            return Op::workspace(Spec::sizes(largest));
        });
    }

    int32_t getAliasedInput(int32_t output) noexcept override {
        return Spec::kTensors.tensors[Spec::kTensors.inputs + output].alias;
    }

    char const* getTimingCacheID() noexcept override { return describe(); }
    char const* getMetadataString() noexcept override { return describe(); }

    // IPluginV3OneRuntime
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
        auto* attached = static_cast<Plugin*>(clone());
        if (attached && !is_building()) {
            attached->try_load();
        }
        return attached;
    }

    int32_t onShapeChange(
        TensorDesc const* inputs, int32_t input_count, TensorDesc const*, int32_t output_count) noexcept override {
        return succeeds([&] {
            check_counts(Spec::kTensors, input_count, output_count);
            read_sizes(inputs);
            if (!kernels_ && !is_building()) {
                kernels_ = &Op::Kernels::on_current_device(Spec::kName);
            }
        });
    }

    int32_t enqueue(TensorDesc const* input_descs, TensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override {
        if (is_building()) {
            return 0;
        }
        return succeeds([&] {
            if (!kernels_) {
                throw Error("enqueue without onShapeChange");
            }
            check_aliases(Spec::kTensors, inputs, outputs);
            check_parts(Spec::kTensors, inputs);
            Op::enqueue(Call<Op>{attributes_, read_sizes(input_descs), Spec::inputs(inputs), Spec::outputs(outputs),
                *kernels_, workspace, stream});
        });
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        return guarded<nvinfer1::PluginFieldCollection const*>(Spec::kName, nullptr, [&] {
            serialized_ = {};
            Spec::visit(attributes_, serialized_);
            serialized_(kLibraryField, library_);
            return serialized_.fields();
        });
    }

private:
    // 0, or 1 after logging what `body` threw: TensorRT's result codes.
    template <class Body>
    static int32_t succeeds(Body&& body) noexcept {
        return guarded<int32_t>(Spec::kName, 1, [&] { return body(), 0; });
    }

    // A builder times plugins on made-up inputs (NVIDIA/TensorRT issue 2552): lengths, pages and ids among them would
    // index memory. So nothing is launched then; an engine's plugins are made anew from the plan.
    bool is_building() const noexcept { return phase_ == nvinfer1::TensorRTPhase::kBUILD; }

    // TensorRT attaches plugins while it builds on machines without a GPU, too, and does not survive a refusal. So what
    // goes wrong here is left to onShapeChange, which tries again and says it.
    void try_load() noexcept {
        try {
            kernels_ = &Op::Kernels::on_current_device(Spec::kName);
        } catch (...) {
        }
    }

    static Sizes read_sizes(TensorDesc const* inputs) {
        int64_t free[Spec::kFreeSizes];
        read_free_sizes(Spec::kTensors, inputs, free);
        return Spec::sizes(free);
    }

    char const* describe() noexcept {
        return guarded<char const*>(Spec::kName, nullptr, [&] {
            if (description_.empty()) {
                description_ = std::string(Spec::kName) + " of deepseek-trt plugin library " + kLibraryId;
            }
            return description_.c_str();
        });
    }

    Attributes attributes_;
    nvinfer1::TensorRTPhase phase_;
    typename Op::Kernels const* kernels_;
    std::string const library_ = kLibraryId;
    std::string description_;
    FieldWriter serialized_;
};

// Makes an op's plugin from the fields of an ONNX node or of a plan.
template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
    using Spec = typename Op::Spec;

public:
    char const* getPluginName() const noexcept override { return Spec::kName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        return guarded<nvinfer1::PluginFieldCollection const*>(Spec::kName, nullptr, [&] {
            names_ = {};
            Spec::visit(none_, names_);
            return names_.fields();
        });
    }

    nvinfer1::IPluginV3* createPlugin(
        char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(Spec::kName, nullptr, [&] {
            typename Spec::Attributes attributes{};
            FieldReader reader(fields);
            Spec::visit(attributes, reader);
            reader.library(kLibraryId, phase);
            reader.finish();
            Op::check(attributes);
            return new Plugin<Op>(std::move(attributes), phase);
        });
    }

private:
    typename Spec::Attributes const none_{};
    FieldWriter names_;
};

}  // namespace deepseek_trt
