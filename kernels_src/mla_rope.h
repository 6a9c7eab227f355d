// RoPE of MLA's query and key, the write to the latent cache, and the query's concatenation on a CPU: what kernels of these
// share. COPY_Q_NOPE, which they define, says whether the NOPE columns are q_nope's, and copied; else another part of the
// kernel writes them. See mla_rope.cuh for the constants of the problem.
//
// The heads of a token share one row of the rotary table, which is widened to floats once.
#pragma once
#include "cpu.h"

typedef ELEMENT E;
typedef TABLE TableElement;

struct Cache {
    void* data;
    int64_t block, row;  // strides, in elements
    int32_t blocks;
    int32_t block_size;  // rows per block
};

struct RopeParams {
    const E* q_nope;
    const E* q_pe;
    const E* kv_c;
    const E* k_pe;
    const int64_t* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const int64_t* slots;
    const float* kv_scale;
    const float* q_scale;
    void* q_out;
    E* k_pe_out;
    int64_t q_nope_token, q_nope_head;  // strides, in elements
    int64_t q_pe_token, q_pe_head;
    int64_t kv_c_token, k_pe_token, table_row;
    Cache kv_cache;
    Cache k_pe_cache;  // APART
    int32_t tokens;
    int32_t slot_count;  // tokens from there on are padded
    int32_t table_rows;
    int32_t slots_from_end;  // negative slots are counted from the end
};

constexpr int HALF = ROPE / 2;
constexpr int Q_ROW = NOPE + ROPE;
constexpr bool DS_MLA = CACHE == 3;
constexpr int DS_MLA_GROUP = 128, DS_MLA_SCALES = 512, DS_MLA_K_PE = 528;  // values; bytes from the beginning of a row

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
        const int to_a = DEINTERLEAVE ? i : a, to_b = DEINTERLEAVE ? i + HALF : b;
        rotated[to_a] = x[a] * cosines[i] - x[b] * sines[i];
        rotated[to_b] = x[b] * cosines[i] + x[a] * sines[i];
    }
    narrow_row(rotated, to, ROPE);
}

// LANES values as fp8, nearest even, saturated: e4m3_bits() of cpu.h in vectors.
static inline void store_fp8(uint8_t* to, Floats values) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    const auto bits_of = [](Floats floats) {
        Words bits;
        memcpy(&bits, &floats, sizeof bits);
        return bits;
    };
    const auto choose = [](auto condition, Words yes, Words no) {
        const Words mask = (Words)condition;
        return (mask & yes) | (~mask & no);
    };
    const Words bits = bits_of(values), magnitude = bits & 0x7fffffffu;
    Floats size;
    memcpy(&size, &magnitude, sizeof size);
    // Below 2^-6 codes are multiples of 2^-9, which is what adding 2^14 rounds to.
    Words code = choose(magnitude < 0x3c800000u, bits_of(size + 16384.f) - 0x46800000u,
                        ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3));
    code = choose(magnitude >= 0x43e00000u, Words{} + 0x7eu, code);  // 448
    code = choose(magnitude > 0x7f800000u, Words{} + 0x7fu, code);   // NaN
    const Bytes packed = __builtin_convertvector(code | ((bits >> 24) & 0x80u), Bytes);
    memcpy(to, &packed, sizeof packed);
}

static inline void divide_row(const E* from, uint8_t* to, int count, float scale) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store_fp8(to + i, Element<E>::load(from + i) / scale);
    for (; i < count; ++i) to[i] = e4m3_bits(load_one(from + i) / scale);
}

static inline float largest_magnitude(const E* from, int count) {
    Floats largest = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats values = Element<E>::load(from + i);
        const Floats sizes = values < 0.f ? -values : values;
        largest = sizes > largest ? sizes : largest;
    }
    float amax = 0.f;
    for (int i = 0; i < LANES; ++i) amax = largest[i] > amax ? largest[i] : amax;
    return amax;
}

