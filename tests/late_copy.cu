// What a kernel with programmatic dependent launch must be able to follow: it lets the next kernel start at once, and only
// some microseconds later does what that one has to wait for.
#include "gpu.cuh"

constexpr int MOST = 20;
constexpr int WORDS_OF_4_BYTES = 4;

struct Params {
    const u32* from[MOST];
    u32* to[MOST];
    int bytes[MOST];  // rounded up to words of 4
};

extern "C" __global__ void __launch_bounds__(THREADS) late_copy(const Params p) {
    let_next_kernel_start();
    const i64 start = clock64();
    while (clock64() - start < CYCLES) {
    }
    for (int pair = 0; pair < MOST; ++pair)
        for (int i = blockIdx.x * THREADS + threadIdx.x; i * WORDS_OF_4_BYTES < p.bytes[pair]; i += BLOCKS * THREADS)
            p.to[pair][i] = p.from[pair][i];
}
