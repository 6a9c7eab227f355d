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
//   UNROLL         vectors per loop iteration, each with its own partial sum: hides the latency of the addition
//   VECTOR_BYTES   SIMD width
#include "cpu.h"

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

template <int WIDTH>
static inline void norm_row(const E* __restrict x, const E* __restrict weight, E* __restrict out, float eps) {
    constexpr int STEP = LANES * UNROLL;
    constexpr int WHOLE = WIDTH - WIDTH % STEP;
    Floats partial[UNROLL] = {};
    for (int i = 0; i < WHOLE; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) {
            const Floats values = Element<E>::load(x + i + u * LANES);
            partial[u] += values * values;
        }
    }
    float sum = 0.f;
#pragma GCC unroll 16
    for (int u = 0; u < UNROLL; ++u) sum += sum_of(partial[u]);
    for (int i = WHOLE; i < WIDTH; ++i) sum += load_one(x + i) * load_one(x + i);

    const float scale = 1.f / sqrtf(sum / WIDTH + eps);
    for (int i = 0; i < WHOLE; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) {
            Floats values = Element<E>::load(x + i + u * LANES) * scale;
            if (CAST_BEFORE_WEIGHT) values = Element<E>::round(values);
            Element<E>::store(out + i + u * LANES, values * Element<E>::load(weight + i + u * LANES));
        }
    }
    for (int i = WHOLE; i < WIDTH; ++i) {
        const float value = load_one(x + i) * scale;
        store_one(out + i, (CAST_BEFORE_WEIGHT ? round_one<E>(value) : value) * load_one(weight + i));
    }
}

static inline void task(const Params& p, int64_t first) {
    const int64_t end = first + TASK_ROWS < p.tokens ? first + TASK_ROWS : p.tokens;
    for (int64_t t = first; t < end; ++t) {
        norm_row<Q_WIDTH>(p.q + t * p.q_stride, p.q_weight, p.q_out + t * Q_WIDTH, p.q_eps);
        norm_row<KV_WIDTH>(p.kv + t * p.kv_stride, p.kv_weight, p.kv_out + t * KV_WIDTH, p.kv_eps);
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
