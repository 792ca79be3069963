// The CUDA driver, opened when first needed: the library loads, and engines build, on machines that have none.
#pragma once

#include "cuda_driver.h"

#include <cstdint>
#include <string>

namespace deepseek_trt {

// What binaries made by the pinned ptxas (13.0) need; PTX of the library runs on older ones, too.
constexpr char const* kNeededDriver = "580 (CUDA 13)";

// Every entry point that is used, from libcuda.so.1. A call that fails throws Error.
struct Driver {
    static Driver const& get();

    void check(CUresult result, char const* call) const;
    // The newest CUDA that it knows, e.g. "12.4".
    std::string cuda_version() const;

    decltype(&::cuInit) cuInit;
    decltype(&::cuDriverGetVersion) cuDriverGetVersion;
    decltype(&::cuGetErrorString) cuGetErrorString;
    decltype(&::cuCtxGetDevice) cuCtxGetDevice;
    decltype(&::cuDeviceGetAttribute) cuDeviceGetAttribute;
    decltype(&::cuLibraryLoadData) cuLibraryLoadData;
    decltype(&::cuLibraryUnload) cuLibraryUnload;
    decltype(&::cuLibraryGetKernel) cuLibraryGetKernel;
    decltype(&::cuKernelSetAttribute) cuKernelSetAttribute;
    decltype(&::cuKernelGetFunction) cuKernelGetFunction;
    decltype(&::cuFuncLoad) cuFuncLoad;
    decltype(&::cuOccupancyMaxActiveBlocksPerMultiprocessor) cuOccupancyMaxActiveBlocksPerMultiprocessor;
    decltype(&::cuLaunchKernelEx) cuLaunchKernelEx;

private:
    Driver();
};

// The calling thread's current device.
struct Device {
    static Device current();

    CUdevice ordinal;
    int32_t sm;  // e.g. 86
    int32_t multiprocessors;
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
