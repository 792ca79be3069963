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
        return get(ort::Place::KernelInfoGetAttribute_int64, name, &value);
    }
    int64_t number(const char* name) const { return needed<int64_t>(ort::Place::KernelInfoGetAttribute_int64, name); }
    float real(const char* name) const { return needed<float>(ort::Place::KernelInfoGetAttribute_float, name); }

private:
    template <class T>
    T needed(ort::Place place, const char* name) const {
        T value{};
        if (!get(place, name, &value)) throw std::runtime_error("attribute " + std::string(name) + " is missing");
        return value;
    }
    template <class T>
    bool get(ort::Place place, const char* name, T* value) const {
        auto* status = api_.call<ort::Status*, const ort::KernelInfo*, const char*, T*>(place, info_, name, value);
        if (status != nullptr) api_.call<void, ort::Status*>(ort::Place::ReleaseStatus, status);
        return status == nullptr;
    }

    const ort::Api& api_;
    const ort::KernelInfo* info_;
};

class InputReader {
public:
    InputReader(const ort::Api& api, const ort::KernelContext* context) : api_(api), context_(context) {
        api_.call<ort::Status*, const ort::KernelContext*, size_t*>(
            ort::Place::KernelContext_GetInputCount, context_, &count_);
    }

    // The next input, of this ONNX type; UNDEFINED stands for any that weights may have.
    void read(Tensor& t, const char* name, int type) {
        if (next_ == count_) refuse("input " + std::string(name) + " is missing");
        const ort::Value* value = nullptr;
        api_.call<ort::Status*, const ort::KernelContext*, size_t, const ort::Value**>(
            ort::Place::KernelContext_GetInput, context_, next_++, &value);
        api_.call<ort::Status*, const ort::Value*, void**>(
            ort::Place::GetTensorMutableData, value, reinterpret_cast<void**>(const_cast<char**>(&t.data)));
        const int found = read_shape(t, value);
        const bool is_float = found == ort::FLOAT || found == ort::FLOAT16 || found == ort::BFLOAT16;
        if (type == ort::UNDEFINED ? !is_float : found != type)
            refuse("input " + std::string(name) + " is of another type, ONNX's number " + std::to_string(found));
    }
    void end() const {
        if (next_ < count_) refuse("it takes " + std::to_string(next_) + " inputs");
    }

private:
    [[noreturn]] void refuse(const std::string& why) const {
        throw std::runtime_error(why + "; the node has " + std::to_string(count_) + " inputs");
    }
    int read_shape(Tensor& t, const ort::Value* value) const {
        ort::ShapeInfo* info = nullptr;
        int type = 0;
        size_t rank = 0;
        api_.call<ort::Status*, const ort::Value*, ort::ShapeInfo**>(ort::Place::GetTensorTypeAndShape, value, &info);
        api_.call<ort::Status*, const ort::ShapeInfo*, int*>(ort::Place::GetTensorElementType, info, &type);
        api_.call<ort::Status*, const ort::ShapeInfo*, size_t*>(ort::Place::GetDimensionsCount, info, &rank);
        rank = rank < Tensor::MOST_DIMS ? rank : Tensor::MOST_DIMS;
        api_.call<ort::Status*, const ort::ShapeInfo*, int64_t*, size_t>(ort::Place::GetDimensions, info, t.dims, rank);
        api_.call<void, ort::ShapeInfo*>(ort::Place::ReleaseTensorTypeAndShapeInfo, info);
        t.type = static_cast<Type>(type);
        t.rows = 1;
        for (size_t i = 0; i + 1 < rank; ++i) t.rows *= t.dims[i];
        t.columns = rank ? t.dims[rank - 1] : 1;
        return type;
    }

    const ort::Api& api_;
    const ort::KernelContext* context_;
    size_t next_ = 0, count_ = 0;
};
