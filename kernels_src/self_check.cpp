// Compiled and loaded by `autofuse doctor`: proves that the compiler, the vector extensions and OpenMP work together.
#include "cpu.h"

struct Params {
    float* sum;
};

extern "C" void self_check(const Params* params) {
    float sum = 0.f;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < 64; ++i) sum += float(i);
    *params->sum = sum;
}
