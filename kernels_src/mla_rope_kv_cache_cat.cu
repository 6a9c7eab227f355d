// mla_rope_kv_cache_cat: rotates q_pe and k_pe, writes (kv_c, k_pe) into the paged latent cache, and lays q_nope and the
// rotated q_pe side by side, in one launch.
//
// See mla_rope.cuh for how the work is shared out, the constants of the problem and the tunables.
#define COPY_Q_NOPE 1
#include "mla_rope.cuh"

typedef RopeParams Params;

extern "C" __global__ void __launch_bounds__(THREADS) mla_rope_kv_cache_cat(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    rope_block(p, blockIdx.x);
}
