// mla_rope_kv_cache_cat on a CPU: see mla_rope_kv_cache_cat.cu for what it computes.
//
// A task is one token; THREADS threads take tokens in turn.
//
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   SERIAL_ROWS    up to so many tokens one thread does it all: waking others costs some microseconds
//   VECTOR_BYTES   SIMD width
#define COPY_Q_NOPE 1
#include "mla_rope.h"

extern "C" void mla_rope_kv_cache_cat(const RopeParams* params) {
    const RopeParams p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t t = 0; t < p.tokens; ++t) rope_task(p, t);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < p.tokens; ++t) rope_task(p, t);
    }
}
