// Plays TensorRT to a plugin library: reads commands from stdin, calls the plugin, prints what comes back.
//
//   set NAME VALUE                    an environment variable that the recording driver reads
//   finder old|new                    hand over a logger finder, in the layout of TensorRT 10 or of 11
//   create OP build|runtime FIELD...  FIELD is name:i|f|s|d:length:value (d: a double)
//   create OP engine FIELD...         as TensorRT does: built from FIELDs, then made from its own serialised fields
//   roundtrip                         make the plugin anew from its own serialised fields
//   tensor in|out TYPE ADDRESS DIM... TYPE is f32, f16, bf16, i8, i32 or i64; the next command reads DIMs as both ends
//   clear | types | formats | configure | workspace | aliases | names | attach | reshape | enqueue
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace nvinfer1::v_1_0 {  // as TensorRT 11 declares them
struct ILogger : IVersionedInterface {
    using Severity = nvinfer1::ILogger::Severity;
    virtual void log(Severity severity, char const* message) noexcept = 0;
};
struct ILoggerFinder : IVersionedInterface {
    virtual ILogger* findLogger() = 0;
};
}  // namespace nvinfer1::v_1_0

namespace {

using namespace nvinfer1;

void print_log(ILogger::Severity severity, char const* message) {
    std::printf("log %d %s\n", static_cast<int>(severity), message);
}

struct OldLogger : ILogger {
    void log(Severity severity, char const* message) noexcept override { print_log(severity, message); }
};
struct OldFinder : ILoggerFinder {
    OldLogger logger;
    ILogger* findLogger() override { return &logger; }
};
struct NewLogger : v_1_0::ILogger {
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
    void log(Severity severity, char const* message) noexcept override { print_log(severity, message); }
};
struct Unrelated {
    virtual ~Unrelated() = default;
};
struct NewFinder : v_1_0::ILoggerFinder, Unrelated {
    NewLogger logger;
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
    v_1_0::ILogger* findLogger() override { return &logger; }
};

DataType type_from(std::string const& name) {
    if (name == "f32") return DataType::kFLOAT;
    if (name == "f16") return DataType::kHALF;
    if (name == "bf16") return DataType::kBF16;
    if (name == "i8") return DataType::kINT8;
    return name == "i32" ? DataType::kINT32 : DataType::kINT64;
}

// Owns what plugin fields point at.
class Fields {
public:
    void add(std::string const& text) {
        std::istringstream words(text);
        std::string name, type, length, value;
        std::getline(words, name, ':');
        std::getline(words, type, ':');
        std::getline(words, length, ':');
        std::getline(words, value);
        strings_.push_back(name);
        char const* kept_name = strings_.back().c_str();
        int32_t const count = std::stoi(length);
        if (type == "i") {
            ints_.push_back(std::stoi(value));
            fields_.emplace_back(kept_name, &ints_.back(), PluginFieldType::kINT32, count);
        } else if (type == "f") {
            floats_.push_back(std::stof(value));
            fields_.emplace_back(kept_name, &floats_.back(), PluginFieldType::kFLOAT32, count);
        } else if (type == "d") {
            doubles_.push_back(std::stod(value));
            fields_.emplace_back(kept_name, &doubles_.back(), PluginFieldType::kFLOAT64, count);
        } else {
            strings_.push_back(value);
            fields_.emplace_back(kept_name, strings_.back().data(), PluginFieldType::kCHAR, count);
        }
    }

    PluginFieldCollection collection() const { return {static_cast<int32_t>(fields_.size()), fields_.data()}; }

private:
    std::deque<int32_t> ints_;
    std::deque<float> floats_;
    std::deque<double> doubles_;
    std::deque<std::string> strings_;
    std::vector<PluginField> fields_;
};

class Driver {
public:
    explicit Driver(char const* path) : library_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (!library_) {
            std::printf("dlopen %s\n", dlerror());
            return;
        }
        auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library_, "getCreators"));
        creators_ = get(creator_count_);
    }

    void run(std::string const& line) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        if (command == "finder") return set_finder(words);
        if (command == "set") return set_variable(words);
        if (command == "create") return create(words);
        if (command == "roundtrip") return round_trip();
        if (command == "tensor") return add_tensor(words);
        if (command == "names") return print_names();
        if (command == "clear") return clear();
        if (!plugin_) return void(std::printf("%s without a plugin\n", command.c_str()));
        call(command);
    }

