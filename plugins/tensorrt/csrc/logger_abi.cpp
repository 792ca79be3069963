#include "logger_abi.h"

#include <cstdint>
#include <cstring>

namespace deepseek_trt {
namespace {

using Severity = nvinfer1::ILogger::Severity;

struct OldFinder {
    virtual void* findLogger() = 0;

protected:
    virtual ~OldFinder() = default;
};

struct NewFinder : nvinfer1::IVersionedInterface {
    virtual void* findLogger() = 0;
};

struct OldLogger {
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~OldLogger() = default;
};

struct NewLogger : nvinfer1::IVersionedInterface {
    virtual void log(Severity severity, char const* message) noexcept = 0;
};

// A class's run-time type information as it lies in memory (Itanium C++ ABI, section 2.9.5). Not std::type_info: this
// library's and TensorRT's come from different C++ libraries.
struct TypeInfo {
    void const* const* virtual_table;  // of one of three kinds: no base, one base, many bases
    char const* name;
};

struct OneBase : TypeInfo {
    TypeInfo const* base;
};

struct ManyBases : TypeInfo {
    uint32_t flags;
    uint32_t count;
    struct {
        TypeInfo const* type;
        long offset_and_flags;
    } bases[1];
};

TypeInfo const* type_of(void const* const* virtual_table) { return static_cast<TypeInfo const*>(virtual_table[-1]); }

bool is_a(TypeInfo const* type, char const* name) {
    if (!type) {
        return false;
    }
    if (!std::strcmp(type->name, name)) {
        return true;
    }
    char const* kind = type_of(type->virtual_table)->name;
    if (std::strstr(kind, "__si_class_type_info")) {
        return is_a(static_cast<OneBase const*>(type)->base, name);
    }
    if (std::strstr(kind, "__vmi_class_type_info")) {
        auto const* many = static_cast<ManyBases const*>(type);
        for (uint32_t i = 0; i < many->count; ++i) {
            if (is_a(many->bases[i].type, name)) {
                return true;
            }
        }
    }
    return false;
}

bool object_is_a(void* object, char const* name) {
    return is_a(type_of(*static_cast<void const* const**>(object)), name);
}

void* find_logger(void* finder) {
    if (object_is_a(finder, "N8nvinfer15v_1_013ILoggerFinderE")) {
        return static_cast<NewFinder*>(finder)->findLogger();
    }
    if (object_is_a(finder, "N8nvinfer113ILoggerFinderE")) {
        return static_cast<OldFinder*>(finder)->findLogger();
    }
    return nullptr;
}

}  // namespace

bool log_through(void* finder, Severity severity, char const* message) noexcept {
    try {
        void* logger = finder ? find_logger(finder) : nullptr;
        if (logger && object_is_a(logger, "N8nvinfer15v_1_07ILoggerE")) {
            static_cast<NewLogger*>(logger)->log(severity, message);
            return true;
        }
        if (logger && object_is_a(logger, "N8nvinfer17ILoggerE")) {
            static_cast<OldLogger*>(logger)->log(severity, message);
            return true;
        }
    } catch (...) {  // findLogger is not noexcept
    }
    return false;
}

}  // namespace deepseek_trt
