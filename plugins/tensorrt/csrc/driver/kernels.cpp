#include "kernels.h"

#include "log.h"

#include <cstdio>

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
    CUlaunchAttribute early{};
    early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    early.value.programmatic_stream_serialization_allowed = 1;
    CUlaunchConfig const config{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
        static_cast<unsigned>(grid.z), static_cast<unsigned>(binary.threads), 1, 1,
        static_cast<unsigned>(binary.shared_bytes), stream, &early, binary.overlaps ? 1u : 0u};
    driver.check(driver.cuLaunchKernelEx(&config, function, params, nullptr), binary.entry);
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

int32_t resident_blocks(Binary const& binary, CUkernel kernel, Device const& device) {
    Driver const& driver = Driver::get();
    int blocks = 0;
    driver.check(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<CUfunction>(kernel),
                     binary.threads, static_cast<size_t>(binary.shared_bytes)),
        "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks * device.multiprocessors;
}

void check_aligned(char const* kernel, char const* argument, uint64_t address, int64_t alignment) {
    if (address % static_cast<uint64_t>(alignment)) {
        char text[32];
        std::snprintf(text, sizeof(text), "%#llx", static_cast<unsigned long long>(address));
        throw Error(std::string(kernel) + ": " + argument + " lies at " + text + ", which is no multiple of "
            + std::to_string(alignment) + " bytes, as its compiled code takes it to be; bind memory that is aligned");
    }
}

void warn_of_fallback(char const* op, Target target, Device const& device, std::string const& failure) {
    std::string const kind = target.is_ptx ? "PTX for SM " : "binaries for SM ";
    log_warning("deepseek-trt: " + std::string(op) + " runs " + kind + std::to_string(target.sm) + " on this GPU (sm_"
        + std::to_string(device.sm) + "), slower than it could: the better code does not load (" + failure
        + "); the driver knows CUDA " + Driver::get().cuda_version() + ", the binaries need driver " + kNeededDriver
        + " or newer");
}

void throw_no_target(char const* kernel, Device const& device, std::string const& failure) {
    std::string const sm = std::to_string(device.sm);
    if (!failure.empty()) {
        throw Error(failure + "; no code for " + kernel + " loads on this GPU (sm_" + sm + "): the driver knows CUDA "
            + Driver::get().cuda_version() + ", the binaries need driver " + kNeededDriver + " or newer");
    }
    throw Error("this plugin library has no " + std::string(kernel) + " for this GPU (sm_" + sm + ", "
        + std::to_string(device.max_shared_bytes) + " bytes of shared memory a block); run `deepseek-trt plugins --sm "
        + sm + "` and build the plans again");
}

void throw_too_many_tokens(char const* kernel, int64_t tokens, int64_t largest) {
    throw Error(std::string(kernel) + " was compiled for at most " + std::to_string(largest) + " tokens, not "
        + std::to_string(tokens));
}

}  // namespace deepseek_trt
