// What plugins/cpu/sampler.py calls.
#include <algorithm>

#include "processor.h"
#include "sampling.h"
#include "team.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void deepseek_trt_sample(const SamplingBatch* batch, int64_t threads) {
    static const SampleRows sample = processor::supports_v4() ? sample_rows_v4 : sample_rows_v3;
    // A thread's rows: the same at every step, so that their histories are near.
    const int64_t rows = std::max<int64_t>((batch->count + threads - 1) / threads, 4);
    Pool::of(static_cast<int>(threads)).run([&](Team& team) {
        team.share(0, (batch->count + rows - 1) / rows,
            [&](int64_t item) { sample(*batch, item * rows, std::min(item * rows + rows, batch->count)); });
    });
}

// Bytes of a row and a batch, so that a library of another version is not called; 0 where this processor is too old.
EXPORTED int64_t deepseek_trt_sampling_size() {
    return processor::supports_v3() ? sizeof(SamplingRow) + sizeof(SamplingBatch) : 0;
}