private:
    void set_finder(std::istringstream& words) {
        std::string layout;
        words >> layout;
        auto set = reinterpret_cast<void (*)(void*)>(dlsym(library_, "setLoggerFinder"));
        static OldFinder old_finder;
        static NewFinder new_finder;
        set(layout == "old" ? static_cast<void*>(static_cast<ILoggerFinder*>(&old_finder))
                            : static_cast<void*>(static_cast<v_1_0::ILoggerFinder*>(&new_finder)));
    }

    static void set_variable(std::istringstream& words) {
        std::string name, value;
        words >> name >> value;
        setenv(name.c_str(), value.c_str(), 1);
    }

    IPluginCreatorV3One* creator(std::string const& op) const {
        for (int32_t i = 0; i < creator_count_; ++i) {
            auto* each = static_cast<IPluginCreatorV3One*>(creators_[i]);
            if (op == each->getPluginName()) {
                return each;
            }
        }
        return nullptr;
    }

    void create(std::istringstream& words) {
        std::string phase;
        words >> op_ >> phase;
        Fields fields;
        for (std::string field; words >> field;) {
            fields.add(field);
        }
        PluginFieldCollection const collection = fields.collection();
        if (phase == "engine") {
            use(creator(op_)->createPlugin("layer", &collection, TensorRTPhase::kBUILD));
            make(*runtime_->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        } else {
            make(collection, phase == "build" ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
        }
    }

    void make(PluginFieldCollection const& collection, TensorRTPhase phase) {
        IPluginV3* made = creator(op_)->createPlugin("layer", &collection, phase);
        std::printf("create %s\n", made ? "ok" : "null");
        use(made);
    }

    void use(IPluginV3* plugin) {
        plugin_ = plugin;
        if (plugin) {
            core_ = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
            build_ = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
            runtime_ =
                static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        }
    }

    void round_trip() {
        PluginFieldCollection const* fields = runtime_->getFieldsToSerialize();
        for (int32_t i = 0; i < fields->nbFields; ++i) {
            PluginField const& field = fields->fields[i];
            std::printf("field %s %d %d", field.name, static_cast<int>(field.type), field.length);
            if (field.type == PluginFieldType::kINT32) std::printf(" %d", *static_cast<int32_t const*>(field.data));
            if (field.type == PluginFieldType::kFLOAT32) std::printf(" %g", *static_cast<float const*>(field.data));
            if (field.type == PluginFieldType::kCHAR) {
                std::printf(" %.*s", field.length, static_cast<char const*>(field.data));
            }
            std::printf("\n");
        }
        make(*fields, TensorRTPhase::kRUNTIME);
    }

    void add_tensor(std::istringstream& words) {
        std::string side, type;
        unsigned long long address = 0;
        words >> side >> type >> std::hex >> address >> std::dec;
        PluginTensorDesc desc{};
        desc.type = type_from(type);
        desc.format = TensorFormat::kLINEAR;
        desc.scale = -1.0F;
        for (int64_t size; words >> size;) {
            desc.dims.d[desc.dims.nbDims++] = size;
        }
        bool const is_input = side == "in";
        (is_input ? inputs_ : outputs_).push_back(desc);
        (is_input ? input_addresses_ : output_addresses_).push_back(reinterpret_cast<void*>(address));
    }

    void clear() {
        inputs_.clear();
        outputs_.clear();
        input_addresses_.clear();
        output_addresses_.clear();
    }

    void print_names() {
        for (int32_t i = 0; i < creator_count_; ++i) {
            auto* each = static_cast<IPluginCreatorV3One*>(creators_[i]);
            std::printf(
                "creator %s '%s' '%s'", each->getPluginName(), each->getPluginVersion(), each->getPluginNamespace());
            PluginFieldCollection const* fields = each->getFieldNames();
            for (int32_t f = 0; f < fields->nbFields; ++f) {
                std::printf(" %s:%d", fields->fields[f].name, static_cast<int>(fields->fields[f].type));
            }
            std::printf("\n");
        }
    }

    static std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& descs) {
        std::vector<DynamicPluginTensorDesc> result;
        for (auto const& desc : descs) {
            result.push_back({desc, desc.dims, desc.dims, desc.dims});
        }
        return result;
    }

    void call(std::string const& command) {
        auto const inputs = dynamic(inputs_), outputs = dynamic(outputs_);
        auto const input_count = static_cast<int32_t>(inputs.size()),
                   output_count = static_cast<int32_t>(outputs.size());
        long result = -1;
        if (command == "types") return print_types();
        if (command == "formats") return print_formats(inputs, outputs);
        if (command == "aliases") return print_aliases();
        if (command == "configure") {
            result = build_->configurePlugin(inputs.data(), input_count, outputs.data(), output_count);
        } else if (command == "workspace") {
            result =
                static_cast<long>(build_->getWorkspaceSize(inputs.data(), input_count, outputs.data(), output_count));
        } else if (command == "attach") {
            IPluginV3* attached = runtime_->attachToContext(nullptr);
            result = attached ? 0 : 1;
            use(attached);
        } else if (command == "reshape") {
            result = runtime_->onShapeChange(inputs_.data(), input_count, outputs_.data(), output_count);
        } else if (command == "enqueue") {
            result = runtime_->enqueue(inputs_.data(), outputs_.data(), input_addresses_.data(),
                output_addresses_.data(), reinterpret_cast<void*>(0x900000000), reinterpret_cast<cudaStream_t>(0x57));
        }
        std::printf("%s %ld\n", command.c_str(), result);
    }

    void print_types() {
        std::vector<DataType> inputs, outputs(static_cast<size_t>(build_->getNbOutputs()));
        for (auto const& desc : inputs_) {
            inputs.push_back(desc.type);
        }
        int32_t const result = build_->getOutputDataTypes(
            outputs.data(), static_cast<int32_t>(outputs.size()), inputs.data(), static_cast<int32_t>(inputs.size()));
        std::printf("types %d", result);
        for (size_t i = 0; result == 0 && i < outputs.size(); ++i) {
            std::printf(" %d", static_cast<int>(outputs[i]));
        }
        std::printf("\n");
    }

    void print_formats(std::vector<DynamicPluginTensorDesc> all, std::vector<DynamicPluginTensorDesc> const& outputs) {
        all.insert(all.end(), outputs.begin(), outputs.end());
        std::printf("formats");
        for (size_t i = 0; i < all.size(); ++i) {
            auto supports = [&] {
                return build_->supportsFormatCombination(static_cast<int32_t>(i), all.data(),
                    static_cast<int32_t>(inputs_.size()), static_cast<int32_t>(outputs_.size()));
            };
            bool const linear = supports();
            all[i].desc.format = TensorFormat::kCHW32;
            bool const packed = supports();
            all[i].desc.format = TensorFormat::kLINEAR;
            std::printf(" %d%d", linear, packed);
        }
        std::printf("\n");
    }

    void print_aliases() {
        std::printf("aliases");
        for (int32_t i = 0; i < build_->getNbOutputs(); ++i) {
            std::printf(" %d", build_->getAliasedInput(i));
        }
        std::printf(" | %s | %s\n", build_->getMetadataString(), build_->getTimingCacheID());
    }

    void* library_;
    IPluginCreatorInterface* const* creators_ = nullptr;
    int32_t creator_count_ = 0;
    std::string op_;
    IPluginV3* plugin_ = nullptr;
    IPluginV3OneCore* core_ = nullptr;
    IPluginV3OneBuildV2* build_ = nullptr;
    IPluginV3OneRuntime* runtime_ = nullptr;
    std::vector<PluginTensorDesc> inputs_, outputs_;
    std::vector<void*> input_addresses_, output_addresses_;
};

}  // namespace

int main(int, char** arguments) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    Driver driver(arguments[1]);
    for (std::string line; std::getline(std::cin, line);) {
        driver.run(line);
    }
}
