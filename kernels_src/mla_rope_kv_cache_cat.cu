// mla_rope_kv_cache_cat: rotates q_pe and k_pe, writes (kv_c, k_pe) into the paged latent cache, and lays q_nope and the
// rotated q_pe side by side, in one launch.
//
// A token's work is units of VEC_BYTES of output: first those that are only copied (each head's q_nope, then kv_c), then
// those that are rotated (each head's q_pe, then k_pe), so that nearly all warps do one of the two. A thread takes UNROLL
// units, THREADS apart, with all their loads in flight before the first store. Neighbouring threads write neighbouring
// bytes; every byte crosses memory once, but for the rotary table and the partner half that NeoX rotation pairs with.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), TABLE (element of cos_sin_cache), HEADS, NOPE (width of q_nope, or
// 0: none), ROPE, LATENT, NEOX, CACHE (0 none, 1 ELEMENT, 2 fp8 e4m3 of value ÷ scale).
// Tunables:
//   THREADS    per block
//   UNROLL     units of a thread: more loads in flight, fewer blocks
//   VEC_BYTES  of output per unit
//   READ_ONCE  mark the activations as dead after reading
//   PDL        programmatic dependent launch: 0 no; let the next kernel start 1: at once, 2: when the loads are on their way
//   PREFETCH   with PDL: the first PREFETCH blocks of each multiprocessor pull what they copy into L2 while they wait
#include "fp8.cuh"

typedef ELEMENT Element;
typedef TABLE TableElement;

struct Params {
    const Element* q_nope;
    const Element* q_pe;
    const Element* kv_c;
    const Element* k_pe;
    const i64* positions;
    const TableElement* table;  // a row: ROPE/2 cosines, then ROPE/2 sines
    const i64* slots;
    void* cache;
    const float* scale;
    Element* q_out;
    Element* k_pe_out;
    i64 q_nope_token, q_nope_head;  // strides, in elements
    i64 q_pe_token, q_pe_head;
    i64 kv_c_token, k_pe_token, table_row;
    i64 cache_block, cache_row;
    int block_size;  // cache rows per block
    int tokens;
};

typedef Vector<Element, VEC_BYTES> Vec;
constexpr int SIZE = Vec::SIZE;
constexpr int HALF = ROPE / 2;
constexpr int COPY_HEAD = NOPE / SIZE;                           // units that copy, of a head
constexpr int COPY_LATENT = CACHE ? LATENT / SIZE : 0;           // and of the latent
constexpr int ROTATE = ROPE / SIZE;                              // units that rotate, of a head or of k_pe
constexpr int COPIES = HEADS * COPY_HEAD + COPY_LATENT;
constexpr int UNITS = COPIES + (HEADS + 1) * ROTATE;             // of a token
constexpr int PER_BLOCK = THREADS * UNROLL;
constexpr int Q_ROW = NOPE + ROPE;

static_assert(NOPE % SIZE == 0 && LATENT % SIZE == 0, "whole units");
static_assert(NEOX ? HALF % SIZE == 0 : ROPE % SIZE == 0, "a unit lies within a half");

struct Unit {
    int token;  // -1: none
    int index;  // within the token
};

// The block's first token and unit are worked out in 64 bits once; from there 32 bits do.
struct First {
    i64 token;
    int index;
    __device__ __forceinline__ First() {
        const i64 begin = i64(blockIdx.x) * PER_BLOCK;
        token = begin / UNITS;
        index = int(begin - token * UNITS);
    }
};

__device__ __forceinline__ Unit unit_at(const First& first, int offset, int tokens) {
    const int local = first.index + offset;
    const int ahead = local / UNITS;
    const i64 token = first.token + ahead;
    return {token < tokens ? int(token) : -1, local - ahead * UNITS};
}

// Where the unit's input begins.
__device__ __forceinline__ const Element* source(const Params& p, Unit unit) {
    if (unit.index < COPIES) {
        if (NOPE && unit.index < HEADS * COPY_HEAD) {
            const int head = unit.index / (COPY_HEAD ? COPY_HEAD : 1), part = unit.index - head * COPY_HEAD;
            return p.q_nope + unit.token * p.q_nope_token + head * p.q_nope_head + part * SIZE;
        }
        return p.kv_c + unit.token * p.kv_c_token + (unit.index - HEADS * COPY_HEAD) * SIZE;
    }
    const int rotated = unit.index - COPIES, head = rotated / ROTATE, part = rotated - head * ROTATE;
    return head < HEADS ? p.q_pe + unit.token * p.q_pe_token + head * p.q_pe_head + part * SIZE
                        : p.k_pe + unit.token * p.k_pe_token + part * SIZE;
}

// Writes SIZE elements of a token's cache row, from element `at` on; nothing for a padded token.
__device__ __forceinline__ void write_cache(const Params& p, int token, int at, const Vec& value) {
    if (!CACHE) return;
    const i64 slot = p.slots[token];
    if (slot < 0) return;
    const i64 block = slot / p.block_size;
    const i64 row = block * p.cache_block + (slot - block * p.block_size) * p.cache_row;
    if (CACHE == 1) {
        value.store(static_cast<Element*>(p.cache) + row + at);
    } else {
        float values[SIZE];
        value.unpack(values);
        const float scale = *p.scale;
#pragma unroll
        for (int e = 0; e < SIZE; ++e) values[e] = values[e] / scale;
        Fp8<SIZE>::store(static_cast<unsigned char*>(p.cache) + row + at, values);
    }
}

