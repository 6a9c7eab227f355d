// RoPE of MLA's query and key, the write to the latent cache, and the query's concatenation: what kernels of these share.
// COPY_Q_NOPE, which they define, says whether the NOPE columns are q_nope's, and copied; else another part of the kernel
// writes them.
//
// A token's work is units: a vector that is copied (of kv_c, or of a head's q_nope), a vector that is rotated (of k_pe, or of
// a head's q_pe), or, where NeoX pairs them, two such vectors half a row apart. With DEINTERLEAVE a unit reads two neighbouring
// vectors of pairs and writes two that are half a row apart: whole vectors either way. A thread takes UNROLL units, THREADS
// apart, with all their loads in flight before the first store. Neighbouring threads have neighbouring units, and nearly all
// warps have units of one kind. Every byte crosses memory once, but for the rotary table.
//
// The units of CHUNK tokens are sorted by kind: first kv_c, which needs its slot and maybe a scale; then what is rotated,
// k_pe before the heads, which needs its position, and then the table; then what is just copied.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), TABLE (element of cos_sin_cache), HEADS, NOPE (columns of the query
// before those that are rotated, or 0: none), ROPE, LATENT, NEOX, DEINTERLEAVE (pairs that are neighbours are written half a
// row apart), Q_FP8 (the query is returned as fp8 e4m3 of value ÷ q_scale), APART (k_pe has a cache of its own), and CACHE:
// 0 none, 1 ELEMENT, 2 fp8 e4m3 of value ÷ kv_scale, 3 rows of 656 bytes (vLLM's fp8_ds_mla): 512 fp8 e4m3 values of kv_c, four
// fp32 scales, max(amax ÷ 448, smallest normal number) of 128 values each, 64 elements of k_pe.
// Tunables:
//   THREADS    per block
//   UNROLL     units of a thread: more loads in flight, fewer blocks
//   VEC_BYTES  of input per vector; 32 are two loads, and one store where the query is fp8
//   CHUNK      tokens whose units are sorted by kind: long chains of loads begin first, against rows written whole
//   READ_ONCE  mark the activations as dead after reading
//   PDL        programmatic dependent launch: 0 no; let the next kernel start 1: at once, 2: when the loads are on their way
//   PREFETCH   with PDL: the first PREFETCH blocks of each multiprocessor pull what they read into L2 while they wait
//   GUESS      these blocks also look at the positions while they wait. Positions were nearly always written long before,
//              so after the wait the rows of the table that they name are loaded at once, and again if a position turns out
//              to be another: one round trip to memory instead of two. Nothing that was read before the wait is computed with
#pragma once
#include "early.cuh"
#include "fp8.cuh"
#include "rope.cuh"

typedef ELEMENT Element;
typedef TABLE TableElement;

struct Cache {
    void* data;
    i64 block, row;  // strides, in elements
    int blocks;
    int block_size;  // rows per block
};

struct RopeParams {
    const Element* q_nope;
    const Element* q_pe;
    const Element* kv_c;
    const Element* k_pe;
    const i64* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const i64* slots;
    const float* kv_scale;
    const float* q_scale;
    void* q_out;
    Element* k_pe_out;
    i64 q_nope_token, q_nope_head;  // strides, in elements
    i64 q_pe_token, q_pe_head;
    i64 kv_c_token, k_pe_token, table_row;
    Cache kv_cache;
    Cache k_pe_cache;  // APART
    int tokens;
    int slot_count;  // tokens from there on are padded
    int table_rows;
    int slots_from_end;  // negative slots are counted from the end
};

constexpr int SIZE = VEC_BYTES / int(sizeof(Element));
constexpr int ALIGN = VEC_BYTES < 16 ? VEC_BYTES : 16;  // bytes that inputs begin at multiples of
constexpr int HALF = ROPE / 2;
constexpr bool IN_HALVES = NEOX || DEINTERLEAVE;  // rotated units have two vectors, written half a row apart,
constexpr int PARTNER = DEINTERLEAVE ? SIZE : HALF;  // and read so far apart
constexpr int Q_ROW = NOPE + ROPE;
constexpr u32 LATENTS = CACHE ? LATENT / SIZE : 0;                        // units of a token: of kv_c,
constexpr u32 ROTATED_ROW = (IN_HALVES ? HALF : ROPE) / SIZE;             // of a row that is rotated,
constexpr u32 ROTATED = (HEADS + 1) * ROTATED_ROW;                        // of k_pe and each head's q_pe,
constexpr u32 COPIED_ROW = COPY_Q_NOPE ? NOPE / SIZE : 0, COPIED = HEADS * COPIED_ROW;      // and of q_nope
constexpr u32 UNITS = LATENTS + ROTATED + COPIED;
constexpr u32 CHUNK_UNITS = CHUNK * UNITS;
constexpr u32 PER_BLOCK = THREADS * UNROLL;

