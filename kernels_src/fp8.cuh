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

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
#if ON_AMD
    return __builtin_fmaf(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

// x ÷ scale for many x and one positive scale, for what is rounded to fp8 afterwards: the reciprocal in two parts, and two
// instructions (Brisebarre, Muller and Raina 2004, "Accelerating correctly rounded floating-point division when the divisor
// is known in advance"), where a division takes a dozen. The quotient is as IEEE division rounds it but where it lies within
// 2^-46 of the middle between two floats; in fp8 it differs only if one of these is itself a middle between two fp8 values.
// The reciprocal's first part is rounded down and its second not zero, so that neither infinities cancel nor an infinite x
// makes a NaN, for scales below 2^90.
struct Fp8Scale {
    float scale;
    float reciprocal, rest;

    explicit __device__ __forceinline__ Fp8Scale(float value) : scale(value) {
#if ON_NVIDIA
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
        const float corrected = fused_multiply_add(remainder_of_reciprocal(), reciprocal, reciprocal);
        if (corrected == corrected) reciprocal = corrected;  // not where scale is 0 or infinite
#else
        reciprocal = 1.f / scale;
#endif
        float remainder = remainder_of_reciprocal();
        if (remainder < 0.f) {
            reciprocal = __uint_as_float(__float_as_uint(reciprocal) - 1u);
            remainder = remainder_of_reciprocal();
        }
        const float least = reciprocal * 0x1p-60f;
        rest = remainder * reciprocal;
        if (!(rest > least)) rest = least;
    }

    __device__ __forceinline__ float quotient(float x) const { return fused_multiply_add(x, reciprocal, x * rest); }
    template <int COUNT>
    __device__ __forceinline__ void divide(float (&values)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = quotient(values[i]);
    }

  private:
    __device__ __forceinline__ float remainder_of_reciprocal() const { return fused_multiply_add(-scale, reciprocal, 1.f); }
};
