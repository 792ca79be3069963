// Reads what a node of the graph gives its operator: attributes once, inputs at every call. What is missing, left over
// or of another type is refused by its name.
#pragma once

#include <stdexcept>
#include <string>

#include "args.h"
#include "ort_api.h"

// One input as rows of its last dimension, and its shape.
struct Tensor : Matrix {
    static constexpr size_t MOST_DIMS = 4;
    int64_t dims[MOST_DIMS] = {};
    size_t rank = 0;  // how many of dims there are

    template <class T>
    const T* as() const {
        return reinterpret_cast<const T*>(data);
    }
};

class AttributeReader {
public:
    AttributeReader(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}

    bool has(const char* name) const {
        int64_t value;
        return get(value, name);
    }
    template <class T>
    void read(T& value, const char* name) const {
        if (!get(value, name)) throw std::runtime_error("attribute " + std::string(name) + " is missing");
    }

private:
    bool get(int64_t& value, const char* name) const {
        return is_ok(api_.call(ort::KernelInfoGetAttribute_int64, info_, name, &value));
    }
    bool get(float& value, const char* name) const {
        return is_ok(api_.call(ort::KernelInfoGetAttribute_float, info_, name, &value));
    }
    bool is_ok(ort::Status* status) const {
        if (status != nullptr) api_.call(ort::ReleaseStatus, status);
        return status == nullptr;
    }

    const ort::Api& api_;
    const ort::KernelInfo* info_;
};

class InputReader {
public:
    InputReader(const ort::Api& api, const ort::KernelContext* context) : api_(api), context_(context) {
        api_.call(ort::KernelContext_GetInputCount, context_, &count_);
    }

    // The next input as floats; or as codes, int8, or two or one of fp8 in a uint8, and right behind them their scales,
    // float16, or float32 of fp8.
    void read_linear(Tensor& t, const char* name) {
        const int type = read_any(t, name);
        if (type != ort::INT8 && type != ort::UINT8) return check(type, name, ort::UNDEFINED);
        Tensor scales;
        const std::string scales_name = std::string(name) + "_scale";
        const int scale_type = read_any(scales, scales_name.c_str());
        const bool is_fp8 = type == ort::UINT8 && scale_type == ort::FLOAT;
        if (!is_fp8) check(scale_type, scales_name.c_str(), ort::FLOAT16);
        t.format = is_fp8 ? Format::FP8 : type == ort::INT8 ? Format::INT8 : Format::INT4;
        if (t.format == Format::INT4) t.columns *= 2;
        t.scales = scales.data, t.scale_rows = scales.rows, t.scale_columns = scales.columns;
    }

    // The next input, of this ONNX type; UNDEFINED stands for any that weights may have.
    void read(Tensor& t, const char* name, int type) { check(read_any(t, name), name, type); }

    void end() const {
        if (next_ < count_) refuse("it takes " + std::to_string(next_) + " inputs");
    }

private:
    int read_any(Tensor& t, const char* name) {
        if (next_ == count_) refuse("input " + std::string(name) + " is missing");
        const ort::Value* value = nullptr;
        api_.call(ort::KernelContext_GetInput, context_, next_++, &value);
        api_.call(ort::GetTensorMutableData, value, reinterpret_cast<void**>(const_cast<char**>(&t.data)));
        return read_shape(t, value);
    }
    void check(int found, const char* name, int type) const {
        const bool is_float = found == ort::FLOAT || found == ort::FLOAT16 || found == ort::BFLOAT16;
        if (type == ort::UNDEFINED ? !is_float : found != type)
            refuse("input " + std::string(name) + " is of another type, ONNX's number " + std::to_string(found));
    }
    [[noreturn]] void refuse(const std::string& why) const {
        throw std::runtime_error(why + "; the node has " + std::to_string(count_) + " inputs");
    }
    int read_shape(Tensor& t, const ort::Value* value) const {
        ort::ShapeInfo* info = nullptr;
        int type = 0;
        size_t rank = 0;
        api_.call(ort::GetTensorTypeAndShape, value, &info);
        api_.call(ort::GetTensorElementType, info, &type);
        api_.call(ort::GetDimensionsCount, info, &rank);
        rank = rank < Tensor::MOST_DIMS ? rank : Tensor::MOST_DIMS;
        api_.call(ort::GetDimensions, info, t.dims, rank);
        api_.call(ort::ReleaseTensorTypeAndShapeInfo, info);
        t.type = static_cast<Type>(type), t.rank = rank;
        t.rows = 1;
        for (size_t i = 0; i + 1 < rank; ++i) t.rows *= t.dims[i];
        t.columns = rank ? t.dims[rank - 1] : 1;
        t.each = rank > 1 ? t.dims[rank - 2] : 1;
        return type;
    }

    const ort::Api& api_;
    const ort::KernelContext* context_;
    size_t next_ = 0, count_ = 0;
};
