// Kernels loaded onto a device, once each, and the typed way to launch them.
#pragma once

#include "binary.h"
#include "driver.h"
#include "error.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace deepseek_trt {

struct bf16;  // the element types of device memory, never looked into here
struct fp16;

// A device address that remembers what lies there.
template <class Element>
struct Ptr {
    uint64_t address = 0;
};

template <class Element>
Ptr<Element> ptr(void const* pointer) {
    return {reinterpret_cast<uint64_t>(pointer)};
}

// A kernel argument: takes a value of exactly this type, so that no conversion happens unseen.
template <class Value>
struct Exact {
    template <class Given, class = std::enable_if_t<std::is_same_v<Given, Value>>>
    Exact(Given given) : value(given) {}

    Value value;
};

struct Grid {
    int64_t x, y = 1, z = 1;
};

// One binary on one device.
template <class Kernel>
struct Loaded {
    typename Kernel::Row const* row;
    CUkernel kernel;
    int32_t resident;  // blocks that the device runs at a time

    Binary const& binary() const { return row->binary; }
    typename Kernel::Constants const& constants() const { return row->constants; }
};

void launch_params(Binary const& binary, CUkernel kernel, Grid grid, cudaStream_t stream, void** params);

// Loads the binary for `device` in full, so that launching it never loads anything.
CUkernel load_kernel(Library const& library, Binary const& binary, Device const& device);

// Blocks of a loaded kernel that the device runs at a time.
int32_t resident_blocks(Binary const& binary, CUkernel kernel, Device const& device);

// Throws where a pointer that a kernel was compiled to load from in 16 bytes at a time is not a multiple of them.
void check_aligned(char const* kernel, char const* argument, uint64_t address, int64_t alignment);

// Says that `target` runs instead of code that suits the device better but did not load, and why that did not.
void warn_of_fallback(char const* op, Target target, Device const& device, std::string const& failure);

// `failure` is what the first code that was tried met; empty where there is none for the device.
[[noreturn]] void throw_no_target(char const* kernel, Device const& device, std::string const& failure);
[[noreturn]] void throw_too_many_tokens(char const* kernel, int64_t tokens, int64_t largest);

// Ceiling division of sizes.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All buckets of one kernel on one device, smallest first.
template <class Kernel>
class Buckets {
public:
    Buckets(Target target, Device const& device) {
        for (auto const& row : Kernel::rows()) {
            if (target_of(row.binary) == target) {
                libraries_.emplace_back(row.binary.image);
                CUkernel const kernel = load_kernel(libraries_.back(), row.binary, device);
                loaded_.push_back({&row, kernel, resident_blocks(row.binary, kernel, device)});
            }
        }
        std::sort(loaded_.begin(), loaded_.end(), [](auto const& a, auto const& b) { return largest(a) < largest(b); });
    }

    // The binary of the smallest bucket that holds `tokens`.
    Loaded<Kernel> const& at(int64_t tokens) const {
        for (auto const& loaded : loaded_) {
            if (tokens <= largest(loaded)) {
                return loaded;
            }
        }
        throw_too_many_tokens(Kernel::kName, tokens, largest(loaded_.back()));
    }

private:
    static int64_t largest(Loaded<Kernel> const& loaded) {
        return loaded.binary().max_tokens ? loaded.binary().max_tokens : INT64_MAX;
    }

    std::vector<Library> libraries_;
    std::vector<Loaded<Kernel>> loaded_;
};

// Whether the kernel was compiled for `target`, and needs no more shared memory than the device gives a block.
template <class Kernel>
bool fits(Target target, Device const& device) {
    bool found = false;
    for (auto const& row : Kernel::rows()) {
        if (target_of(row.binary) == target) {
            found = true;
            if (row.binary.shared_bytes > device.max_shared_bytes) {
                return false;
            }
        }
    }
    return found;
}

// The kernels that one op launches, on one device: all for one target, as they share tiles.
template <class First, class... Others>
struct KernelSet {
    std::tuple<Buckets<First>, Buckets<Others>...> buckets;

    KernelSet(Target target, Device const& device)
        : buckets(Buckets<First>(target, device), Buckets<Others>(target, device)...) {}

    // What all the kernels were compiled for and the device runs, the most suitable first.
    static std::vector<Target> targets(Device const& device) {
        std::vector<Target> found;
        for (auto const& row : First::rows()) {
            Target const target = target_of(row.binary);
            bool const usable =
                runs_on(target, device.sm) && fits<First>(target, device) && (fits<Others>(target, device) && ...);
            if (usable && std::find(found.begin(), found.end(), target) == found.end()) {
                found.push_back(target);
            }
        }
        std::sort(found.begin(), found.end(), is_closer);
        return found;
    }

    // The first target that loads: an older driver refuses newer binaries, but compiles PTX.
    static KernelSet load(char const* op, Device const& device) {
        std::string failure;
        for (Target const target : targets(device)) {
            try {
                KernelSet loaded(target, device);
                if (!failure.empty()) {
                    warn_of_fallback(op, target, device, failure);
                }
                return loaded;
            } catch (Error const& error) {
                failure = failure.empty() ? error.what() : failure;
            }
        }
        throw_no_target(First::kName, device, failure);
    }

    template <class Kernel>
    Loaded<Kernel> const& get(int64_t tokens = 1) const {
        return std::get<Buckets<Kernel>>(buckets).at(tokens);
    }

    // Loads on the first call for a device. Never freed: the driver may be gone before this library is.
    static KernelSet const& on_current_device(char const* op) {
        static std::mutex mutex;
        static auto& sets = *new std::map<CUdevice, KernelSet>;
        Device const device = Device::current();
        std::lock_guard<std::mutex> lock(mutex);
        auto found = sets.find(device.ordinal);
        return found != sets.end() ? found->second : sets.try_emplace(device.ordinal, load(op, device)).first->second;
    }
};

}  // namespace deepseek_trt
