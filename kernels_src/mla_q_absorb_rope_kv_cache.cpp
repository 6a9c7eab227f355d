// mla_q_absorb_rope_kv_cache on a CPU: see mla_q_absorb_rope_kv_cache.cu for what it computes.
//
// THREADS threads take heads in turn, which they multiply, and then tokens, for what mla_rope.h does. ROWS tokens by PANEL
// columns of sums stay in registers while QK_NOPE passes by. For one token W_UK is read once, in the order in which it lies in
// memory.
//
// Constants of the problem: those of mla_rope.cuh, and QK_NOPE.
// Tunables:
//   THREADS        threads of the parallel loops, or as many as PyTorch may use if that is fewer
//   ROWS           tokens whose sums are in registers: W_UK is read less often, until registers run out
//   VECTOR_BYTES   SIMD width
#define COPY_Q_NOPE 0
#include "mla_rope.h"

struct Params {
    RopeParams rope;
    const E* w;
    int64_t w_head, w_row;  // strides, in elements
};

constexpr int VECTORS = VECTOR_BYTES == 64 ? 4 : 2;  // of sums for each token, in registers
constexpr int PANEL = VECTORS * LANES;
constexpr int AT_ONCE = 4;  // rows of W_UK, for one token

static_assert(NOPE % PANEL == 0 && NOPE % (2 * LANES) == 0 && QK_NOPE % AT_ONCE == 0, "whole panels");

typedef float Query[QK_NOPE];

static inline void store_panel(E* to, const Floats (&sums)[VECTORS]) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v += 2) Element<E>::store_two(to + v * LANES, {sums[v], sums[v + 1]});
}

// One panel of columns, w's first ones, of COUNT tokens.
template <int COUNT>
static inline void multiply(const Query* x, const E* w, int64_t w_row, E (*out)[NOPE]) {
    Floats sums[COUNT][VECTORS] = {};
    for (int k = 0; k < QK_NOPE; ++k) {
        Floats columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v += 2) {
            const Two two = Element<E>::load_two(w + k * w_row + v * LANES);
            columns[v] = two.a, columns[v + 1] = two.b;
        }
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += x[r][k] * columns[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r) store_panel(out[r], sums[r]);
}

// The same for `count` tokens, at most COUNT.
template <int COUNT>
static inline void multiply_some(int count, const Query* x, const E* w, int64_t w_row, E (*out)[NOPE]) {
    if constexpr (COUNT > 1) {
        if (count < COUNT) return multiply_some<COUNT - 1>(count, x, w, w_row, out);
    }
    multiply<COUNT>(x, w, w_row, out);
}

// All columns of one token. Its sums are in the L1 cache.
static inline void multiply_one(const Query& x, const E* w, int64_t w_row, E* out) {
    constexpr int TWOS = NOPE / (2 * LANES);
    Two sums[TWOS] = {};
    for (int k = 0; k < QK_NOPE; k += AT_ONCE) {
        for (int i = 0; i < TWOS; ++i) {
            Two sum = sums[i];
#pragma GCC unroll 4
            for (int a = 0; a < AT_ONCE; ++a) {
                const Two two = Element<E>::load_two(w + (k + a) * w_row + i * 2 * LANES);
                sum.a += x[k + a] * two.a;
                sum.b += x[k + a] * two.b;
            }
            sums[i] = sum;
        }
    }
    for (int i = 0; i < TWOS; ++i) Element<E>::store_two(out + i * 2 * LANES, sums[i]);
}

// One head's.
static void multiply_task(const Params& p, int64_t head) {
    const RopeParams& rope = p.rope;
    const E* const w = p.w + head * p.w_head;
    for (int64_t first = 0; first < rope.tokens; first += ROWS) {
        const int count = rope.tokens - first < ROWS ? int(rope.tokens - first) : ROWS;
        Query x[ROWS];
        alignas(64) E rounded[ROWS][NOPE];
        for (int r = 0; r < count; ++r)
            widen_row(rope.q_nope + (first + r) * rope.q_nope_token + head * rope.q_nope_head, x[r], QK_NOPE);
        if (rope.tokens == 1) {
            multiply_one(x[0], w, p.w_row, rounded[0]);
        } else {
            for (int c = 0; c < NOPE; c += PANEL)
                multiply_some<ROWS>(count, x, w + c, p.w_row, reinterpret_cast<E(*)[NOPE]>(rounded[0] + c));
        }
        for (int r = 0; r < count; ++r) {
            const int64_t at = ((first + r) * HEADS + head) * Q_ROW;
            if (Q_FP8) {
                divide_row(rounded[r], static_cast<uint8_t*>(rope.q_out) + at, NOPE, *rope.q_scale);
            } else {
                memcpy(static_cast<E*>(rope.q_out) + at, rounded[r], sizeof rounded[r]);
            }
        }
    }
}

extern "C" void mla_q_absorb_rope_kv_cache(const Params* params) {
    const Params p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1) {
        for (int64_t head = 0; head < HEADS; ++head) multiply_task(p, head);
        for (int64_t t = 0; t < p.rope.tokens; ++t) rope_task(p.rope, t);
    } else {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t head = 0; head < HEADS; ++head) multiply_task(p, head);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < p.rope.tokens; ++t) rope_task(p.rope, t);
        }
    }
}
