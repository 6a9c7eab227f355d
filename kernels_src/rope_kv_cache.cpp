// rope_kv_cache on a CPU: see rope_kv_cache.cu for what it computes.
//
// A task is one token; THREADS threads take tokens in turn. The heads of a token share one row of the rotary table, which
// is widened to floats once; GPT-J's angles are laid out beside the elements that they turn. Pairs that are de-interleaved are
// first taken apart: the rest is NeoX.
//
// Constants of the problem: ELEMENT, TABLE, HEADS, KV_HEADS, HEAD_DIM, ROPE, NEOX, DEINTERLEAVE, CACHE, QK_NORM, Q_FP8,
// RETURN_K, as on a GPU.
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   SERIAL_ROWS    up to so many tokens one thread does it all: waking others costs some microseconds
//   VECTOR_BYTES   SIMD width
#include "cpu.h"

typedef ELEMENT E;
typedef TABLE TableElement;
typedef uint64_t Pairs __attribute__((vector_size(VECTOR_BYTES)));  // two floats each
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

struct Cache {
    void* data;
    const float* scale;
    int64_t block, row, head;  // strides, in elements
    int32_t blocks;
    int32_t block_size;  // rows per block
};

struct Params {
    const E* q;
    const E* k;
    const E* v;
    const int64_t* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const int64_t* slots;
    const E* q_weight;
    const E* k_weight;
    const float* q_scale;
    void* q_out;
    E* k_out;
    int64_t q_token, q_head;  // strides, in elements
    int64_t k_token, k_head;
    int64_t v_token, v_head;
    int64_t table_row;
    Cache k_cache;
    Cache v_cache;
    int32_t tokens;
    int32_t slot_count;  // tokens from there on are padded
    int32_t table_rows;
    float eps;
    int32_t slots_from_end;  // negative slots are counted from the end
};

constexpr int HALF = ROPE / 2;
constexpr bool IN_HALVES = NEOX || DEINTERLEAVE;  // of the results
constexpr bool FP8_CACHE = CACHE >= 2;

static inline void widen(const TableElement* from, float* to) {
    int i = 0;
    for (; i + LANES <= HALF; i += LANES) Element<fp32>::store(to + i, Element<TableElement>::load(from + i));
    for (; i < HALF; ++i) to[i] = load_one(from + i);
}

// The factors of x and of its partner, element by element: halves have HALF of each, GPT-J ROPE, with the sines' signs.
struct Angles {
    float cosines[ROPE], sines[ROPE];

    explicit Angles(const TableElement* row) {
        if (IN_HALVES) {
            widen(row, cosines);
            widen(row + HALF, sines);
            return;
        }
        float cosine[HALF], sine[HALF];
        widen(row, cosine);
        widen(row + HALF, sine);
        for (int i = 0; i < HALF; ++i) {
            cosines[2 * i] = cosines[2 * i + 1] = cosine[i];
            sines[2 * i] = -sine[i], sines[2 * i + 1] = sine[i];
        }
    }
};

static inline Floats floats_at(const float* from) { return Element<fp32>::load(from); }

// Each float's neighbour.
static inline Floats neighbours(Floats values) {
    Pairs pairs;
    memcpy(&pairs, &values, sizeof pairs);
    pairs = pairs << 32 | pairs >> 32;
    memcpy(&values, &pairs, sizeof values);
    return values;
}

// A head as it is given, LANES elements or one at a time.
struct Given {
    const E* x;

    Floats lanes(int i) const { return Element<E>::load(x + i); }
    float one(int i) const { return load_one(x + i); }
};
// A head RMS-normed with the roundings of Hugging Face and vLLM: of the normed value, and of its product with the weight.
struct Normed {
    const E* x;
    const E* weight;
    float scale;

    Floats lanes(int i) const {
        return Element<E>::round(Element<E>::round(Element<E>::load(x + i) * scale) * Element<E>::load(weight + i));
    }
    float one(int i) const { return round_one<E>(round_one<E>(load_one(x + i) * scale) * load_one(weight + i)); }
};

// A head whose rotated part has all even elements first, then all odd ones.
template <class Head>
struct Apart {
    Head head;
    float rotated[ROPE];