constexpr bool DS_MLA = CACHE == 3;
constexpr int DS_MLA_GROUP = 128, DS_MLA_LANES = DS_MLA_GROUP / SIZE;
constexpr int DS_MLA_SCALES = 512, DS_MLA_K_PE = 528;  // bytes from the beginning of a row
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// The largest power of two that divides the widths, and 16: what addresses in dense rows of fp8 are multiples of.
constexpr int CACHE_WIDTHS = LATENT | ROPE | 16, FP8_CACHE_ALIGN = CACHE_WIDTHS & -CACHE_WIDTHS;
constexpr int QUERY_WIDTHS = NOPE | ROPE | 16, FP8_QUERY_ALIGN = QUERY_WIDTHS & -QUERY_WIDTHS;

static_assert(NOPE % SIZE == 0 && LATENT % SIZE == 0 && (IN_HALVES ? HALF : ROPE) % SIZE == 0, "whole units");
static_assert(!(NEOX && DEINTERLEAVE), "NeoX has no neighbours to take apart");
static_assert(i64(CHUNK) * UNITS < 1 << 30, "32 bits do within a chunk");
static_assert(!DS_MLA || (LATENT == 512 && ROPE == 64 && sizeof(Element) == 2), "the layout's own widths");
// A chunk begins with a warp, so groups are neighbouring lanes of one.
static_assert(!DS_MLA || (CHUNK % 64 == 0 && THREADS % 64 == 0 && DS_MLA_LANES <= 32), "a group lies within a warp");

// COUNT consecutive elements in registers, moved ALIGN bytes at a time, or at once where they are fewer.
template <typename E, int COUNT>
struct Run {
    static constexpr int BYTES = COUNT * int(sizeof(E)), STEP = (BYTES < ALIGN ? BYTES : ALIGN) / int(sizeof(E));
    Vector<E, STEP * int(sizeof(E))> parts[COUNT / STEP];

    __device__ __forceinline__ void load(const E* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) parts[i / STEP].load_at_once(from + i);
    }
    __device__ __forceinline__ void load_once(const E* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) parts[i / STEP].load_once(from + i);
    }
    __device__ __forceinline__ void store(E* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) parts[i / STEP].store_at_once(to + i);
    }
    __device__ __forceinline__ void unpack(float (&values)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            float part[STEP];
            parts[i / STEP].unpack(part);
#pragma unroll
            for (int e = 0; e < STEP; ++e) values[i + e] = part[e];
        }
    }
    __device__ __forceinline__ void pack(const float (&values)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            float part[STEP];
#pragma unroll
            for (int e = 0; e < STEP; ++e) part[e] = values[i + e];
            parts[i / STEP].pack(part);
        }
    }
};
typedef Run<Element, SIZE> Values;

// ---- Which unit a thread has ----------------------------------------------------------------------------------------

enum Kind { NOTHING, KV_C, K_PE, Q_PE, Q_NOPE };

struct Unit {
    Kind kind;
    int token;
    int at;               // where it goes in its row of kv_c, k_pe or q_pe
    const Element* from;  // its input
    i64 to;               // where it goes in q_out or k_pe_out, in elements

    __device__ __forceinline__ bool is_rotated() const { return kind == K_PE || kind == Q_PE; }
    __device__ __forceinline__ bool is_cached() const { return CACHE && (kind == KV_C || kind == K_PE); }
};

// A block's first chunk and unit are worked out in 64 bits once; from there 32 bits do.
struct First {
    u32 chunk, unit;
    explicit __device__ __forceinline__ First(u32 block) {
        const unsigned long long begin = (unsigned long long)block * PER_BLOCK;
        chunk = u32(begin / CHUNK_UNITS);
        unit = u32(begin - (unsigned long long)chunk * CHUNK_UNITS);
    }
};

