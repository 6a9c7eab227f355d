// fp8_group_quant on a CPU: see fp8_group_quant.cu for what it computes.
//
// A task is one token; THREADS threads take tokens in turn. A group is read twice, from memory for its amax and
// from the L1 cache for its division. Where NORM is set, the normed row waits there.
//
// Constants of the problem: ELEMENT, X_WIDTH, GROUP, UE8M0, SCALE_LAYOUT, NORM, CAST_BEFORE_WEIGHT, as on a GPU.
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   SERIAL_ROWS    up to so many tokens one thread does it all: waking others costs some microseconds
//   VECTOR_BYTES   SIMD width
constexpr int UNROLL = 2;  // of the norm
#include "quant.h"
#include "rms_norm.h"

typedef ELEMENT E;

struct Params {
    const E* x;
    const float* scale;  // static FP8 and NVFP4
    const E* weight;     // with NORM
    uint8_t* values;
    void* scales;
    int64_t x_stride;  // elements from row to row of x; the values' rows are contiguous
    int32_t tokens;
    float eps;
};

static inline void task(const Params& p, int64_t token) {
    const E* row = p.x + token * p.x_stride;
    E normed[NORM ? X_WIDTH : 1];
    if (NORM) {
        norm_row<E, X_WIDTH>(row, p.weight, normed, p.eps);
        row = normed;
    }
    quantise_row<E, X_WIDTH>(row, p.values, p.scales, p.scale, token, p.tokens);
}

extern "C" void fp8_group_quant(const Params* params) {
    const Params p = *params;
    if (GROUP == 16) zero_padded_scales(static_cast<uint8_t*>(p.scales), p.tokens, X_WIDTH / 16);
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    }
}