// Counted from the beginning; negative if the token has none.
static inline int64_t slot_of(const RopeParams& p, int64_t t) {
    const int64_t slot = p.slots[t];
    return slot < 0 && p.slots_from_end ? slot + int64_t(p.kv_cache.blocks) * p.kv_cache.block_size : slot;
}

static inline bool has_slot(const Cache& cache, int64_t slot) {
    return slot >= 0 && slot < int64_t(cache.blocks) * cache.block_size;
}

// Where a slot's row begins, in elements.
static inline int64_t row_of(const Cache& cache, int64_t slot) {
    return slot / cache.block_size * cache.block + slot % cache.block_size * cache.row;
}

static inline void write_rows(const RopeParams& p, const E* kv_c, const E* k_pe, int64_t slot) {
    const Cache& k_pe_cache = APART ? p.k_pe_cache : p.kv_cache;
    if (!has_slot(p.kv_cache, slot) || !has_slot(k_pe_cache, slot)) return;
    const int64_t row = row_of(p.kv_cache, slot), k_pe_row = row_of(k_pe_cache, slot) + (APART ? 0 : LATENT);
    uint8_t *bytes = static_cast<uint8_t*>(p.kv_cache.data), *k_pe_bytes = static_cast<uint8_t*>(k_pe_cache.data);
    if (CACHE == 1) {
        memcpy(bytes + row * sizeof(E), kv_c, LATENT * sizeof(E));
        memcpy(k_pe_bytes + k_pe_row * sizeof(E), k_pe, ROPE * sizeof(E));
    } else if (CACHE == 2) {
        divide_row(kv_c, bytes + row, LATENT, *p.kv_scale);
        divide_row(k_pe, k_pe_bytes + k_pe_row, ROPE, *p.kv_scale);
    } else {
        for (int i = 0; i < LATENT; i += DS_MLA_GROUP) {
            const float scale = fmaxf(largest_magnitude(kv_c + i, DS_MLA_GROUP) / 448.f, __FLT_MIN__);
            divide_row(kv_c + i, bytes + row + i, DS_MLA_GROUP, scale);
            memcpy(bytes + row + DS_MLA_SCALES + i / DS_MLA_GROUP * sizeof scale, &scale, sizeof scale);
        }
        memcpy(bytes + row + DS_MLA_K_PE, k_pe, ROPE * sizeof(E));
    }
}

// One token's.
static inline void rope_task(const RopeParams& p, int64_t t) {
    float table[ROPE];
    widen_row(p.table + p.positions[t] * p.table_row, table, ROPE);
    const float *cosines = table, *sines = table + HALF;
    for (int64_t h = 0; h < HEADS; ++h) {
        const E *nope = p.q_nope + t * p.q_nope_token + h * p.q_nope_head, *pe = p.q_pe + t * p.q_pe_token + h * p.q_pe_head;
        const int64_t at = (t * HEADS + h) * Q_ROW;
        if (Q_FP8) {
            uint8_t* row = static_cast<uint8_t*>(p.q_out) + at;
            E rotated[ROPE];
            rotate(pe, rotated, cosines, sines);
            if (COPY_Q_NOPE) divide_row(nope, row, NOPE, *p.q_scale);
            divide_row(rotated, row + NOPE, ROPE, *p.q_scale);
        } else {
            E* row = static_cast<E*>(p.q_out) + at;
            if (COPY_Q_NOPE && NOPE) memcpy(row, nope, NOPE * sizeof(E));
            rotate(pe, row + NOPE, cosines, sines);
        }
    }
    E* k_pe_out = p.k_pe_out + t * ROPE;
    rotate(p.k_pe + t * p.k_pe_token, k_pe_out, cosines, sines);
    if (CACHE && t < p.slot_count) write_rows(p, p.kv_c + t * p.kv_c_token, k_pe_out, slot_of(p, t));
}
