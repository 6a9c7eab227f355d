// mla_dual_rms_norm_quant: the two RMSNorms of mla_dual_rms_norm in one launch, the q latent's quantised to group FP8 while
// its rows are still in registers.
//
// A block takes ROWS × UNROLL consecutive tokens. Each of its ROWS teams has Q_WARPS warps for the q rows and KV_WARPS
// warps for the kv rows; see rms_norm.cuh for how they norm, quant.cuh for how groups are quantised.
//
// Constants of the problem: ELEMENT (bf16, fp16, fp32), Q_WIDTH, KV_WIDTH, CAST_BEFORE_WEIGHT; GROUP (64 or 128), UE8M0,
// SCALE_LAYOUT (see quant.cuh).
// Tunables: as mla_dual_rms_norm.cu explains them; VEC_BYTES is 16.
#include "quant.cuh"
#include "rms_norm.cuh"

typedef ELEMENT Element;

struct Params {
    const Element* q;
    const Element* q_weight;
    u8* q_values;
    float* q_scales;
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

extern "C" __global__ void __launch_bounds__(THREADS) mla_dual_rms_norm_quant(const Params p) {
    __shared__ float sums[ROWS * TEAM_WARPS * UNROLL];
    if (PDL == 1) let_next_kernel_start();

    const int warp = threadIdx.x / WARP_SIZE;
    const int team = warp / TEAM_WARPS;
    const int lane = threadIdx.x - team * TEAM_WARPS * WARP_SIZE;
    const int first = blockIdx.x * (ROWS * UNROLL) + team;
    float* team_sums = sums + team * TEAM_WARPS * UNROLL;
    if (warp_uniform(warp - team * TEAM_WARPS) < Q_WARPS) {
        Half<Q_WIDTH, Q_WARPS>::run(p.q, p.q_stride, p.q_weight, p.q_eps, first, p.tokens, lane, 1 + 2 * team, team_sums,
                                    QuantiseNormed<Element, Q_WIDTH>{{p.q_values, p.q_scales, p.tokens}, nullptr});
    } else {
        Half<KV_WIDTH, KV_WARPS>::run(p.kv, p.kv_stride, p.kv_weight, p.kv_eps, first, p.tokens, lane - Q_WARPS * WARP_SIZE,
                                      2 + 2 * team, team_sums + Q_WARPS * UNROLL,
                                      StoreNormed<Element, KV_WIDTH>{p.kv_out});
    }
}
