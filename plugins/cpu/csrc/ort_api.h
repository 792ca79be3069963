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
struct CustomOp;
using Table = const void* const*;

struct ApiBase {
    Table (*get_api)(uint32_t version);
    const char* (*get_version)();
};

constexpr uint32_t API_VERSION = 16;  // of CustomOp below; ONNX Runtime serves every older version

// One function of OrtApi: its type, and its place in the table.
template <class Type>
struct Function {
    int place;
};

constexpr Function<Status*(int code, const char* words)> CreateStatus{0};
constexpr Function<Status*(const char* name, Domain**)> CreateCustomOpDomain{26};
constexpr Function<Status*(Domain*, const CustomOp*)> CustomOpDomain_Add{27};
constexpr Function<Status*(SessionOptions*, Domain*)> AddCustomOpDomain{28};
constexpr Function<Status*(const Value*, void** data)> GetTensorMutableData{51};
constexpr Function<Status*(const ShapeInfo*, int* type)> GetTensorElementType{60};
constexpr Function<Status*(const ShapeInfo*, size_t* rank)> GetDimensionsCount{61};
constexpr Function<Status*(const ShapeInfo*, int64_t* dims, size_t rank)> GetDimensions{62};
constexpr Function<Status*(const Value*, ShapeInfo**)> GetTensorTypeAndShape{65};
constexpr Function<Status*(const KernelInfo*, const char* name, float*)> KernelInfoGetAttribute_float{85};
constexpr Function<Status*(const KernelInfo*, const char* name, int64_t*)> KernelInfoGetAttribute_int64{86};
constexpr Function<Status*(const KernelContext*, size_t* count)> KernelContext_GetInputCount{88};
constexpr Function<Status*(const KernelContext*, size_t index, const Value**)> KernelContext_GetInput{90};
constexpr Function<Status*(KernelContext*, size_t index, const int64_t* dims, size_t rank, Value**)>
    KernelContext_GetOutput{91};
constexpr Function<void(Status*)> ReleaseStatus{93};
constexpr Function<void(ShapeInfo*)> ReleaseTensorTypeAndShapeInfo{99};

enum ElementType : int {
    UNDEFINED = 0,
    FLOAT = 1,
    UINT8 = 2,
    INT8 = 3,
    INT32 = 6,
    INT64 = 7,
    FLOAT16 = 10,
    BFLOAT16 = 16
};
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

// Calls the functions of one table.
class Api {
public:
    explicit Api(Table table) : table_(table) {}

    template <class Result, class... Taken, class... Given>
    Result call(Function<Result(Taken...)> function, Given... given) const {
        return reinterpret_cast<Result (*)(Taken...)>(const_cast<void*>(table_[function.place]))(given...);
    }
    Status* error(const char* words) const { return call(CreateStatus, 1, words); }  // 1: fail

private:
    Table table_;
};

}  // namespace ort
