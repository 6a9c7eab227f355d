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
#include "rms_norm.cuh"

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

// Without named barriers both halves of all teams share one, so a half of one warp comes to it as well.
template <int WIDTH, int WARPS>
using Half = NormedRows<Element, WIDTH, WARPS, (WARPS > 1 || (!NAMED_BARRIERS && TEAM_WARPS > 2))>;

extern "C" __global__ void __launch_bounds__(THREADS) mla_dual_rms_norm(const Params p) {
    __shared__ float sums[ROWS * TEAM_WARPS * UNROLL];
    if (PDL == 1) let_next_kernel_start();

    const int warp = threadIdx.x / WARP_SIZE;
    const int team = warp / TEAM_WARPS;
    const int lane = threadIdx.x - team * TEAM_WARPS * WARP_SIZE;
    const int first = blockIdx.x * (ROWS * UNROLL) + team;
    float* team_sums = sums + team * TEAM_WARPS * UNROLL;
    if (warp_uniform(warp - team * TEAM_WARPS) < Q_WARPS) {
        Half<Q_WIDTH, Q_WARPS>::run(p.q, p.q_stride, p.q_weight, p.q_eps, first, p.tokens, lane, 1 + 2 * team, team_sums,
                                    StoreNormed<Element, Q_WIDTH>{p.q_out});
    } else {
        Half<KV_WIDTH, KV_WARPS>::run(p.kv, p.kv_stride, p.kv_weight, p.kv_eps, first, p.tokens, lane - Q_WARPS * WARP_SIZE,
                                      2 + 2 * team, team_sums + Q_WARPS * UNROLL,
                                      StoreNormed<Element, KV_WIDTH>{p.kv_out});
    }
}
