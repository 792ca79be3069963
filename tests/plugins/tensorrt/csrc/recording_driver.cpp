// A libcuda.so.1 that runs nothing and prints one line a call: what would be loaded and launched, with every argument.
//
// FAKE_DEVICE, FAKE_SM and FAKE_SHARED say what chip it plays, FAKE_CUDA the newest CUDA it knows (12040 is 12.4);
// FAKE_BLOCKS how many blocks of a kernel each of its 132 multiprocessors runs at a time;
// FAKE_PARAMS names a file with one line a kernel: its
// name, then its parameters' sizes in bytes. Images are taken for text, and are named by it.
#include "cuda_driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#define EXPORT __attribute__((visibility("default")))

namespace {

struct Kernel {
    std::string image, name;
};

int from_environment(char const* name, int otherwise) {
    char const* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

// e.g. "8:00007f00 4:00000010": size and bytes, as one hexadecimal number, of each parameter.
std::string describe_params(std::string const& kernel, void** params) {
    std::ifstream file(std::getenv("FAKE_PARAMS"));
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string name, described;
        words >> name;
        if (name != kernel) {
            continue;
        }
        for (int size, i = 0; words >> size; ++i) {
            unsigned long long value = 0;
            std::memcpy(&value, params[i], static_cast<size_t>(size));
            char text[32];
            std::snprintf(text, sizeof(text), "%s%d:%llx", i ? " " : "", size, value);
            described += text;
        }
        return described;
    }
    return "unknown kernel";
}

}  // namespace

extern "C" {

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

EXPORT CUresult cuDriverGetVersion(int* version) {
    *version = from_environment("FAKE_CUDA", 13000);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult, char const** text) {
    *text = "as the test asked";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    *device = from_environment("FAKE_DEVICE", 0);
    return from_environment("FAKE_NO_CONTEXT", 0) ? 201 : CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
    int const sm = from_environment("FAKE_SM", 86);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = sm / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = sm % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = from_environment("FAKE_SHARED", 232448); break;
    default: return 1;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(
    CUlibrary* library, void const* image, int*, void**, unsigned, int*, void**, unsigned) {
    auto const* text = static_cast<char const*>(image);
    std::printf("load %s\n", text);
    *library = reinterpret_cast<CUlibrary>(const_cast<char*>(text));
    return std::getenv("FAKE_BAD_IMAGE") && std::strstr(text, std::getenv("FAKE_BAD_IMAGE")) ? 209 : CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryUnload(CUlibrary library) {
    std::printf("unload %s\n", reinterpret_cast<char const*>(library));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, char const* name) {
    *kernel = reinterpret_cast<CUkernel>(new Kernel{reinterpret_cast<char const*>(library), name});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device) {
    std::printf("attribute %s %d = %d on device %d\n", reinterpret_cast<Kernel*>(kernel)->image.c_str(), attribute,
        value, device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncLoad(CUfunction function) {
    std::printf("ready %s\n", reinterpret_cast<Kernel*>(function)->image.c_str());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
    *blocks = from_environment("FAKE_BLOCKS", 2);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(CUlaunchConfig const* config, CUfunction function, void** params, void** extra) {
    auto const* kernel = reinterpret_cast<Kernel*>(function);
    auto const& c = *config;
    std::printf("launch %s | %s | %u %u %u | %u %u %u | %u | %p | %s%s", kernel->name.c_str(), kernel->image.c_str(),
        c.grid_x, c.grid_y, c.grid_z, c.block_x, c.block_y, c.block_z, c.shared_bytes, static_cast<void*>(c.stream),
        describe_params(kernel->name, params).c_str(), extra ? " extra" : "");
    for (unsigned i = 0; i < c.attribute_count; ++i) {
        std::printf(" | attribute %d = %d", c.attributes[i].id,
            c.attributes[i].value.programmatic_stream_serialization_allowed);
    }
    std::printf("\n");
    return from_environment("FAKE_LAUNCH_FAILS", 0) ? 700 : CUDA_SUCCESS;
}
}
