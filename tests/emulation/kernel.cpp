// One kernel, unmodified, as C++. SOURCE and KERNEL are its file and its function; its tunables are given beside them.
// A kernel calls its parameter struct Params, its threads per block THREADS, and its blocks per cluster, if it has clusters,
// BLOCKS_PER_CLUSTER.
#include "cuda_on_cpu.h"

#include SOURCE

#ifndef BLOCKS_PER_CLUSTER
#define BLOCKS_PER_CLUSTER 1
#endif

extern "C" {
extern const unsigned long emulated_params_bytes = sizeof(Params);
extern const int emulated_warp_size = WARP_SIZE;
extern const int emulated_threads = THREADS;
extern const int emulated_cluster = BLOCKS_PER_CLUSTER;
void emulated_kernel(const void* params) {
    KERNEL(*static_cast<const Params*>(params));
    emulated_commit_copies();
    emulated_wait_for_copies(0);
}
}
