// What engines/sampling_native.py calls.
#include "processor.h"
#include "sampling.h"

namespace {

SampleRows best() {
    if (processor::supports_v4()) return sample_rows_v4;
    return processor::supports_v3() ? sample_rows_v3 : sample_rows_v1;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void deepseek_trt_sample(const SamplingBatch* batch) {
    static const SampleRows sample = best();
    sample(*batch, 0, batch->count);
}

// Bytes of a row, so that a library of another version is not called.
extern "C" __attribute__((visibility("default"))) int64_t deepseek_trt_sampling_row() { return sizeof(SamplingRow); }