__device__ __forceinline__ Unit unit_at(const RopeParams& p, const First& first, u32 offset) {
    const u32 ahead = (first.unit + offset) / CHUNK_UNITS;
    u32 unit = first.unit + offset - ahead * CHUNK_UNITS;
    const u32 begin = (first.chunk + ahead) * CHUNK, left = begin < u32(p.tokens) ? p.tokens - begin : 0;
    const u32 count = left < CHUNK ? left : CHUNK;  // tokens of the chunk
    if (LATENTS && unit < count * LATENTS) {
        const u32 in_chunk = unit / (LATENTS ? LATENTS : 1), at = (unit - in_chunk * LATENTS) * SIZE;
        const i64 token = begin + in_chunk;
        return {KV_C, int(token), int(at), p.kv_c + token * p.kv_c_token + at, 0};
    }
    unit -= count * LATENTS;
    if (unit < count * ROTATED) {
        const u32 row = unit / ROTATED_ROW, in_chunk = row / (HEADS + 1), at = (unit - row * ROTATED_ROW) * SIZE;
        const int head = int(row - in_chunk * (HEADS + 1)) - 1;
        const u32 source = DEINTERLEAVE ? 2 * at : at;
        const i64 token = begin + in_chunk;
        if (head < 0) return {K_PE, int(token), int(at), p.k_pe + token * p.k_pe_token + source, token * ROPE + at};
        const Element* from = p.q_pe + token * p.q_pe_token + head * p.q_pe_head + source;
        return {Q_PE, int(token), int(at), from, (token * HEADS + head) * Q_ROW + NOPE + at};
    }
    unit -= count * ROTATED;
    if (COPIED && unit < count * COPIED) {
        const u32 row = unit / (COPIED ? COPIED_ROW : 1), in_chunk = row / HEADS, at = (unit - row * COPIED_ROW) * SIZE;
        const u32 head = row - in_chunk * HEADS;
        const i64 token = begin + in_chunk;
        const Element* from = p.q_nope + token * p.q_nope_token + head * p.q_nope_head + at;
        return {Q_NOPE, int(token), int(at), from, (token * HEADS + head) * Q_ROW + at};
    }
    return {NOTHING, 0, 0, p.k_pe, 0};
}

// ---- The rotary table -----------------------------------------------------------------------------------------------

template <bool OF_TWO>
struct AnglesOf {
    static constexpr int COUNT = OF_TWO ? SIZE : SIZE / 2;
    Run<TableElement, COUNT> cosines, sines;

    static __device__ __forceinline__ const TableElement* source(const RopeParams& p, i64 position, int at) {
        return p.table + position * p.table_row + (OF_TWO ? at : at / 2);
    }
    __device__ __forceinline__ void load(const TableElement* from) {
        cosines.load(from);
        sines.load(from + HALF);
    }
    // `x` and its partner `y`; GPT-J: `x` alone.
    __device__ __forceinline__ void rotate(Values& x, Values& y) const {
        float x_values[SIZE], cosine_values[COUNT], sine_values[COUNT];
        x.unpack(x_values);
        cosines.unpack(cosine_values);
        sines.unpack(sine_values);
        if constexpr (OF_TWO) {
            float y_values[SIZE];
            y.unpack(y_values);
            if constexpr (DEINTERLEAVE) deinterleave(x_values, y_values);
            rotate_neox(x_values, y_values, cosine_values, sine_values);
            y.pack(y_values);
        } else {
            rotate_gptj(x_values, cosine_values, sine_values);
        }
        x.pack(x_values);
    }
};
typedef AnglesOf<IN_HALVES> UnitAngles;

// ---- What is written ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_query(const RopeParams& p, i64 to, const Values& values, const Fp8Scale& scale) {
    if constexpr (Q_FP8) {
        float quotients[SIZE];
        values.unpack(quotients);
        scale.divide(quotients);
        Fp8<SIZE, FP8_QUERY_ALIGN>::store(static_cast<unsigned char*>(p.q_out) + to, quotients);
    } else {
        values.store(static_cast<Element*>(p.q_out) + to);
    }
}

