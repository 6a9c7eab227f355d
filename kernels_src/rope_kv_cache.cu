// rope_kv_cache: rotates q and k, and writes rotated k and v into the paged KV cache, in one launch; where there are
// weights, an RMSNorm of each q and k head comes before the rotation.
//
// A token's heads are its q heads, k heads and v heads, in this order. LANES consecutive threads share a head; each has two
// of its vectors, the ones that NeoX pairs, or, with DEINTERLEAVE, two neighbours, of whose pairs it makes two vectors half a
// row apart: nothing is loaded twice. A thread has UNROLL heads of one token, and the same
// place in each, so that one position, one slot and one part of the rotary table serve them all. All its loads are in flight
// at once, but for the table's, which need the position (see GUESS). Threads without work load what another one loads.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), TABLE (element of cos_sin_cache), HEADS, KV_HEADS, HEAD_DIM, ROPE
// (elements that are rotated; those behind are copied), NEOX, DEINTERLEAVE (pairs that are neighbours are written half a row
// apart), CACHE (0 none, 1 ELEMENT, fp8 e4m3 of value ÷ scale with 2: one scale, 3: one for each head), QK_NORM, Q_FP8 (q is
// returned as fp8 e4m3 of value ÷ scale), RETURN_K.
// Tunables:
//   THREADS    per block
//   UNROLL     heads of a thread: more loads in flight, less to load and work out for each head; fewer threads
//   VEC_BYTES  of input per vector
//   READ_ONCE  mark the activations as dead after reading
//   PDL        programmatic dependent launch: 0 no; let the next kernel start 1: at once, 2: when the loads are on their way
//   PREFETCH   with PDL: the first PREFETCH blocks of each multiprocessor pull their input into L2 while they wait
//   GUESS      these blocks also look at the positions while they wait. Positions were nearly always written long before,
//              so after the wait the row of the table that they name is loaded at once, and again if a position turns out to
//              be another: one round trip to memory instead of two. Nothing that was read before the wait is computed with
#include "early.cuh"
#include "fp8.cuh"
#include "rope.cuh"

typedef ELEMENT Element;
typedef TABLE TableElement;

struct Cache {
    void* data;
    const float* scale;
    i64 block, row, head;  // strides, in elements
    int blocks;
    int block_size;  // rows per block
};

struct Params {
    const Element* q;
    const Element* k;
    const Element* v;
    const i64* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const i64* slots;
    const Element* q_weight;
    const Element* k_weight;
    const float* q_scale;
    void* q_out;
    Element* k_out;
    i64 q_token, q_head;  // strides, in elements
    i64 k_token, k_head;
    i64 v_token, v_head;
    i64 table_row;
    Cache k_cache;
    Cache v_cache;
    int tokens;
    int slot_count;  // tokens from there on are padded
    int table_rows;
    float eps;
    int slots_from_end;  // negative slots are counted from the end
};

typedef Vector<Element, VEC_BYTES> Vec;
constexpr int SIZE = Vec::SIZE;
constexpr int HALF = ROPE / 2;
constexpr bool FP8_CACHE = CACHE >= 2;
constexpr int CACHE_BYTES = FP8_CACHE ? 1 : int(sizeof(Element));
constexpr int Q_AND_K = HEADS + (CACHE || RETURN_K ? KV_HEADS : 0);
constexpr int ALL_HEADS = Q_AND_K + (CACHE ? KV_HEADS : 0);
constexpr int GROUPS = (ALL_HEADS + UNROLL - 1) / UNROLL;  // head u · GROUPS + g is the u-th of group g
constexpr int PAIRS = HEAD_DIM / (2 * SIZE);               // of vectors in a head
constexpr int ROTATED = ROPE / (2 * SIZE);                 // the first of them

// A sum over a head that is normed is one over neighbouring lanes: a power of two of them, the last ones idle.
template <int COUNT, int POWER = 1>
struct PowerOfTwoFrom {
    static constexpr int value = PowerOfTwoFrom<(POWER < COUNT ? COUNT : 0), 2 * POWER>::value;
};
template <int POWER>
struct PowerOfTwoFrom<0, POWER> {
    static constexpr int value = POWER / 2;
};
constexpr int LANES = QK_NORM ? PowerOfTwoFrom<PAIRS>::value : PAIRS;
constexpr int UNITS = GROUPS * LANES;  // threads of a token

