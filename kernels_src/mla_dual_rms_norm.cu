// mla_dual_rms_norm: two RMSNorms of each token in one launch, the q latent's and the kv latent's.
//
//     out = x · rsqrt(mean(x²) + eps) · weight        per row, in fp32; see CAST_BEFORE_WEIGHT for the rounding
//
// A block takes ROWS × UNROLL consecutive tokens. Each of its ROWS teams has Q_WARPS warps for the q rows and KV_WARPS
// warps for the kv rows; a team works on UNROLL tokens, ROWS apart, with the loads of all of them in flight at once.
// A row stays in registers between the sum of squares and the scaling: every byte crosses memory once.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), Q_WIDTH, KV_WIDTH, CAST_BEFORE_WEIGHT.
// Tunables:
//   Q_WARPS, KV_WARPS  warps for one row: more shorten a row's latency, and add a barrier where there are several
//   ROWS               tokens side by side in a block: fewer, fuller blocks
//   UNROLL             tokens one after the other in a team: more loads in flight, more registers
//   VEC_BYTES          bytes per load
//   READ_ONCE          mark the activations as dead after reading
//   PDL                programmatic dependent launch: this kernel starts while the one before it still runs, and lets
//                      the one after it start 1: at once, or 2: when its own loads are on their way; 0: neither
//   PREFETCH           with PDL: the first PREFETCH blocks of each multiprocessor pull their rows into L2 while they
//                      wait for that kernel. Later blocks find it finished and would only ask for the same rows twice
//
// Persistent blocks, streaming stores, and a trigger between wait and loads were measured on an H200 and never won.
#include "gpu.cuh"

typedef ELEMENT Element;

struct Params {
    const Element* q;
    const Element* q_weight;
    Element* q_out;
    const Element* kv;
    const Element* kv_weight;
    Element* kv_out;
    i64 q_stride;  // elements from row to row of q; the outputs are contiguous
    i64 kv_stride;
    int tokens;
    float q_eps;
    float kv_eps;
};

constexpr int TEAM_WARPS = Q_WARPS + KV_WARPS;
constexpr int THREADS = ROWS * TEAM_WARPS * WARP_SIZE;

template <int WIDTH, int WARPS>
struct Half {
    typedef Vector<Element, VEC_BYTES> Vec;
    static constexpr int LANES = WARPS * WARP_SIZE;
    static constexpr int VECTORS = WIDTH / Vec::SIZE;
    static constexpr int STEPS = (VECTORS + LANES - 1) / LANES;

    static_assert(WIDTH % Vec::SIZE == 0, "a row is a whole number of vectors");

    static __device__ __forceinline__ bool in_row(int vector) { return VECTORS % LANES == 0 || vector < VECTORS; }

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

    // `lane`: 0 to LANES-1 within this half of the team; `sums`: UNROLL × WARPS floats of shared memory of its own.
    static __device__ __forceinline__ void run(const Element* x, i64 stride, const Element* weight, Element* out, float eps,
                                               int first, int tokens, int lane, int barrier, float* sums) {
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
        // Without named barriers all halves of the block share one, so a half of one warp comes to it as well.
        if (WARPS > 1 || (!NAMED_BARRIERS && TEAM_WARPS > 2)) {
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
                Vec result;
                result.pack(values);
                if (token < tokens && in_row(i)) result.store(out + i64(token) * WIDTH + i * Vec::SIZE);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) mla_dual_rms_norm(const Params p) {
    __shared__ float sums[ROWS * TEAM_WARPS * UNROLL];
    if (PDL == 1) let_next_kernel_start();

    const int warp = threadIdx.x / WARP_SIZE;
    const int team = warp / TEAM_WARPS;
    const int lane = threadIdx.x - team * TEAM_WARPS * WARP_SIZE;
    const int first = blockIdx.x * (ROWS * UNROLL) + team;
    float* team_sums = sums + team * TEAM_WARPS * UNROLL;
    if (warp_uniform(warp - team * TEAM_WARPS) < Q_WARPS) {
        Half<Q_WIDTH, Q_WARPS>::run(p.q, p.q_stride, p.q_weight, p.q_out, p.q_eps, first, p.tokens, lane, 1 + 2 * team,
                                    team_sums);
    } else {
        Half<KV_WIDTH, KV_WARPS>::run(p.kv, p.kv_stride, p.kv_weight, p.kv_out, p.kv_eps, first, p.tokens,
                                      lane - Q_WARPS * WARP_SIZE, 2 + 2 * team, team_sums + Q_WARPS * UNROLL);
    }
}
