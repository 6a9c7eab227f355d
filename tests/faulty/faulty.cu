// The op of faulty_op.py on an NVIDIA GPU. FAULT says what goes wrong, by its place in GPU_FAULTS.
#if FAULT == 11
#error this config does not compile
#endif

struct Params {
    float* x;
    float* cache;
    float* doubled;
    float* negated;
    int tokens;
};

extern "C" __global__ void faulty(const Params p) {
    const long long count = (long long)p.tokens * WIDTH, row = (long long)blockIdx.x * WIDTH;
    const bool first = blockIdx.x == 0 && threadIdx.x == 0;
    if (FAULT == 1 && first) *(volatile int*)8 = 1;
    if (FAULT == 2 && first) *(float4*)((char*)p.doubled + 4) = make_float4(0, 0, 0, 0);
    if (FAULT == 3 && first) asm volatile("trap;");
    if (FAULT == 4)
        while (*(volatile float*)p.x == *(volatile float*)p.x) {
        }
    for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
        const long long at = row + i;
        if (FAULT == 8 && blockIdx.x == p.tokens - 1) continue;
        p.doubled[at] = 2 * p.x[at];
        p.negated[at] = -p.x[at];
        if (at < 8 * WIDTH) p.cache[at] = p.x[at];
    }
    if (!first) return;
    if (FAULT == 5) p.negated[count] = 1;
    if (FAULT == 6) p.doubled[-1] = 1;
    if (FAULT == 7) p.cache[8 * WIDTH + 3] = 1;
    if (FAULT == 9) p.doubled[0] = __int_as_float(0x7fc00000);
    if (FAULT == 10) p.x[count - 1] += 1;
}
