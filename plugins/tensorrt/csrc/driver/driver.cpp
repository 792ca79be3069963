#include "driver.h"

#include "log.h"

#include <dlfcn.h>

#include <string>

namespace deepseek_trt {
namespace {

template <class Function>
void resolve(void* libcuda, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(libcuda, name));
    if (!function) {
        throw Error(std::string("the NVIDIA driver is too old: libcuda.so.1 has no ") + name + "; install driver "
            + kNeededDriver + " or newer");
    }
}

int attribute(int name, CUdevice device) {
    int value = 0;
    Driver const& driver = Driver::get();
    driver.check(driver.cuDeviceGetAttribute(&value, name, device), "cuDeviceGetAttribute");
    return value;
}

}  // namespace

Driver::Driver() {
    void* libcuda = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!libcuda) {
        throw Error("there is no NVIDIA driver (" + std::string(dlerror())
            + "); run on a machine with an NVIDIA GPU, and in a container with the GPU passed through");
    }
    resolve(libcuda, "cuInit", cuInit);
    resolve(libcuda, "cuDriverGetVersion", cuDriverGetVersion);
    resolve(libcuda, "cuGetErrorString", cuGetErrorString);
    resolve(libcuda, "cuCtxGetDevice", cuCtxGetDevice);
    resolve(libcuda, "cuDeviceGetAttribute", cuDeviceGetAttribute);
    resolve(libcuda, "cuLibraryLoadData", cuLibraryLoadData);
    resolve(libcuda, "cuLibraryUnload", cuLibraryUnload);
    resolve(libcuda, "cuLibraryGetKernel", cuLibraryGetKernel);
    resolve(libcuda, "cuKernelSetAttribute", cuKernelSetAttribute);
    resolve(libcuda, "cuKernelGetFunction", cuKernelGetFunction);
    resolve(libcuda, "cuFuncLoad", cuFuncLoad);
    resolve(libcuda, "cuOccupancyMaxActiveBlocksPerMultiprocessor", cuOccupancyMaxActiveBlocksPerMultiprocessor);
    resolve(libcuda, "cuLaunchKernelEx", cuLaunchKernelEx);
    check(cuInit(0), "cuInit");
}

Driver const& Driver::get() {
    static Driver const driver;  // a constructor that throws is tried again at the next call
    return driver;
}

void Driver::check(CUresult result, char const* call) const {
    if (result == CUDA_SUCCESS) {
        return;
    }
    char const* text = nullptr;
    cuGetErrorString(result, &text);
    throw Error(std::string("CUDA driver: ") + call + " failed: " + (text ? text : "unknown error") + " ("
        + std::to_string(result) + ")");
}

std::string Driver::cuda_version() const {
    int version = 0;
    check(cuDriverGetVersion(&version), "cuDriverGetVersion");
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Device Device::current() {
    Driver const& driver = Driver::get();
    Device device{};
    driver.check(driver.cuCtxGetDevice(&device.ordinal), "cuCtxGetDevice");
    device.sm = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device.ordinal)
        + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device.ordinal);
    device.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device.ordinal);
    device.max_shared_bytes = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device.ordinal);
    return device;
}

Library::Library(void const* image) {
    Driver const& driver = Driver::get();
    driver.check(
        driver.cuLibraryLoadData(&handle_, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
}

Library::~Library() {
    if (handle_) {
        Driver::get().cuLibraryUnload(handle_);
    }
}

CUkernel Library::kernel(char const* entry) const {
    Driver const& driver = Driver::get();
    CUkernel kernel = nullptr;
    driver.check(driver.cuLibraryGetKernel(&kernel, handle_, entry), "cuLibraryGetKernel");
    return kernel;
}

}  // namespace deepseek_trt