// A slot as it was given, or counted from the beginning.
__device__ __forceinline__ i64 slot_of(const Cache& cache, i64 given, int from_end) {
    return given < 0 && from_end ? given + i64(cache.blocks) * cache.block_size : given;
}

// Where a slot's row begins, in elements; -1 for a slot that is none of the cache's.
__device__ __forceinline__ i64 row_of(const Cache& cache, i64 slot) {
    if (slot < 0 || slot >= i64(cache.blocks) * cache.block_size) return -1;
    if (cache.block == cache.block_size * cache.row) return slot * cache.row;  // no need to wait for a division
    const i64 block = i64((unsigned long long)slot / u32(cache.block_size));
    return block * cache.block + (slot - block * cache.block_size) * cache.row;
}

__device__ __forceinline__ void store_fp8(const Cache& cache, i64 at, const Values& values, const Fp8Scale& scale) {
    float quotients[SIZE];
    values.unpack(quotients);
    scale.divide(quotients);
    Fp8<SIZE, DS_MLA ? 16 : FP8_CACHE_ALIGN>::store(static_cast<unsigned char*>(cache.data) + at, quotients);
}

// `row`: where the token's cache row begins. `scale`: of CACHE 2 the given one, of CACHE 3 the group's.
__device__ __forceinline__ void cache_kv_c(const RopeParams& p, int at, i64 row, const Values& values, const Fp8Scale& scale) {
    if constexpr (CACHE == 1) {
        values.store(static_cast<Element*>(p.kv_cache.data) + row + at);
    } else {
        store_fp8(p.kv_cache, row + at, values, scale);
        if (DS_MLA && at % DS_MLA_GROUP == 0) {
            void* scales = static_cast<unsigned char*>(p.kv_cache.data) + row + DS_MLA_SCALES;
            static_cast<float*>(scales)[at / DS_MLA_GROUP] = scale.scale;
        }
    }
}

__device__ __forceinline__ void cache_k_pe(const RopeParams& p, int at, i64 row, const Values& values, const Fp8Scale& scale) {
    const Cache& cache = APART ? p.k_pe_cache : p.kv_cache;
    if constexpr (DS_MLA) {
        void* k_pe = static_cast<unsigned char*>(cache.data) + row + DS_MLA_K_PE;
        values.store(static_cast<Element*>(k_pe) + at);
    } else if constexpr (CACHE == 2) {
        store_fp8(cache, row + (APART ? 0 : LATENT) + at, values, scale);
    } else {
        values.store(static_cast<Element*>(cache.data) + row + (APART ? 0 : LATENT) + at);
    }
}

// Of a group's values, which neighbouring lanes hold. All lanes of the warp call it.
__device__ __forceinline__ float ds_mla_scale(const Values& values) {
    float elements[SIZE], amax = 0.f;
    values.unpack(elements);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) {
        const float size = elements[e] < 0.f ? -elements[e] : elements[e];
        amax = size > amax ? size : amax;
    }
#pragma unroll
    for (int offset = DS_MLA_LANES / 2; offset > 0; offset /= 2) {
        const float other = shuffle_xor(amax, offset);
        amax = other > amax ? other : amax;
    }
    const float scale = amax / 448.f;
    return scale > SMALLEST_NORMAL ? scale : SMALLEST_NORMAL;
}

// ---- A block's work -------------------------------------------------------------------------------------------------

// Each line by the thread that has its first unit, or nearly: addresses of a row's units are VEC_BYTES apart.
template <typename T>
__device__ __forceinline__ void prefetch(const T* from) {
    if (reinterpret_cast<unsigned long long>(from) % 128 < VEC_BYTES) prefetch_line_to_l2(from);
}

