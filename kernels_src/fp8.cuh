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

template <int COUNT>
struct Fp8 {
    static __device__ __forceinline__ void store(unsigned char* to, const float (&values)[COUNT]) {
        if constexpr (COUNT % 4 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; i += 4)
                *reinterpret_cast<u32*>(to + i) =
                    e4m3x2(values[i], values[i + 1]) | e4m3x2(values[i + 2], values[i + 3]) << 16;
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i += 2)
                *reinterpret_cast<unsigned short*>(to + i) = (unsigned short)e4m3x2(values[i], values[i + 1]);
        }
    }
};
