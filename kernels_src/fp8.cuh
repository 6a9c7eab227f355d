// fp8 e4m3 (OCP "FP8 Formats for Deep Learning", E4M3FN): sign, 4 exponent bits (bias 7), 3 mantissa bits, largest 448, no
// infinity. Conversions round to nearest even and saturate.
#pragma once
#include "gpu.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define HAVE_PTX_FP8 1
#endif

__device__ __forceinline__ u32 e4m3_bits(float value) {
    const u32 bits = __float_as_uint(value), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fu;  // NaN
    const float size = __uint_as_float(magnitude);
    if (size >= 448.f) return sign | 0x7eu;
    if (size < 0.015625f) return sign | u32(rintf(size * 512.f));  // below 2^-6: multiples of 2^-9
    const u32 rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    return sign | ((rounded >> 20) - (120u << 3));  // exponent bias 127 - 7, above 3 mantissa bits
}

// Two values, the first in the low byte.
__device__ __forceinline__ u32 e4m3x2(float a, float b) {
#if HAVE_PTX_FP8
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(b), "f"(a));
    return packed;
#else
    return e4m3_bits(a) | e4m3_bits(b) << 8;
#endif
}

// COUNT values, a power of two, to an address that is a multiple of ALIGN bytes, by the widest stores that are possible.
template <int COUNT, int ALIGN = 4>
struct Fp8 {
    static __device__ __forceinline__ void store(unsigned char* to, const float (&values)[COUNT]) {
        constexpr int BYTES = COUNT < ALIGN ? COUNT : ALIGN < 16 ? ALIGN : 16;
        if constexpr (BYTES >= 4) {
#pragma unroll
            for (int at = 0; at < COUNT; at += BYTES) {
                Vector<u32, BYTES> packed;
#pragma unroll
                for (int i = 0; i < BYTES; i += 4)
                    packed.words[i / 4] = e4m3x2(values[at + i], values[at + i + 1]) |
                                          e4m3x2(values[at + i + 2], values[at + i + 3]) << 16;
                packed.store_at_once(reinterpret_cast<u32*>(to + at));
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i += 2)
                *reinterpret_cast<unsigned short*>(to + i) = (unsigned short)e4m3x2(values[i], values[i + 1]);
        }
    }
};

// x ÷ scale for many x and one scale, as an IEEE division rounds it: an estimate and one correction by its remainder
// (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor"), three instructions where a
// division takes a dozen. For scales of 2^-126 to 2^126. Where the estimate is too large for fp8 it stays as it is: an infinite
// one has no remainder.
struct Fp8Scale {
    float scale, reciprocal;
    float remainder_scale;  // 0 ends the correction where the scale is infinite, and so its reciprocal exact

    explicit __device__ __forceinline__ Fp8Scale(float value) : scale(value) {
#if ON_NVIDIA
        float guess;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(value));
        const float corrected = fmaf(fmaf(-value, guess, 1.f), guess, guess);
        reciprocal = corrected == corrected ? corrected : guess;  // of 0 and of infinity
#else
        reciprocal = 1.f / value;
#endif
        remainder_scale = reciprocal == 0.f ? 0.f : value;
    }

    __device__ __forceinline__ float quotient(float x) const {
        const float estimate = x * reciprocal;
#if ON_AMD
        const float corrected = __builtin_fmaf(__builtin_fmaf(-estimate, remainder_scale, x), reciprocal, estimate);
        return __builtin_fabsf(estimate) < 1024.f ? corrected : estimate;
#else
        const float corrected = fmaf(fmaf(-estimate, remainder_scale, x), reciprocal, estimate);
        return fabsf(estimate) < 1024.f ? corrected : estimate;
#endif
    }
    template <int COUNT>
    __device__ __forceinline__ void divide(float (&values)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = quotient(values[i]);
    }
};
