// RMSNorm of a row, for CPU kernels: see rms_norm.cuh for what it computes. The row is read twice, from memory for its sum
// of squares and from the L1 cache for the scaling.
//
// Constants: CAST_BEFORE_WEIGHT, and UNROLL: pairs of vectors per loop iteration, each with its own partial sum, which hides the
// latency of the addition.
#pragma once
#include "cpu.h"

template <typename E>
static inline void scale_two(const E* x, const E* weight, E* out, float scale) {
    const Two values = Element<E>::load_two(x), weights = Element<E>::load_two(weight);
    Floats a = values.a * scale, b = values.b * scale;
    if (CAST_BEFORE_WEIGHT) a = Element<E>::round(a), b = Element<E>::round(b);
    Element<E>::store_two(out, {a * weights.a, b * weights.b});
}

template <typename E, int WIDTH>
static inline void norm_row(const E* __restrict x, const E* __restrict weight, E* __restrict out, float eps) {
    constexpr int STEP = 2 * LANES * UNROLL;
    constexpr int STEPS = WIDTH - WIDTH % STEP, WHOLE = WIDTH - WIDTH % (2 * LANES);
    Two partial[UNROLL] = {};
    const auto add = [&](int u, int i) {
        const Two values = Element<E>::load_two(x + i);
        partial[u].a += values.a * values.a;
        partial[u].b += values.b * values.b;
    };
    for (int i = 0; i < STEPS; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) add(u, i + u * 2 * LANES);
    }
    for (int i = STEPS; i < WHOLE; i += 2 * LANES) add(0, i);
    Floats sums = {};
#pragma GCC unroll 16
    for (int u = 0; u < UNROLL; ++u) sums += partial[u].a + partial[u].b;
    float sum = sum_of(sums);
    for (int i = WHOLE; i < WIDTH; ++i) sum += load_one(x + i) * load_one(x + i);

    const float scale = 1.f / sqrtf(sum / WIDTH + eps);
    for (int i = 0; i < STEPS; i += STEP) {
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; ++u) scale_two(x + i + u * 2 * LANES, weight + i + u * 2 * LANES, out + i + u * 2 * LANES, scale);
    }
    for (int i = STEPS; i < WHOLE; i += 2 * LANES) scale_two(x + i, weight + i, out + i, scale);
    for (int i = WHOLE; i < WIDTH; ++i) {
        const float value = load_one(x + i) * scale;
        store_one(out + i, (CAST_BEFORE_WEIGHT ? round_one<E>(value) : value) * load_one(weight + i));
    }
}
