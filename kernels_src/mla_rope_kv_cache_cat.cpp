// mla_rope_kv_cache_cat on a CPU: see mla_rope_kv_cache_cat.cu for what it computes.
//
// A task is one token; THREADS threads take tokens in turn. The heads of a token share one row of the rotary table, which
// is widened to floats once.
//
// Constants of the problem: ELEMENT, TABLE, HEADS, NOPE, ROPE, LATENT, NEOX, CACHE, as on a GPU.
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   SERIAL_ROWS    up to so many tokens one thread does it all: waking others costs some microseconds
//   VECTOR_BYTES   SIMD width
#include "cpu.h"

typedef ELEMENT E;
typedef TABLE TableElement;

struct Params {
    const E* q_nope;
    const E* q_pe;
    const E* kv_c;
    const E* k_pe;
    const int64_t* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const int64_t* slots;
    void* cache;
    const float* scale;
    E* q_out;
    E* k_pe_out;
    int64_t q_nope_token, q_nope_head;  // strides, in elements
    int64_t q_pe_token, q_pe_head;
    int64_t kv_c_token, k_pe_token, table_row;
    int64_t cache_block, cache_row;
    int32_t block_size;  // cache rows per block
    int32_t tokens;
};

constexpr int HALF = ROPE / 2;
constexpr int Q_ROW = NOPE + ROPE;

template <typename T>
static inline void widen_row(const T* from, float* to, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats values = Element<T>::load(from + i);
        memcpy(to + i, &values, sizeof values);
    }
    for (; i < count; ++i) to[i] = load_one(from + i);
}

static inline void narrow_row(const float* from, E* to, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats values;
        memcpy(&values, from + i, sizeof values);
        Element<E>::store(to + i, values);
    }
    for (; i < count; ++i) store_one(to + i, from[i]);
}

static inline void rotate(const E* from, E* to, const float* cosines, const float* sines) {
    float x[ROPE], rotated[ROPE];
    widen_row(from, x, ROPE);
    for (int i = 0; i < HALF; ++i) {
        const int a = NEOX ? i : 2 * i, b = NEOX ? i + HALF : 2 * i + 1;
        rotated[a] = x[a] * cosines[i] - x[b] * sines[i];
        rotated[b] = x[b] * cosines[i] + x[a] * sines[i];
    }
    narrow_row(rotated, to, ROPE);
}

static inline void write_cache(void* cache, int64_t at, const E* from, int count, const float* scale) {
    if (CACHE == 1) {
        memcpy(static_cast<E*>(cache) + at, from, count * sizeof(E));
    } else {
        uint8_t* to = static_cast<uint8_t*>(cache) + at;
        for (int i = 0; i < count; ++i) to[i] = e4m3_bits(load_one(from + i) / *scale);
    }
}

static inline void task(const Params& p, int64_t t) {
    float table[ROPE];
    widen_row(p.table + p.positions[t] * p.table_row, table, ROPE);
    const float *cosines = table, *sines = table + HALF;
    for (int64_t h = 0; h < HEADS; ++h) {
        E* row = p.q_out + (t * HEADS + h) * Q_ROW;
        if (NOPE) memcpy(row, p.q_nope + t * p.q_nope_token + h * p.q_nope_head, NOPE * sizeof(E));
        rotate(p.q_pe + t * p.q_pe_token + h * p.q_pe_head, row + NOPE, cosines, sines);
    }
    E* k_pe_out = p.k_pe_out + t * ROPE;
    rotate(p.k_pe + t * p.k_pe_token, k_pe_out, cosines, sines);
    if (CACHE) {
        const int64_t slot = p.slots[t];
        if (slot < 0) return;
        const int64_t at = slot / p.block_size * p.cache_block + slot % p.block_size * p.cache_row;
        write_cache(p.cache, at, p.kv_c + t * p.kv_c_token, LATENT, p.scale);
        write_cache(p.cache, at + LATENT, k_pe_out, ROPE, p.scale);
    }
}

extern "C" void mla_rope_kv_cache_cat(const Params* params) {
    const Params p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    }
}
