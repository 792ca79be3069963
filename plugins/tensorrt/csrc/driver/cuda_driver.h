// The part of the CUDA driver's C interface that is used here, so that no CUDA toolkit is needed.
// Values and signatures: CUDA Driver API reference; stable since CUDA 12.4.
#pragma once

#include <cuda_runtime_api.h>
#include <cstddef>

extern "C" {

using CUdevice = int;
using CUresult = int;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;

struct CUlaunchAttribute {
    int id;
    char padding[4];
    union {
        char bytes[64];
        void* pointer;  // for its alignment
        int programmatic_stream_serialization_allowed;
    } value;
};

struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    cudaStream_t stream;
    CUlaunchAttribute* attributes;
    unsigned attribute_count;
};

constexpr CUresult CUDA_SUCCESS = 0;

constexpr int CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6;

constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

CUresult cuInit(unsigned flags);
CUresult cuDriverGetVersion(int* version);
CUresult cuGetErrorString(CUresult error, char const** text);
CUresult cuCtxGetDevice(CUdevice* device);
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device);
CUresult cuLibraryLoadData(CUlibrary* library, void const* image, int* jit_options, void** jit_values,
    unsigned jit_count, int* library_options, void** library_values, unsigned library_count);
CUresult cuLibraryUnload(CUlibrary library);
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, char const* name);
CUresult cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device);
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel);
CUresult cuFuncLoad(CUfunction function);
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, CUfunction function, int block_threads, size_t dynamic_shared_bytes);
CUresult cuLaunchKernelEx(CUlaunchConfig const* config, CUfunction function, void** params, void** extra);
}
