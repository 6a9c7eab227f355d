// stand_in: takes the whole GPU for some time and touches no memory, as if it were the matrix product that comes before an op
// in a model. The tuner launches it between the calls that it times: see tuner/stand_in.py.
//
// Its blocks leave no multiprocessor room for another kernel's, as those of large products do, and let the next kernel start at
// their end.
//
// Constants: THREADS per block.
#include "gpu.cuh"

struct Params {
    int steps;  // of what a block computes
};

extern "C" __global__ void __launch_bounds__(THREADS) stand_in(const Params p) {
    __shared__ volatile u32 result;  // or the compiler would leave out what leads to it
    wait_for_previous_kernel();
    if (threadIdx.x == 0) {
        u32 x = blockIdx.x + 1;
        for (int step = 0; step < p.steps; ++step) {  // xorshift: each step needs the one before
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
        }
        result = x;
    }
    __syncthreads();
    let_next_kernel_start();
}
