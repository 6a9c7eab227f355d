// RMSNorm of a row, for CPU kernels: see rms_norm.cuh for what it computes. The row is read twice, from memory for its sum
// of squares and from the L1 cache for the scaling.
//
// Constants: CAST_BEFORE_WEIGHT, and UNROLL: vectors per loop iteration, each with its own partial sum, which hides the
// latency of the addition.
#pragma once
#include "cpu.h"

template <typename E, int WIDTH>
static inline void norm_row(const E* __restrict x, const E* __restrict weight, E* __restrict out, float eps) {
    constexpr int STEP = LANES * UNROLL;
    constexpr int WHOLE = WIDTH - WIDTH % STEP;
    Floats partial[UNROLL] = {};
    for (int i = 0; i < WHOLE; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) {
            const Floats values = Element<E>::load(x + i + u * LANES);
            partial[u] += values * values;
        }
    }
    float sum = 0.f;
#pragma GCC unroll 16
    for (int u = 0; u < UNROLL; ++u) sum += sum_of(partial[u]);
    for (int i = WHOLE; i < WIDTH; ++i) sum += load_one(x + i) * load_one(x + i);

    const float scale = 1.f / sqrtf(sum / WIDTH + eps);
    for (int i = 0; i < WHOLE; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) {
            Floats values = Element<E>::load(x + i + u * LANES) * scale;
            if (CAST_BEFORE_WEIGHT) values = Element<E>::round(values);
            Element<E>::store(out + i + u * LANES, values * Element<E>::load(weight + i + u * LANES));
        }
    }
    for (int i = WHOLE; i < WIDTH; ++i) {
        const float value = load_one(x + i) * scale;
        store_one(out + i, (CAST_BEFORE_WEIGHT ? round_one<E>(value) : value) * load_one(weight + i));
    }
}
