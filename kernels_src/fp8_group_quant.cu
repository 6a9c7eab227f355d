// fp8_group_quant: quantises each group of consecutive elements of a row by its own scale, or all by a given one; see
// autofuse/ops/quant.py for the formats. Where NORM is set, a row is normed first (RMSNorm), in the same launch.
//
// Without NORM, a unit of work is a group. Neighbouring lanes share it, each with LOADS loads of 16 bytes; a block of
// X_WARPS · 32 threads takes UNROLL times as many units as it has room for, with all their loads in flight at once. The
// amax of a group takes a few shuffles and no shared memory; every byte crosses memory once.
// With NORM, a block takes ROWS × UNROLL tokens, X_WARPS warps for each (see rms_norm.cuh), whose normed vectors are
// quantised while they are still in registers.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), X_WIDTH, GROUP, UE8M0, SCALE_LAYOUT (see quant.cuh), NORM,
// CAST_BEFORE_WEIGHT, VEC_BYTES (16).
// Tunables:
//   X_WARPS    of a block; with NORM, of a row: more shorten a row's latency, and wait for each other at a barrier
//   ROWS       with NORM: tokens side by side in a block; else 1
//   UNROLL     units (with NORM: rows) of a thread in turn: more loads in flight, more registers, fewer blocks
//   LOADS      of 16 bytes that a lane has of a group: fewer lanes, shuffles and divisions for a group; with NORM 1
//   SPREAD     a lane's vectors lie 0: side by side, which makes for wide stores, or 1: a group's lanes apart, so that a
//              load of the warp covers whole lines
//   READ_ONCE  mark x as dead after reading
//   PDL        programmatic dependent launch: 0 no; let the next kernel start 1: at once, 2: when the loads are on their way
//   PREFETCH   with PDL: the first PREFETCH blocks of each multiprocessor pull their part of x into L2 while they wait
#include "quant.cuh"
#include "rms_norm.cuh"

typedef ELEMENT Element;

struct Params {
    const Element* x;
    const float* scale;     // static FP8 and NVFP4
    const Element* weight;  // with NORM
    u8* values;
    void* scales;
    i64 x_stride;  // elements from row to row of x; the values' rows are contiguous
    int tokens;
    float eps;
};

constexpr int THREADS = ROWS * X_WARPS * (NORM ? WARP_SIZE : 32);

#if NORM

extern "C" __global__ void __launch_bounds__(THREADS) fp8_group_quant(const Params p) {
    __shared__ float sums[ROWS * X_WARPS * UNROLL];
    if (PDL == 1) let_next_kernel_start();

    const int team = warp_uniform(threadIdx.x / WARP_SIZE) / X_WARPS;
    const int lane = threadIdx.x - team * X_WARPS * WARP_SIZE;
    const int first = blockIdx.x * (ROWS * UNROLL) + team;
    const QuantiseNormed<Element, X_WIDTH> quantise{{p.values, p.scales, p.tokens}, p.scale};
    NormedRows<Element, X_WIDTH, X_WARPS, (X_WARPS > 1)>::run(p.x, p.x_stride, p.weight, p.eps, first, p.tokens, lane,
                                                              1 + team, sums + team * X_WARPS * UNROLL, quantise);
    if (GROUP == 16) {
        const i64 blocks = (i64(p.tokens) + ROWS * UNROLL - 1) / (ROWS * UNROLL);
        zero_padded_scales(static_cast<u8*>(p.scales), p.tokens, X_WIDTH / 16, i64(blockIdx.x) * THREADS + threadIdx.x,
                           blocks * THREADS);
    }
}

#else

constexpr int PER_LANE = LOADS * Vector<Element, 16>::SIZE;
constexpr int LANES = GROUP ? GROUP / PER_LANE : 1;  // of a unit
typedef Quantiser<Element, X_WIDTH, LOADS, LANES, SPREAD> Units;
constexpr int SLOTS = THREADS / LANES;  // units side by side in a block
constexpr int PER_BLOCK = SLOTS * UNROLL;

// The block's first unit is worked out in 64 bits once; from there 32 bits do.
struct First {
    i64 token;
    u32 index;  // within the token

    __device__ __forceinline__ First() {
        const i64 begin = i64(blockIdx.x) * PER_BLOCK;
        token = begin / Units::UNITS;
        index = u32(begin - token * Units::UNITS);
    }
};

struct Unit {
    i64 token;
    int index;
    bool exists;

    __device__ __forceinline__ Unit(const First& first, int slot, int tokens) {
        const u32 local = first.index + u32(slot), ahead = local / u32(Units::UNITS);
        token = first.token + ahead;
        index = int(local - ahead * Units::UNITS);
        exists = token < tokens;
    }
    __device__ __forceinline__ const Element* source(const Params& p, int lane, int vector) const {
        return p.x + token * p.x_stride + index * Units::UNIT + Units::element(lane, vector);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) fp8_group_quant(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const First first;
    const int slot = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (PDL) {
        if (PREFETCH && blockIdx.x < multiprocessors() * PREFETCH) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const Unit unit(first, u * SLOTS + slot, p.tokens);
#pragma unroll
                for (int v = 0; v < LOADS; ++v) {
                    const Element* from = unit.source(p, lane, v);
                    // One thread for each 128 bytes: addresses of a unit are 16 bytes apart.
                    if (unit.exists && reinterpret_cast<unsigned long long>(from) % 128 < 16) prefetch_line_to_l2(from);
                }
            }
        }
        wait_for_previous_kernel();
    }

    Units::Vec x[UNROLL][LOADS];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit unit(first, u * SLOTS + slot, p.tokens);
#pragma unroll
        for (int v = 0; v < LOADS; ++v) {
            x[u][v].raw = Units::Vec::Raw{};
            if (!unit.exists) continue;
            const Element* from = unit.source(p, lane, v);
            READ_ONCE ? x[u][v].load_once(from) : x[u][v].load(from);
        }
    }
    GivenScale given;
    given.load(p.scale);
    if (PDL == 2) let_next_kernel_start();

    const QuantisedRows to{p.values, p.scales, p.tokens};
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const Unit unit(first, u * SLOTS + slot, p.tokens);
        Units::run(x[u], given, to, unit.token, unit.index, lane, unit.exists);
    }
    if (GROUP == 16) {
        const i64 blocks = (i64(p.tokens) * Units::UNITS + PER_BLOCK - 1) / PER_BLOCK;
        zero_padded_scales(static_cast<u8*>(p.scales), p.tokens, Units::UNITS, i64(blockIdx.x) * THREADS + threadIdx.x,
                           blocks * THREADS);
    }
}

#endif
