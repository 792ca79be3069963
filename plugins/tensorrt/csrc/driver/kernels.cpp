#include "kernels.h"

#include "log.h"

namespace deepseek_trt {
namespace {
constexpr int32_t kSharedWithoutAsking = 48 * 1024;
}

void launch_params(Binary const& binary, CUkernel kernel, Grid grid, cudaStream_t stream, void** params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return;  // the driver refuses an empty grid
    }
    Driver const& driver = Driver::get();
    auto function = reinterpret_cast<CUfunction>(kernel);  // the driver takes either, and finds the context itself
    driver.check(driver.cuLaunchKernel(function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                     static_cast<unsigned>(grid.z), static_cast<unsigned>(binary.threads), 1, 1,
                     static_cast<unsigned>(binary.shared_bytes), stream, params, nullptr),
        binary.entry);
}

CUkernel load_kernel(Library const& library, Binary const& binary, Device const& device) {
    Driver const& driver = Driver::get();
    CUkernel kernel = library.kernel(binary.entry);
    if (binary.shared_bytes > kSharedWithoutAsking) {
        driver.check(driver.cuKernelSetAttribute(
                         CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, binary.shared_bytes, kernel, device.ordinal),
            "cuKernelSetAttribute");
    }
    CUfunction function = nullptr;  // libraries load lazily; asking for the function in this context ends that
    driver.check(driver.cuKernelGetFunction(&function, kernel), "cuKernelGetFunction");
    driver.check(driver.cuFuncLoad(function), "cuFuncLoad");
    return kernel;
}

void throw_no_target(char const* kernel, Device const& device) {
    std::string const sm = std::to_string(device.sm);
    throw Error("this plugin library has no " + std::string(kernel) + " for this GPU (sm_" + sm + ", "
        + std::to_string(device.max_shared_bytes) + " bytes of shared memory a block); run `deepseek-trt plugins --sm "
        + sm + "` and build the plans again");
}

void throw_too_many_tokens(char const* kernel, int64_t tokens, int64_t largest) {
    throw Error(std::string(kernel) + " was compiled for at most " + std::to_string(largest) + " tokens, not "
        + std::to_string(tokens));
}

}  // namespace deepseek_trt