    explicit Apart(Head given) : head(given) {
        float pairs[ROPE];
        int i = 0;
        for (; i + LANES <= ROPE; i += LANES) Element<fp32>::store(pairs + i, head.lanes(i));
        for (; i < ROPE; ++i) pairs[i] = head.one(i);
        for (i = 0; i < HALF; ++i) rotated[i] = pairs[2 * i], rotated[HALF + i] = pairs[2 * i + 1];
    }
    Floats lanes(int i) const { return i < ROPE ? floats_at(rotated + i) : head.lanes(i); }
    float one(int i) const { return i < ROPE ? rotated[i] : head.one(i); }
};

template <class Head>
static inline void rotate(const Head& x, E* __restrict to, const Angles& angles) {
    if (IN_HALVES) {
        int i = 0;
        for (; i + LANES <= HALF; i += LANES) {
            const Floats a = x.lanes(i), b = x.lanes(HALF + i);
            const Floats cosines = floats_at(angles.cosines + i), sines = floats_at(angles.sines + i);
            Element<E>::store(to + i, a * cosines - b * sines);
            Element<E>::store(to + HALF + i, b * cosines + a * sines);
        }
        for (; i < HALF; ++i) {
            const float a = x.one(i), b = x.one(HALF + i);
            store_one(to + i, a * angles.cosines[i] - b * angles.sines[i]);
            store_one(to + HALF + i, b * angles.cosines[i] + a * angles.sines[i]);
        }
    } else {
        int i = 0;
        for (; i + LANES <= ROPE; i += LANES) {
            const Floats values = x.lanes(i);
            Element<E>::store(
                to + i, values * floats_at(angles.cosines + i) + neighbours(values) * floats_at(angles.sines + i));
        }
        for (; i < ROPE; ++i) store_one(to + i, x.one(i) * angles.cosines[i] + x.one(i ^ 1) * angles.sines[i]);
    }
    int i = ROPE;
    for (; i + LANES <= HEAD_DIM; i += LANES) Element<E>::store(to + i, x.lanes(i));
    for (; i < HEAD_DIM; ++i) store_one(to + i, x.one(i));
}

static inline float sum_of_squares(const E* x) {
    constexpr int SUMS = 4;  // an addition takes longer than it takes to begin the next one
    Floats sums[SUMS] = {};
    int i = 0;
    for (; i + SUMS * LANES <= HEAD_DIM; i += SUMS * LANES) {
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; ++s) {
            const Floats values = Element<E>::load(x + i + s * LANES);
            sums[s] += values * values;
        }
    }
    for (; i + LANES <= HEAD_DIM; i += LANES) {
        const Floats values = Element<E>::load(x + i);
        sums[0] += values * values;
    }
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < HEAD_DIM; ++i) sum += load_one(x + i) * load_one(x + i);
    return sum;
}

// What each head of a token is multiplied by: first all sums, then all roots, several at a time.
struct Scales {
    float q[HEADS], k[KV_HEADS];

    Scales(const Params& p, int64_t t) {
        if (!QK_NORM) return;
        for (int64_t h = 0; h < HEADS; ++h) q[h] = sum_of_squares(p.q + t * p.q_token + h * p.q_head);
        for (int64_t h = 0; h < KV_HEADS; ++h) k[h] = sum_of_squares(p.k + t * p.k_token + h * p.k_head);
        for (float& scale : q) scale = 1.f / sqrtf(scale / HEAD_DIM + p.eps);
        for (float& scale : k) scale = 1.f / sqrtf(scale / HEAD_DIM + p.eps);
    }
};

template <class Head>
static inline void rotate_in_style(const Head& x, E* to, const Angles& angles) {
    if (DEINTERLEAVE) {
        rotate(Apart<Head>(x), to, angles);
    } else {
        rotate(x, to, angles);
    }
}

static inline void norm_and_rotate(const E* x, const E* weight, float scale, E* to, const Angles& angles) {
    if (QK_NORM) {
        rotate_in_style(Normed{x, weight, scale}, to, angles);
    } else {
        rotate_in_style(Given{x}, to, angles);
    }
}

