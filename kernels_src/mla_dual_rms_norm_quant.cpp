// mla_dual_rms_norm_quant on a CPU: see mla_dual_rms_norm_quant.cu for what it computes.
//
// A task is TASK_ROWS consecutive tokens, both halves of each; THREADS threads take tasks in turn. A normed q row waits in
// the L1 cache to be quantised.
//
// Constants of the problem: ELEMENT, Q_WIDTH, KV_WIDTH, CAST_BEFORE_WEIGHT, GROUP, UE8M0, SCALE_LAYOUT, as on a GPU.
// Tunables: as mla_dual_rms_norm.cpp explains them.
#include "quant.h"
#include "rms_norm.h"

typedef ELEMENT E;

struct Params {
    const E* q;
    const E* q_weight;
    uint8_t* q_values;
    float* q_scales;
    const E* kv;
    const E* kv_weight;
    E* kv_out;
    int64_t q_stride;  // elements from row to row of q; the outputs are contiguous
    int64_t kv_stride;
    int32_t tokens;
    float q_eps;
    float kv_eps;
};

static inline void task(const Params& p, int64_t first) {
    const int64_t end = first + TASK_ROWS < p.tokens ? first + TASK_ROWS : p.tokens;
    for (int64_t t = first; t < end; ++t) {
        E normed[Q_WIDTH];
        norm_row<E, Q_WIDTH>(p.q + t * p.q_stride, p.q_weight, normed, p.q_eps);
        quantise_row<E, Q_WIDTH>(normed, p.q_values, p.q_scales, nullptr, t, p.tokens);
        norm_row<E, KV_WIDTH>(p.kv + t * p.kv_stride, p.kv_weight, p.kv_out + t * KV_WIDTH, p.kv_eps);
    }
}

extern "C" void mla_dual_rms_norm_quant(const Params* params) {
    const Params p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t first = 0; first < p.tokens; first += TASK_ROWS) task(p, first);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < p.tokens; first += TASK_ROWS) task(p, first);
    }
}
