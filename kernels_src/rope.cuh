// RoPE (Su et al. 2021, "RoFormer") on vectors in registers: each pair (x, y) of elements becomes
//
//     (x · cos - y · sin, y · cos + x · sin)
//
// NeoX pairs element i with i + R/2, GPT-J even with odd neighbours. A row of the rotary table holds R/2 cosines, then R/2
// sines (vLLM's cos_sin_cache). Hugging Face transformers' DeepSeek-V3 pairs neighbours, but leaves the results in halves:
// that is NeoX's rotation of what was de-interleaved first.
#pragma once
#include "gpu.cuh"

// N consecutive elements x and their partners y, R/2 further on.
template <int N>
__device__ __forceinline__ void rotate_neox(float (&x)[N], float (&y)[N], const float (&cosines)[N],
                                            const float (&sines)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const float rotated = x[e] * cosines[e] - y[e] * sines[e];
        y[e] = y[e] * cosines[e] + x[e] * sines[e];
        x[e] = rotated;
    }
}

// N consecutive elements, which are N/2 pairs.
template <int N>
__device__ __forceinline__ void rotate_gptj(float (&x)[N], const float (&cosines)[N / 2], const float (&sines)[N / 2]) {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
        const float rotated = x[e] * cosines[e / 2] - x[e + 1] * sines[e / 2];
        x[e + 1] = x[e + 1] * cosines[e / 2] + x[e] * sines[e / 2];
        x[e] = rotated;
    }
}

// 2N consecutive elements, x before y: all even ones, in x, then all odd ones, in y.
template <int N>
__device__ __forceinline__ void deinterleave(float (&x)[N], float (&y)[N]) {
    float odd[N];
#pragma unroll
    for (int e = 0; e < N; ++e) odd[e] = 2 * e + 1 < N ? x[2 * e + 1] : y[2 * e + 1 - N];
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = 2 * e < N ? x[2 * e] : y[2 * e - N];
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] = odd[e];
}

// COUNT consecutive elements of the table in registers, as they are in memory: what turns them into floats would wait for
// them. Loaded from multiples of ALIGN bytes, no more than ALIGN at a time.
template <typename T, int COUNT, int ALIGN>
struct TablePart {
    static constexpr int BYTES = COUNT * int(sizeof(T)) < ALIGN ? COUNT * int(sizeof(T)) : ALIGN;
    static constexpr int STEP = BYTES / int(sizeof(T));
    Vector<T, BYTES> vectors[COUNT / STEP];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) vectors[i / STEP].load(from + i);
    }
    __device__ __forceinline__ void unpack(float (&values)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            float part[STEP];
            vectors[i / STEP].unpack(part);
#pragma unroll
            for (int e = 0; e < STEP; ++e) values[i + e] = part[e];
        }
    }
};

// The angles of two vectors of N elements, x at element `at` of a row of R elements and y R/2 further on: those that NeoX
// pairs, or that are de-interleaved, have the same, in GPT-J's style some are x's and some y's. The table, its row stride and N elements of it are multiples of ALIGN bytes.
template <bool SAME, typename T, int N, int ALIGN>
struct Angles {
    TablePart<T, N, ALIGN> cosines, sines;

    __device__ __forceinline__ void load(const T* row, int half, int at) {
        cosines.load(row + at);
        sines.load(row + half + at);
    }
    __device__ __forceinline__ void rotate(float (&x)[N], float (&y)[N]) const {
        float c[N], s[N];
        cosines.unpack(c);
        sines.unpack(s);
        rotate_neox(x, y, c, s);
    }
};
template <typename T, int N, int ALIGN>
struct Angles<false, T, N, ALIGN> {
    TablePart<T, N / 2, ALIGN> cosines[2], sines[2];

    __device__ __forceinline__ void load(const T* row, int half, int at) {
        cosines[0].load(row + at / 2);
        sines[0].load(row + half + at / 2);
        cosines[1].load(row + (half + at) / 2);
        sines[1].load(row + half + (half + at) / 2);
    }
    __device__ __forceinline__ void rotate(float (&x)[N], float (&y)[N]) const {
        float c[N / 2], s[N / 2];
        cosines[0].unpack(c);
        sines[0].unpack(s);
        rotate_gptj(x, c, s);
        cosines[1].unpack(c);
        sines[1].unpack(s);
        rotate_gptj(y, c, s);
    }
};
