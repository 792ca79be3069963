// Memory that a call needs and the next one can use again.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace ISA {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        for (Block& block : blocks_) std::free(block.data);
    }

    // Start over; what was taken before is no longer valid. Several blocks become one that holds what was taken.
    void reset() {
        if (blocks_.size() > 1) {
            for (Block& block : blocks_) std::free(block.data);
            blocks_.clear();
            add(most_);
        }
        most_ = current_ = used_ = 0;
    }

    // n numbers, aligned to 64 bytes.
    template <class T = float>
    T* take(int64_t n) {
        const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 64 + 63) / 64 * 64;
        while (current_ < blocks_.size() && used_ + bytes > blocks_[current_].bytes) {
            ++current_;
            used_ = 0;
        }
        if (current_ == blocks_.size()) add(bytes);
        char* at = blocks_[current_].data + used_;
        used_ += bytes;
        most_ += bytes;
        return reinterpret_cast<T*>(at);
    }

    // A table of pointers to rows of `width` numbers.
    float** take_rows(int64_t rows, int64_t width) {
        float** table = take<float*>(rows);
        float* data = take(rows * width);
        for (int64_t i = 0; i < rows; ++i) table[i] = data + i * width;
        return table;
    }

private:
    static constexpr size_t SMALLEST = 1 << 20;
    struct Block {
        char* data;
        size_t bytes;
    };

    void add(size_t bytes) {
        const size_t size = bytes > SMALLEST ? bytes : SMALLEST;
        void* data = std::aligned_alloc(64, size);
        if (data == nullptr) throw std::bad_alloc();
        blocks_.push_back({static_cast<char*>(data), size});
    }

    std::vector<Block> blocks_;
    size_t current_ = 0, used_ = 0, most_ = 0;  // the block in use, its bytes in use, and those in use of all
};

// The calling thread's memory: one for what a whole team shares, made by its first thread, one for its own.
inline Scratch& shared_scratch() {
    static thread_local Scratch scratch;
    scratch.reset();
    return scratch;
}
inline Scratch& own_scratch() {
    static thread_local Scratch scratch;
    scratch.reset();
    return scratch;
}

}  // namespace ISA
