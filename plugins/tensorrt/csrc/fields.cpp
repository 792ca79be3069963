#include "fields.h"

#include "log.h"

#include <algorithm>
#include <cstring>

namespace deepseek_trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::string name_of(PluginFieldType type) {
    switch (type) {
    case PluginFieldType::kFLOAT32: return "float32";
    case PluginFieldType::kINT32: return "int32";
    case PluginFieldType::kCHAR: return "a string";
    case PluginFieldType::kINT64: return "int64";
    case PluginFieldType::kFLOAT64: return "float64";
    default: return "field type " + std::to_string(static_cast<int32_t>(type));
    }
}

std::string quoted(char const* name) { return "attribute \"" + std::string(name) + "\""; }

}  // namespace

PluginField const* FieldReader::find(char const* name) {
    known_.emplace_back(name);
    for (int32_t i = 0; fields_ && i < fields_->nbFields; ++i) {
        if (fields_->fields[i].name && !std::strcmp(fields_->fields[i].name, name)) {
            return &fields_->fields[i];
        }
    }
    return nullptr;
}

PluginField const& FieldReader::get(char const* name, PluginFieldType type) {
    PluginField const* field = find(name);
    if (!field || !field->data) {
        throw Error(quoted(name) + " is missing: expected " + name_of(type) + "; export the bundle again");
    }
    bool const is_string = type == PluginFieldType::kCHAR;
    if (field->type != type || (!is_string && field->length != 1) || field->length < 0) {
        throw Error(quoted(name) + ": expected " + name_of(type) + (is_string ? "" : " of length 1") + ", found "
            + name_of(field->type) + " of length " + std::to_string(field->length) + "; export the bundle again");
    }
    return *field;
}

void FieldReader::operator()(char const* name, int32_t& value) {
    value = *static_cast<int32_t const*>(get(name, PluginFieldType::kINT32).data);
}

void FieldReader::operator()(char const* name, float& value) {
    value = *static_cast<float const*>(get(name, PluginFieldType::kFLOAT32).data);
}

void FieldReader::operator()(char const* name, std::string& value) {
    PluginField const& field = get(name, PluginFieldType::kCHAR);
    auto const* text = static_cast<char const*>(field.data);
    value.assign(text, strnlen(text, static_cast<size_t>(field.length)));  // some writers count the closing NUL
}

void FieldReader::library(std::string const& id, nvinfer1::TensorRTPhase phase) {
    if (!find(kLibraryField)) {
        if (phase == nvinfer1::TensorRTPhase::kBUILD) {
            return;
        }
        throw Error("the plan does not say which plugin library it was built with; build it again");
    }
    std::string found;
    (*this)(kLibraryField, found);
    if (found != id) {
        throw Error("the plan was built with plugin library " + found + ", but this one is " + id
            + "; load that library, or build the plan again");
    }
}

void FieldReader::finish() const {
    for (int32_t i = 0; fields_ && i < fields_->nbFields; ++i) {
        char const* name = fields_->fields[i].name;
        if (!name || std::find(known_.begin(), known_.end(), name) == known_.end()) {
            throw Error(quoted(name ? name : "") + " is unknown; export the bundle with this version of deepseek-trt");
        }
    }
}

void FieldWriter::operator()(char const* name, int32_t const& value) {
    fields_.emplace_back(name, &value, PluginFieldType::kINT32, 1);
}

void FieldWriter::operator()(char const* name, float const& value) {
    fields_.emplace_back(name, &value, PluginFieldType::kFLOAT32, 1);
}

void FieldWriter::operator()(char const* name, std::string const& value) {
    fields_.emplace_back(name, value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
}

nvinfer1::PluginFieldCollection const* FieldWriter::fields() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
}

}  // namespace deepseek_trt