// The units of block `block` of those that have units.
__device__ __forceinline__ void rope_block(const RopeParams& p, u32 block) {
    const First first(block);
    Unit units[UNROLL];
    int guesses[UNROLL];  // the unit's position, most likely; -1: not guessed
    const TableElement* guessed[UNROLL];  // where its angles are then
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        units[u] = unit_at(p, first, u * THREADS + threadIdx.x);
        guesses[u] = -1;
    }

    if (PDL) {
        if (PREFETCH && block < multiprocessors() * PREFETCH) {
            i64 early[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const Unit& unit = units[u];
                if (unit.kind == NOTHING) continue;
                prefetch(unit.from);
                if (IN_HALVES && unit.is_rotated()) prefetch(unit.from + PARTNER);
                if (GUESS && unit.is_rotated()) early[u] = read_early(p.positions + unit.token);
                // What layers share is in L2 unless they were large. Once for each token:
                if (unit.kind == K_PE && unit.at == 0) {
                    if (!GUESS) prefetch_line_to_l2(p.positions + unit.token);
                    if (CACHE && unit.token < p.slot_count) prefetch_line_to_l2(p.slots + unit.token);
                }
            }
            if (block == 0 && threadIdx.x == 0) {
                if (CACHE == 2) prefetch_line_to_l2(p.kv_scale);
                if (Q_FP8) prefetch_line_to_l2(p.q_scale);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (!GUESS || !units[u].is_rotated()) continue;
                // Whatever it is, a row that there is.
                guesses[u] = early[u] < 0 ? 0 : early[u] < p.table_rows ? int(early[u]) : p.table_rows - 1;
                guessed[u] = UnitAngles::source(p, guesses[u], units[u].at);
                if (units[u].kind == K_PE) {
                    prefetch(guessed[u]);
                    prefetch(guessed[u] + HALF);
                }
            }
        }
        wait_for_previous_kernel();
    }

    // All loads but those of the table that need a position.
    Values values[UNROLL], partners[UNROLL];
    UnitAngles angles[UNROLL];
    i64 positions[UNROLL], slots[UNROLL];
    float scales[UNROLL];  // of what is written as fp8
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit& unit = units[u];
        const bool of_cache = CACHE == 2 && (!Q_FP8 || unit.is_cached());
        scales[u] = of_cache || Q_FP8 ? *(of_cache ? p.kv_scale : p.q_scale) : 1.f;
        if (unit.kind == NOTHING) continue;
        READ_ONCE ? values[u].load_once(unit.from) : values[u].load(unit.from);
        if (unit.is_rotated()) {
            if (GUESS && guesses[u] >= 0) angles[u].load(guessed[u]);
            positions[u] = GUESS ? read_past_l1(p.positions + unit.token) : p.positions[unit.token];
            if (IN_HALVES) READ_ONCE ? partners[u].load_once(unit.from + PARTNER) : partners[u].load(unit.from + PARTNER);
        }
        if (unit.is_cached()) {
            slots[u] = unit.token < p.slot_count ? slot_of(p.kv_cache, p.slots[unit.token], p.slots_from_end) : -1;
        }
    }
    if (PDL == 2) let_next_kernel_start();

    i64 rows[UNROLL];  // of the cache
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit& unit = units[u];
        if (unit.is_rotated() && positions[u] != guesses[u])
            angles[u].load(UnitAngles::source(p, positions[u], unit.at));
        if (unit.is_cached()) rows[u] = row_of(APART && unit.kind == K_PE ? p.k_pe_cache : p.kv_cache, slots[u]);
    }

#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit& unit = units[u];
        if constexpr (DS_MLA) {
            // kv_c comes first in a chunk: a warp has some if its first lane has.
            const u32 first_lane = threadIdx.x / WARP_SIZE * WARP_SIZE;
            const bool some = unit_at(p, first, u * THREADS + first_lane).kind == KV_C;
            const float group_scale = warp_uniform(some) ? ds_mla_scale(values[u]) : 1.f;
            if (unit.kind == KV_C) scales[u] = group_scale;
        }
        const Fp8Scale scale(scales[u]);
        if (unit.kind == KV_C) {
            if (rows[u] >= 0) cache_kv_c(p, unit.at, rows[u], values[u], scale);
            continue;
        }
        if (unit.is_rotated()) angles[u].rotate(values[u], partners[u]);
        if (unit.kind == K_PE) {
            values[u].store(p.k_pe_out + unit.to);
            if (IN_HALVES) partners[u].store(p.k_pe_out + unit.to + HALF);
            if (CACHE && rows[u] >= 0) {
                cache_k_pe(p, unit.at, rows[u], values[u], scale);
                if (IN_HALVES) cache_k_pe(p, unit.at + HALF, rows[u], partners[u], scale);
            }
        } else if (unit.kind != NOTHING) {
            store_query(p, unit.to, values[u], scale);
            if (IN_HALVES && unit.kind == Q_PE) store_query(p, unit.to + HALF, partners[u], scale);
        }
    }
}
