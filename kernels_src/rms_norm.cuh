// RMSNorm of rows by teams of warps, for kernels that do something with the normed rows: store them, or quantise them.
//
//     x · rsqrt(mean(x²) + eps) · weight        per row, in fp32; see CAST_BEFORE_WEIGHT for the rounding
//
// A row stays in registers between the sum of squares and the scaling: every byte crosses memory once. A team works on
// UNROLL rows, ROWS apart, with the loads of all of them in flight at once.
//
// Constants: CAST_BEFORE_WEIGHT, ROWS, UNROLL, VEC_BYTES, READ_ONCE, PDL, PREFETCH, as mla_dual_rms_norm.cu explains them.
#pragma once
#include "gpu.cuh"

// Where a lane leaves its vectors of normed rows, unless something else is to be done with them.
template <typename E, int WIDTH>
struct StoreNormed {
    E* out;  // contiguous rows

    // Called once, among the loads of the rows.
    __device__ __forceinline__ void load() {}
    // Called by all lanes of a warp together, with a NormedRows::Place.
    template <class Place, int SIZE>
    __device__ __forceinline__ void operator()(Place at, const float (&values)[SIZE]) const {
        Vector<E, SIZE * int(sizeof(E))> result;
        result.pack(values);
        if (at.exists()) result.store(out + i64(at.token) * WIDTH + at.vector * SIZE);
    }
};

// WARPS: of a team. MEET: whether its warps meet at a barrier. They must where there are several; and without named
// barriers all teams of a block must come to the block's, those of one warp as well.
template <typename Element, int WIDTH, int WARPS, bool MEET>
struct NormedRows {
    typedef Vector<Element, VEC_BYTES> Vec;
    static constexpr int LANES = WARPS * WARP_SIZE;
    static constexpr int VECTORS = WIDTH / Vec::SIZE;
    static constexpr int STEPS = (VECTORS + LANES - 1) / LANES;

    static_assert(WIDTH % Vec::SIZE == 0, "a row is a whole number of vectors");

    static __device__ __forceinline__ bool in_row(int vector) { return VECTORS % LANES == 0 || vector < VECTORS; }

    struct Place {
        int token, tokens;
        int vector;  // of the row
        __device__ __forceinline__ bool exists() const { return token < tokens && in_row(vector); }
    };

    static __device__ __forceinline__ void prefetch_row(const Element* row, int lane) {
        constexpr int LINE = 128 / int(sizeof(Element));
        for (int i = lane; i * LINE < WIDTH; i += LANES) prefetch_line_to_l2(row + i * LINE);
    }

    static __device__ __forceinline__ void prefetch(const Element* x, i64 stride, const Element* weight, int first,
                                                    int tokens, int lane) {
        if (blockIdx.x == 0) prefetch_row(weight, lane);  // the same for all blocks
        if (blockIdx.x >= multiprocessors() * PREFETCH) return;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (first + u * ROWS < tokens) prefetch_row(x + (first + u * ROWS) * stride, lane);
    }

    // `first`: the team's first row; `lane`: 0 to LANES-1 within it; `sums`: UNROLL × WARPS floats of shared memory of its
    // own; `finish`: as StoreNormed.
    template <class Finish>
    static __device__ __forceinline__ void run(const Element* x, i64 stride, const Element* weight, float eps, int first,
                                               int tokens, int lane, int barrier, float* sums, Finish finish) {
        if (PDL) {
            if (PREFETCH) prefetch(x, stride, weight, first, tokens, lane);
            wait_for_previous_kernel();
        }
        Vec rows[UNROLL][STEPS], weights[STEPS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = first + u * ROWS;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int i = s * LANES + lane;
                rows[u][s].raw = typename Vec::Raw{};
                if (token < tokens && in_row(i)) {
                    const Element* from = x + token * stride + i * Vec::SIZE;
                    READ_ONCE ? rows[u][s].load_once(from) : rows[u][s].load(from);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int i = s * LANES + lane;
            if (in_row(i)) weights[s].load(weight + i * Vec::SIZE);
        }
        finish.load();
        if (PDL == 2) let_next_kernel_start();

        float sum[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            sum[u] = 0.f;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                float values[Vec::SIZE];
                rows[u][s].unpack(values);
#pragma unroll
                for (int e = 0; e < Vec::SIZE; ++e) sum[u] += values[e] * values[e];
            }
            sum[u] = warp_sum(sum[u]);
        }
        if (MEET) {
            if (lane % WARP_SIZE == 0) {
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) sums[u * WARPS + lane / WARP_SIZE] = sum[u];
            }
            sync_team(barrier, LANES);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                sum[u] = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum[u] += sums[u * WARPS + w];
            }
        }

#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = first + u * ROWS;
            const float scale = rsqrtf(sum[u] * (1.f / WIDTH) + eps);
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int i = s * LANES + lane;
                float values[Vec::SIZE], factors[Vec::SIZE];
                rows[u][s].unpack(values);
                weights[s].unpack(factors);
#pragma unroll
                for (int e = 0; e < Vec::SIZE; ++e) values[e] *= scale;
                if (CAST_BEFORE_WEIGHT) round_to<Element>(values);
#pragma unroll
                for (int e = 0; e < Vec::SIZE; ++e) values[e] *= factors[e];
                finish(Place{token, tokens, i}, values);
            }
        }
    }
};