static_assert(HEAD_DIM % (2 * SIZE) == 0 && ROPE % (2 * SIZE) == 0, "whole pairs of vectors");
static_assert(!(NEOX && DEINTERLEAVE), "NeoX has no neighbours to take apart");
static_assert(!QK_NORM || (LANES <= WARP_SIZE && THREADS % LANES == 0), "a head lies within a warp");

// Where the thread's vectors begin in a head: the rotated part in halves, then what lies behind it in halves.
struct Places {
    int x, y;
    __device__ __forceinline__ explicit Places(int lane) {
        const bool rotated = ROPE == HEAD_DIM || lane < ROTATED;
        x = rotated ? lane * SIZE : ROPE + (lane - ROTATED) * SIZE;
        y = x + (rotated ? HALF : (HEAD_DIM - ROPE) / 2);
    }
    // Where they are read, in a head of q or k, or else of v.
    __device__ __forceinline__ Places source(bool of_q_or_k) const {
        Places from = *this;
        if (DEINTERLEAVE && of_q_or_k && x < HALF) from.x = 2 * x, from.y = 2 * x + SIZE;
        return from;
    }
};

__device__ __forceinline__ const Element* source(const Params& p, i64 token, int head) {
    if (head < HEADS) return p.q + token * p.q_token + head * p.q_head;
    if (head < Q_AND_K) return p.k + token * p.k_token + (head - HEADS) * p.k_head;
    return p.v + token * p.v_token + (head - Q_AND_K) * p.v_head;
}

// The scale that a head is divided by where it is written as fp8.
__device__ __forceinline__ const float* scale_of(const Params& p, int head) {
    if (head < HEADS) return p.q_scale;
    if (head < Q_AND_K) return p.k_cache.scale + (CACHE == 3 ? head - HEADS : 0);
    return p.v_cache.scale + (CACHE == 3 ? head - Q_AND_K : 0);
}

// Each line by the thread that has its first vector, or nearly: addresses of a run are VEC_BYTES apart.
__device__ __forceinline__ void prefetch(const void* from) {
    if (reinterpret_cast<unsigned long long>(from) % 128 < VEC_BYTES) prefetch_line_to_l2(from);
}

// What a token's threads share, by the first of them. Other layers use it as well, but L2 may have lost it since.
__device__ __forceinline__ void prefetch_shared(const Params& p, u32 token, int lane, const Places& at, i64 guess) {
    if (lane == 0 && !GUESS) prefetch_line_to_l2(p.positions + token);
    if (lane == 0 && CACHE && token < u32(p.slot_count)) prefetch_line_to_l2(p.slots + token);
    if (!GUESS || lane >= ROTATED) return;
    prefetch(p.table + guess * p.table_row + at.x);
    prefetch(p.table + guess * p.table_row + HALF + at.x);
}

// What is the same for all blocks; by block 0.
__device__ __forceinline__ void prefetch_constants(const Params& p) {
    if (QK_NORM && threadIdx.x < PAIRS) {
        const Places at(threadIdx.x);
        prefetch(p.q_weight + at.x);
        prefetch(p.q_weight + at.y);
        prefetch(p.k_weight + at.x);
        prefetch(p.k_weight + at.y);
    }
    if (threadIdx.x > 0) return;
    if (Q_FP8) prefetch_line_to_l2(p.q_scale);
    if (FP8_CACHE) prefetch_line_to_l2(p.k_cache.scale);
    if (FP8_CACHE) prefetch_line_to_l2(p.v_cache.scale);
}

// A row that the table has, most likely the one that the token will need.
__device__ __forceinline__ i64 guess_position(const Params& p, int token) {
    const i64 position = read_early(p.positions + token);
    return position < 0 ? 0 : position < p.table_rows ? position : p.table_rows - 1;
}

// RMSNorm with the roundings of Hugging Face and vLLM: of the normed value, and of its product with the weight.
__device__ __forceinline__ void scale_and_weigh(float (&values)[SIZE], const Vec& weight, float inverse_rms) {
    float factors[SIZE];
    weight.unpack(factors);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) values[e] *= inverse_rms;
    round_to<Element>(values);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) values[e] *= factors[e];
    round_to<Element>(values);
}

// Where a head is written: of q, where that is; of k and v, where it would be in row 0 of block 0 of its cache.
__device__ __forceinline__ char* target(const Params& p, i64 token, int head) {
    constexpr int Q_BYTES = Q_FP8 ? 1 : int(sizeof(Element));
    if (head < HEADS) return static_cast<char*>(p.q_out) + (token * HEADS + head) * (HEAD_DIM * Q_BYTES);
    if (head < Q_AND_K) return static_cast<char*>(p.k_cache.data) + (head - HEADS) * p.k_cache.head * CACHE_BYTES;
    return static_cast<char*>(p.v_cache.data) + (head - Q_AND_K) * p.v_cache.head * CACHE_BYTES;
}

