// mla_dual_rms_norm on a CPU: see mla_dual_rms_norm.cu for what it computes.
//
// A task is TASK_ROWS consecutive tokens, both halves of each; THREADS threads take tasks in turn. A row is read twice,
// from memory for its sum of squares and from the L1 cache for the scaling.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), Q_WIDTH, KV_WIDTH, CAST_BEFORE_WEIGHT.
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   SERIAL_ROWS    up to so many tokens one thread does it all: waking others costs some microseconds
//   TASK_ROWS      tokens per task: fewer balance better, more share less cache traffic between threads
//   UNROLL         pairs of vectors per loop iteration, each with partial sums of its own: hides the latency of the addition
//   VECTOR_BYTES   SIMD width
#include "rms_norm.h"

typedef ELEMENT E;

struct Params {
    const E* q;
    const E* q_weight;
    E* q_out;
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
        norm_row<E, Q_WIDTH>(p.q + t * p.q_stride, p.q_weight, p.q_out + t * Q_WIDTH, p.q_eps);
        norm_row<E, KV_WIDTH>(p.kv + t * p.kv_stride, p.kv_weight, p.kv_out + t * KV_WIDTH, p.kv_eps);
    }
}

extern "C" void mla_dual_rms_norm(const Params* params) {
    const Params p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t first = 0; first < p.tokens; first += TASK_ROWS) task(p, first);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < p.tokens; first += TASK_ROWS) task(p, first);
    }
}