static inline Words chosen(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// A head as e4m3 of value ÷ scale: rounded to nearest even, saturated.
static inline void quantize(const E* __restrict from, uint8_t* __restrict to, float scale) {
    int i = 0;
    for (; i + LANES <= HEAD_DIM; i += LANES) {
        const Words bits = words_of(Element<E>::load(from + i) / scale), magnitude = bits & 0x7fffffffu;
        Floats size;
        memcpy(&size, &magnitude, sizeof size);
        // Below 2^-6: multiples of 2^-9, which is what the addition of 2^14 rounds to.
        const Words small = words_of(size + 16384.f) - 0x46800000u;
        const Words large = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
        Words code = chosen((Words)(magnitude < 0x3c800000u), small, large);
        code = chosen((Words)(magnitude >= 0x43e00000u), Words{} + 0x7eu, code);  // 448
        code = chosen((Words)(magnitude > 0x7f800000u), Words{} + 0x7fu, code);   // NaN
        const Bytes packed = __builtin_convertvector(code | ((bits >> 24) & 0x80u), Bytes);
        memcpy(to + i, &packed, sizeof packed);
    }
    for (; i < HEAD_DIM; ++i) to[i] = e4m3_bits(load_one(from + i) / scale);
}

// A slot as it was given, or counted from the beginning.
static inline int64_t slot_of(const Params& p, int64_t given) {
    return given < 0 && p.slots_from_end ? given + int64_t(p.k_cache.blocks) * p.k_cache.block_size : given;
}

// Where a slot's row begins, in elements; -1 for a slot that is none of the cache's.
static inline int64_t row_of(const Cache& cache, int64_t slot) {
    if (slot < 0 || slot >= int64_t(cache.blocks) * cache.block_size) return -1;
    return slot / cache.block_size * cache.block + slot % cache.block_size * cache.row;
}

static inline void write_head(const Cache& cache, int64_t row, int64_t head, const E* from) {
    const int64_t at = row + head * cache.head;
    if (FP8_CACHE) {
        quantize(from, static_cast<uint8_t*>(cache.data) + at, cache.scale[CACHE == 3 ? head : 0]);
    } else {
        memcpy(static_cast<E*>(cache.data) + at, from, HEAD_DIM * sizeof(E));
    }
}

static inline void task(const Params& p, int64_t t) {
    const Angles angles(p.table + p.positions[t] * p.table_row);
    const Scales scales(p, t);
    E rotated[HEAD_DIM];
    for (int64_t h = 0; h < HEADS; ++h) {
        const E* q = p.q + t * p.q_token + h * p.q_head;
        const int64_t to = (t * HEADS + h) * HEAD_DIM;
        if (Q_FP8) {
            norm_and_rotate(q, p.q_weight, scales.q[h], rotated, angles);
            quantize(rotated, static_cast<uint8_t*>(p.q_out) + to, *p.q_scale);
        } else {
            norm_and_rotate(q, p.q_weight, scales.q[h], static_cast<E*>(p.q_out) + to, angles);
        }
    }
    const int64_t slot = CACHE && t < p.slot_count ? slot_of(p, p.slots[t]) : -1;
    const int64_t k_row = CACHE ? row_of(p.k_cache, slot) : -1, v_row = CACHE ? row_of(p.v_cache, slot) : -1;
    for (int64_t h = 0; h < KV_HEADS; ++h) {
        if (RETURN_K || k_row >= 0) {
            E* to = RETURN_K ? p.k_out + (t * KV_HEADS + h) * HEAD_DIM : rotated;
            norm_and_rotate(p.k + t * p.k_token + h * p.k_head, p.k_weight, scales.k[h], to, angles);
            if (k_row >= 0) write_head(p.k_cache, k_row, h, to);
        }
        if (v_row >= 0) write_head(p.v_cache, v_row, h, p.v + t * p.v_token + h * p.v_head);
    }
}

extern "C" void rope_kv_cache(const Params* params) {
    const Params p = *params;
    const int threads = threads_to_use(THREADS);
    if (threads == 1 || p.tokens <= SERIAL_ROWS) {
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < p.tokens; ++t) task(p, t);
    }
}