// Where slots are in the caches, which have the same number of rows in a block. Nearly always that is a power of two, for
// which no division makes every token wait.
struct CacheRows {
    u32 size;
    int shift;  // -1: no power of two

    __device__ __forceinline__ explicit CacheRows(const Params& p) : size(p.k_cache.block_size) {
#if ON_NVIDIA
        shift = size & (size - 1) ? -1 : 31 - __clz(int(size));
#else
        shift = size & (size - 1) ? -1 : 31 - __builtin_clz(size);
#endif
    }
    struct Row {
        unsigned long long block;  // too large for a slot that is negative
        i64 row;
        // Where a head begins that would begin at `first` in the first row; null: the slot is none of the cache's.
        __device__ __forceinline__ char* of(const Cache& cache, char* first) const {
            return block < u32(cache.blocks) ? first + (i64(block) * cache.block + row * cache.row) * CACHE_BYTES : nullptr;
        }
    };
    __device__ __forceinline__ Row at(i64 slot) const {
        const unsigned long long number = slot, block = shift >= 0 ? number >> shift : number / size;
        return {block, i64(number - block * size)};
    }
};

// A slot as it was given, or counted from the beginning.
__device__ __forceinline__ i64 slot_of(const Params& p, i64 given) {
    return given < 0 && p.slots_from_end ? given + i64(p.k_cache.blocks) * p.k_cache.block_size : given;
}

// Writes the thread's part of a head that begins at `to`.
template <bool FP8>
__device__ __forceinline__ void store(char* to, const Places& at, const Vec& x, const Vec& y, float scale) {
    if constexpr (FP8) {
        unsigned char* bytes = reinterpret_cast<unsigned char*>(to);
        const Fp8Scale divisor(scale);
        float values[SIZE];
        x.unpack(values);
        divisor.divide(values);
        Fp8<SIZE, SIZE>::store(bytes + at.x, values);
        y.unpack(values);
        divisor.divide(values);
        Fp8<SIZE, SIZE>::store(bytes + at.y, values);
    } else {
        Element* elements = reinterpret_cast<Element*>(to);
        x.store_at_once(elements + at.x);
        y.store_at_once(elements + at.y);
    }
}

