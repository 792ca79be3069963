// The CUDA driver, opened when first needed: the library loads, and engines build, on machines that have none.
#pragma once

#include "cuda_driver.h"

#include <cstdint>

namespace deepseek_trt {

// Every entry point that is used, from libcuda.so.1. A call that fails throws Error.
struct Driver {
    static Driver const& get();

    void check(CUresult result, char const* call) const;

    decltype(&::cuInit) cuInit;
    decltype(&::cuGetErrorString) cuGetErrorString;
    decltype(&::cuCtxGetDevice) cuCtxGetDevice;
    decltype(&::cuDeviceGetAttribute) cuDeviceGetAttribute;
    decltype(&::cuLibraryLoadData) cuLibraryLoadData;
    decltype(&::cuLibraryUnload) cuLibraryUnload;
    decltype(&::cuLibraryGetKernel) cuLibraryGetKernel;
    decltype(&::cuKernelSetAttribute) cuKernelSetAttribute;
    decltype(&::cuKernelGetFunction) cuKernelGetFunction;
    decltype(&::cuFuncLoad) cuFuncLoad;
    decltype(&::cuLaunchKernel) cuLaunchKernel;

private:
    Driver();
};

// The calling thread's current device.
struct Device {
    static Device current();

    CUdevice ordinal;
    int32_t sm;                // e.g. 86
    int32_t max_shared_bytes;  // a block may ask for at most this much
};

// One loaded image, unloaded at the end of its life.
class Library {
public:
    explicit Library(void const* image);
    Library(Library&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
    Library(Library const&) = delete;
    Library& operator=(Library const&) = delete;
    Library& operator=(Library&&) = delete;
    ~Library();

    CUkernel kernel(char const* entry) const;

private:
    CUlibrary handle_ = nullptr;
};

}  // namespace deepseek_trt