template <int COUNT>
__device__ __forceinline__ void load_table(const TableElement* from, float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 16 / int(sizeof(TableElement))) {
        constexpr int STEP = COUNT < 16 / int(sizeof(TableElement)) ? COUNT : 16 / int(sizeof(TableElement));
        Vector<TableElement, STEP * int(sizeof(TableElement))> vector;
        vector.load(from + i);
        float part[STEP];
        vector.unpack(part);
#pragma unroll
        for (int e = 0; e < STEP; ++e) values[i + e] = part[e];
    }
}

// The rotated unit: x · cos ∓ partner · sin (Su et al. 2021, "RoFormer"), pairing element i with i + ROPE/2 (NeoX) or even
// with odd neighbours (GPT-J).
template <bool IS_NEOX>
__device__ __forceinline__ Vec rotate(const Params& p, Unit unit, const Vec& x, const Vec& partner, i64 position) {
    const int part = (unit.index - COPIES) % ROTATE;
    const TableElement* row = p.table + position * p.table_row;
    float values[SIZE], results[SIZE];
    x.unpack(values);
    if constexpr (IS_NEOX) {
        float others[SIZE], cosines[SIZE], sines[SIZE];
        partner.unpack(others);
        const int at = (part * SIZE) % HALF;
        const float sign = part * SIZE < HALF ? -1.f : 1.f;
        load_table(row + at, cosines);
        load_table(row + HALF + at, sines);
#pragma unroll
        for (int e = 0; e < SIZE; ++e) results[e] = values[e] * cosines[e] + sign * others[e] * sines[e];
    } else {
        float cosines[SIZE / 2], sines[SIZE / 2];
        load_table(row + part * (SIZE / 2), cosines);
        load_table(row + HALF + part * (SIZE / 2), sines);
#pragma unroll
        for (int e = 0; e < SIZE; e += 2) {
            results[e] = values[e] * cosines[e / 2] - values[e + 1] * sines[e / 2];
            results[e + 1] = values[e + 1] * cosines[e / 2] + values[e] * sines[e / 2];
        }
    }
    Vec rotated;
    rotated.pack(results);
    return rotated;
}

extern "C" __global__ void __launch_bounds__(THREADS) mla_rope_kv_cache_cat(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const First first;
    if (PDL) {
        if (PREFETCH && blockIdx.x < multiprocessors() * PREFETCH) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const Unit unit = unit_at(first, u * THREADS + threadIdx.x, p.tokens);
                const Element* from = unit.token < 0 ? nullptr : source(p, unit);
                // One thread for each 128 bytes, or nearly: addresses of a run are VEC_BYTES apart.
                if (from && reinterpret_cast<unsigned long long>(from) % 128 < VEC_BYTES) prefetch_line_to_l2(from);
            }
        }
        wait_for_previous_kernel();
    }

    Unit units[UNROLL];
    Vec values[UNROLL], partners[UNROLL];
    i64 positions[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        units[u] = unit_at(first, u * THREADS + threadIdx.x, p.tokens);
        values[u].raw = partners[u].raw = typename Vec::Raw{};
        positions[u] = 0;
        if (units[u].token < 0) continue;
        const Element* from = source(p, units[u]);
        if (units[u].index < COPIES) {
            READ_ONCE ? values[u].load_once(from) : values[u].load(from);
        } else {
            positions[u] = p.positions[units[u].token];
            values[u].load(from);
            const int part = (units[u].index - COPIES) % ROTATE;
            if (NEOX) partners[u].load(from + (part * SIZE < HALF ? HALF : -HALF));
        }
    }
    if (PDL == 2) let_next_kernel_start();

#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit unit = units[u];
        if (unit.token < 0) continue;
        if (unit.index < COPIES) {
            if (NOPE && unit.index < HEADS * COPY_HEAD) {
                const int head = unit.index / (COPY_HEAD ? COPY_HEAD : 1), part = unit.index - head * COPY_HEAD;
                values[u].store(p.q_out + (i64(unit.token) * HEADS + head) * Q_ROW + part * SIZE);
            } else {
                write_cache(p, unit.token, (unit.index - HEADS * COPY_HEAD) * SIZE, values[u]);
            }
        } else {
            const int rotated = unit.index - COPIES, head = rotated / ROTATE, part = rotated - head * ROTATE;
            const Vec result = rotate<NEOX>(p, unit, values[u], partners[u], positions[u]);
            if (head < HEADS) {
                result.store(p.q_out + (i64(unit.token) * HEADS + head) * Q_ROW + NOPE + part * SIZE);
            } else {
                result.store(p.k_pe_out + i64(unit.token) * ROPE + part * SIZE);
                write_cache(p, unit.token, LATENT + part * SIZE, result);
            }
        }
    }
}