// Loads before it are issued before those behind it. Without it NVIDIA's assembler may put a load behind an instruction that
// waits for another one, which makes two round trips to memory of one. It is no instruction itself.
__device__ __forceinline__ void keep_loads_apart() {
#if !ON_AMD
    __syncwarp();
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_kv_cache(const Params p) {
    if (PDL == 1) let_next_kernel_start();

    // The block's first token and thread are worked out in 64 bits once; from there 32 bits do.
    const unsigned long long begin = (unsigned long long)blockIdx.x * THREADS, first = begin / UNITS;
    const u32 local = u32(begin - first * UNITS) + threadIdx.x, ahead = local / UNITS;
    const u32 unit = local - ahead * UNITS, group = unit / LANES, own_lane = unit % LANES;
    const u32 own_token = u32(first) + ahead, last_token = u32(p.tokens) - 1;
    const bool has_work = own_token <= last_token && (LANES == PAIRS || own_lane < PAIRS);
    const u32 token = own_token <= last_token ? own_token : last_token;
    const int lane = LANES == PAIRS || own_lane < PAIRS ? own_lane : PAIRS - 1;
    const Places at(lane);

    int heads[UNROLL];
    bool exists[UNROLL];  // and is not what another thread has as well
    const Element* from[UNROLL];
    int partner[UNROLL];  // how far from there the second vector is
    char* to[UNROLL];
    const float* scale_from[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int head = u * GROUPS + int(group);
        const bool in_token = ALL_HEADS % UNROLL == 0 || head < ALL_HEADS;
        heads[u] = in_token ? head : ALL_HEADS - 1;
        exists[u] = has_work && in_token;
        const Places read = at.source(heads[u] < Q_AND_K);
        from[u] = source(p, token, heads[u]) + read.x;
        partner[u] = read.y - read.x;
        to[u] = target(p, token, heads[u]);
        scale_from[u] = scale_of(p, heads[u]);
    }
    const CacheRows cache_rows(p);
    i64 guess = -1;
    if (PDL) {
        if (PREFETCH && blockIdx.x < multiprocessors() * PREFETCH) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                prefetch(from[u]);
                prefetch(from[u] + partner[u]);
            }
            if (blockIdx.x == 0) prefetch_constants(p);
            if (GUESS) guess = guess_position(p, token);
            if (group == 0) prefetch_shared(p, token, lane, at, guess);
        }
        wait_for_previous_kernel();
    }

    Angles<NEOX || DEINTERLEAVE, TableElement, SIZE, VEC_BYTES> angles;
    if (GUESS && guess >= 0 && lane < ROTATED) angles.load(p.table + guess * p.table_row, HALF, at.x);
    Vec x[UNROLL], y[UNROLL];
    float scales[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        READ_ONCE ? x[u].load_once(from[u]) : x[u].load(from[u]);
        READ_ONCE ? y[u].load_once(from[u] + partner[u]) : y[u].load(from[u] + partner[u]);
        scales[u] = (heads[u] < HEADS ? Q_FP8 : FP8_CACHE) ? *scale_from[u] : 1.f;
    }
    // Of q and of k, or of the only head.
    constexpr int WEIGHTS = UNROLL > 1 ? 2 : 1;
    Vec weights[WEIGHTS][2];
    auto load_weights = [&] {
        const Places read = at.source(true);
#pragma unroll
        for (int w = 0; w < WEIGHTS; ++w) {
            const Element* weight = (UNROLL > 1 ? w == 0 : heads[0] < HEADS) ? p.q_weight : p.k_weight;
            weights[w][0].load(weight + read.x);
            weights[w][1].load(weight + read.y);
        }
    };
    if (QK_NORM && UNROLL == 1) load_weights();
    const i64 slot = CACHE && token < u32(p.slot_count) ? slot_of(p, p.slots[token]) : -1;
    keep_loads_apart();

    const i64 position = GUESS ? read_past_l1(p.positions + token) : p.positions[token];
    if (PDL == 2) let_next_kernel_start();
    if ((!GUESS || position != guess) && lane < ROTATED) angles.load(p.table + position * p.table_row, HALF, at.x);
    if (QK_NORM && UNROLL > 1) load_weights();  // here they keep no registers while the loads above are waited for

    if (CACHE && heads[UNROLL - 1] >= HEADS) {
        const CacheRows::Row row = cache_rows.at(slot);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (heads[u] < HEADS) continue;
            if (heads[u] < Q_AND_K) {
                to[u] = row.of(p.k_cache, to[u]);
            } else {
                to[u] = p.v_cache.block_size == p.k_cache.block_size ? row.of(p.v_cache, to[u]) : nullptr;
            }
        }
    }

    float inverse_rms[UNROLL];
    if (QK_NORM) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x_values[SIZE], y_values[SIZE], sum = 0.f;
            x[u].unpack(x_values);
            y[u].unpack(y_values);
#pragma unroll
            for (int e = 0; e < SIZE; ++e) sum += x_values[e] * x_values[e] + y_values[e] * y_values[e];
            if (LANES != PAIRS && own_lane >= PAIRS) sum = 0.f;
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
            inverse_rms[u] = rsqrtf(sum * (1.f / HEAD_DIM) + p.eps);
        }
    }

#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int head = heads[u];
        if (head < Q_AND_K) {
            float x_values[SIZE], y_values[SIZE];
            x[u].unpack(x_values);
            y[u].unpack(y_values);
            if (QK_NORM) {
                const Vec(&weight)[2] = weights[UNROLL > 1 && head >= HEADS];
                scale_and_weigh(x_values, weight[0], inverse_rms[u]);
                scale_and_weigh(y_values, weight[1], inverse_rms[u]);
            }
            if (DEINTERLEAVE && lane < ROTATED) deinterleave(x_values, y_values);
            if (lane < ROTATED) angles.rotate(x_values, y_values);
            x[u].pack(x_values);
            y[u].pack(y_values);
            if (RETURN_K && exists[u] && head >= HEADS) {
                Element* k_out = p.k_out + (i64(token) * KV_HEADS + (head - HEADS)) * HEAD_DIM;
                store<false>(reinterpret_cast<char*>(k_out), at, x[u], y[u], 1.f);
            }
        }
        if (!exists[u] || to[u] == nullptr) continue;
        if (head >= HEADS && !CACHE) continue;
        if (head < HEADS ? Q_FP8 : FP8_CACHE) {
            store<true>(to[u], at, x[u], y[u], scales[u]);
        } else {
            store<false>(to[u], at, x[u], y[u], scales[u]);
        }
    }
}
