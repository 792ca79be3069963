// What engines/sampling_native.py calls.
#include "processor.h"
#include "sampling.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void deepseek_trt_sample(const SamplingBatch* batch) {
    static const SampleRows sample = processor::supports_v4() ? sample_rows_v4 : sample_rows_v3;
    sample(*batch, 0, batch->count);
}

// Bytes of a row, so that a library of another version is not called; 0 where this processor is too old.
EXPORTED int64_t deepseek_trt_sampling_row() { return processor::supports_v3() ? sizeof(SamplingRow) : 0; }
