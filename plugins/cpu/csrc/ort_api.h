// The few parts of ONNX Runtime's C interface that a custom-op library needs, as its documentation describes them.
//
// OrtApi is a table of functions that only ever grows at its end, so a function's place in it never changes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;
using Table = const void* const*;

struct ApiBase {
    Table (*get_api)(uint32_t version);
    const char* (*get_version)();
};

constexpr uint32_t API_VERSION = 16;  // of CustomOp below; ONNX Runtime serves every older version

enum class Place : int {
    CreateStatus = 0,
    CreateCustomOpDomain = 26,
    CustomOpDomain_Add = 27,
    AddCustomOpDomain = 28,
    GetTensorMutableData = 51,
    GetTensorElementType = 60,
    GetDimensionsCount = 61,
    GetDimensions = 62,
    GetTensorTypeAndShape = 65,
    KernelInfoGetAttribute_float = 85,
    KernelInfoGetAttribute_int64 = 86,
    KernelContext_GetInputCount = 88,
    KernelContext_GetInput = 90,
    KernelContext_GetOutput = 91,
    ReleaseStatus = 93,
    ReleaseTensorTypeAndShapeInfo = 99,
};

enum ElementType : int { UNDEFINED = 0, FLOAT = 1, INT32 = 6, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };

struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, Table, const KernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider)(const CustomOp*);
    int (*get_input_type)(const CustomOp*, size_t);
    size_t (*get_input_count)(const CustomOp*);
    int (*get_output_type)(const CustomOp*, size_t);
    size_t (*get_output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    int (*get_input_characteristic)(const CustomOp*, size_t);
    int (*get_output_characteristic)(const CustomOp*, size_t);
    int (*get_input_memory)(const CustomOp*, size_t);
    int (*get_variadic_input_min)(const CustomOp*);
    int (*get_variadic_input_homogeneous)(const CustomOp*);
    int (*get_variadic_output_min)(const CustomOp*);
    int (*get_variadic_output_homogeneous)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, Table, const KernelInfo*, void**);
    Status* (*compute_v2)(void*, KernelContext*);
    const void* later[8];  // of later versions, which this library does not speak
};

// The functions of one table, typed.
class Api {
public:
    explicit Api(Table table) : table_(table) {}

    Status* error(const char* words) const {
        return call<Status*, int, const char*>(Place::CreateStatus, 1, words);  // 1: fail
    }
    template <class Result, class... Arguments>
    Result call(Place place, Arguments... arguments) const {
        using Function = Result (*)(Arguments...);
        return reinterpret_cast<Function>(const_cast<void*>(table_[static_cast<int>(place)]))(arguments...);
    }

private:
    Table table_;
};

}  // namespace ort
