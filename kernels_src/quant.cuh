// What GPU kernels share that quantise their result: amax of a group, scales, exact quotients, stores. The formats are
// defined in autofuse/ops/quant.py; here is their arithmetic, bit for bit.
//
// Constants of the problem (QuantFormat.defines):
//   GROUP         elements that share a scale: 64 or 128 (group FP8), 16 (NVFP4), 0 (static FP8: one scale for all)
//   UE8M0         group FP8: scales are rounded up to powers of two
//   SCALE_LAYOUT  group FP8: 0 row-major, 1 column-major, 2 columns at multiples of 4 scales (TMA)
//
// A kernel that has LANES neighbouring lanes (a power of two) for a group, each with some vectors of it in registers,
// rounded to their element type, leaves the rest to Quantiser; NVFP4 asks for zero_padded_scales as well. One that has its
// values otherwise uses the parts: AbsMax, group_max, group_scale, Divisor, scale_index, store_e4m3; Fp4Scale,
// swizzled_index, store_e2m1.
#pragma once
#include "fp8.cuh"

#if ON_NVIDIA && (defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
                  defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL))
#define HAVE_PTX_FP4 1
#endif

typedef unsigned char u8;

#define INFINITE __uint_as_float(0x7f800000u)

// ---- amax -----------------------------------------------------------------------------------------------------------
// On bits: magnitudes compare as integers, a NaN is larger than all else and so is not lost. Words hold two 16-bit
// elements or one fp32, as Vector has them; what is in between is a word as well, of magnitudes.

template <typename E>
struct AbsMax {
    // Of `largest`, which is magnitudes, and of `word`, which is elements, element by element.
    static __device__ __forceinline__ u32 larger(u32 largest, u32 word) {
        if constexpr (sizeof(E) == 4) {
            const u32 magnitude = word & 0x7fffffffu;
            return magnitude > largest ? magnitude : largest;
        } else {
#if ON_NVIDIA && __CUDA_ARCH__ >= 900
            return __vmaxu2(largest, word & 0x7fff7fffu);
#else
            const u32 magnitudes = word & 0x7fff7fffu;
            const u32 low = (magnitudes & 0xffffu) > (largest & 0xffffu) ? magnitudes & 0xffffu : largest & 0xffffu;
            const u32 high = magnitudes >> 16 > largest >> 16 ? magnitudes & 0xffff0000u : largest & 0xffff0000u;
            return high | low;
#endif
        }
    }
    // The largest of a word as a number.
    static __device__ __forceinline__ float value(u32 largest) {
        if constexpr (sizeof(E) == 4) {
            return __uint_as_float(largest);
        } else {
            const u32 low = largest & 0xffffu, high = largest >> 16;
            float number, zero;
            Pair<E>::unpack(low > high ? low : high, number, zero);
            return number;
        }
    }
};

// Over LANES neighbouring lanes, a power of two. All lanes of the warp must call it.
template <typename E, int LANES>
__device__ __forceinline__ u32 group_max(u32 largest) {
    static_assert((LANES & (LANES - 1)) == 0 && LANES <= WARP_SIZE, "lanes of a group are a power of two, in one warp");
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        largest = AbsMax<E>::larger(largest, __float_as_uint(shuffle_xor(__uint_as_float(largest), offset)));
    return largest;
}

// ---- Scales and quotients -------------------------------------------------------------------------------------------

// a ÷ 448 for a ≥ 1e-10, correctly rounded (Markstein 1990, "Computation of elementary functions on the IBM RISC
// System/6000 processor"): the remainder of the first guess is exact. Infinity and NaN stay what they are.
__device__ __forceinline__ float divided_by_448(float a) {
    const float guess = a * (1.f / 448.f);
    const float quotient = fused_multiply_add(fused_multiply_add(-guess, 448.f, a), 1.f / 448.f, guess);
    return a < INFINITE ? quotient : a;
}

// 1 ÷ a for a whose reciprocal is a normal number, correctly rounded.
__device__ __forceinline__ float normal_reciprocal(float a) {
#if ON_NVIDIA
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(a));
    return fused_multiply_add(fused_multiply_add(-a, guess, 1.f), guess, guess);
#else
    return 1.f / a;
#endif
}

// A group's scale, from its amax.
__device__ __forceinline__ float group_scale(float amax) {
    constexpr u32 SMALLEST = 0x2edbe6ffu;  // 1e-10
    const u32 bits = __float_as_uint(amax);
    const float scale = divided_by_448(__uint_as_float(bits > SMALLEST ? bits : SMALLEST));
    if (!UE8M0 || !(scale < INFINITE)) return scale;
    return __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0xff800000u);
}

// Divides by a group's scale.
struct Divisor {
    float scale;
    float reciprocal;
    float remainder_scale;  // 0 ends the correction where the scale is infinite, and so its reciprocal exact

    explicit __device__ __forceinline__ Divisor(float group_scale) : scale(group_scale) {
        reciprocal = UE8M0 ? __uint_as_float(0x7f000000u - __float_as_uint(scale)) : normal_reciprocal(scale);
        if (!(scale < INFINITE)) reciprocal = scale == INFINITE ? 0.f : scale;  // NaN makes all NaN
        remainder_scale = scale == INFINITE ? 0.f : scale;
    }
    // x ÷ scale as an IEEE division rounds it, zeros' signs included: a product and one correction (Markstein), or, the
    // scale being a power of two, the product. Quotients below 2^-24, whose remainder may underflow, can be one unit in the
    // last place off: they are 0 in e4m3 all the same.
    __device__ __forceinline__ float quotient(float x) const {
        const float guess = x * reciprocal;
        if (UE8M0) return guess;
        return fused_multiply_add(-fused_multiply_add(guess, remainder_scale, -x), reciprocal, guess);
    }
};

// Where a group's scale is, of `groups` in a row.
__device__ __forceinline__ i64 scale_index(i64 token, int group, int groups, int tokens) {
    if (SCALE_LAYOUT == 0) return token * groups + group;
    const i64 column = SCALE_LAYOUT == 1 ? i64(tokens) : (i64(tokens) + 3) / 4 * 4;
    return group * column + token;
}

// ---- Stores ---------------------------------------------------------------------------------------------------------

// COUNT (a multiple of 4) values as e4m3, by the widest stores: `to` is a multiple of COUNT, or of 16.
template <int COUNT>
__device__ __forceinline__ void store_e4m3(u8* to, const float (&values)[COUNT]) {
    constexpr int BYTES = COUNT % 16 == 0 ? 16 : COUNT % 8 == 0 ? 8 : 4;
    static_assert(COUNT % 4 == 0, "whole words");
#pragma unroll
    for (int at = 0; at < COUNT; at += BYTES) {
        Vector<u32, BYTES> packed;
#pragma unroll
        for (int i = 0; i < BYTES; i += 4)
            packed.words[i / 4] = e4m3x2(values[at + i], values[at + i + 1]) |
                                  e4m3x2(values[at + i + 2], values[at + i + 3]) << 16;
        packed.store(reinterpret_cast<u32*>(to + at));
    }
}

// ---- NVFP4 ----------------------------------------------------------------------------------------------------------

// e2m1 (OCP "Microscaling Formats", 5.3.3): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and a sign. Nearest, ties to an even code,
// saturated; NaN is 6.
__device__ __forceinline__ u32 e2m1_bits(float value) {
    const u32 bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 7u;  // NaN
    const float size = __uint_as_float(magnitude);
    u32 code;
    if (size >= 5.f) {
        code = size > 5.f ? 7u : 6u;
    } else if (size < 1.f) {
        code = u32(rintf(size * 2.f));  // below 1: multiples of 0.5
    } else {
        const u32 rounded = magnitude + 0x1fffffu + ((magnitude >> 22) & 1u);
        code = (rounded >> 22) - (126u << 1);  // exponent bias 127 - 1, above 1 mantissa bit
    }
    return (bits >> 28 & 8u) | code;
}

// Four values, the first in the lowest four bits.
__device__ __forceinline__ u32 e2m1x4(float a, float b, float c, float d) {
#if HAVE_PTX_FP4
    u32 packed;
    asm("{ .reg .b8 low, high;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 high, %4, %3;\n\t"
        "mov.b32 %0, {low, high, low, high}; }"
        : "=r"(packed)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed & 0xffffu;
#else
    return e2m1_bits(a) | e2m1_bits(b) << 4 | e2m1_bits(c) << 8 | e2m1_bits(d) << 12;
#endif
}

// COUNT (a multiple of 4) values as e2m1, by the widest stores: `to` is a multiple of COUNT / 2 bytes, or of 16.
template <int COUNT>
__device__ __forceinline__ void store_e2m1(u8* to, const float (&values)[COUNT]) {
    static_assert(COUNT % 4 == 0, "whole bytes, two at least");
    if constexpr (COUNT % 8) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            *reinterpret_cast<u16*>(to + i / 2) = u16(e2m1x4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    } else {
        constexpr int BYTES = COUNT % 32 == 0 ? 16 : COUNT % 16 == 0 ? 8 : 4;
#pragma unroll
        for (int at = 0; at < COUNT; at += 2 * BYTES) {
            Vector<u32, BYTES> packed;
#pragma unroll
            for (int i = 0; i < 2 * BYTES; i += 8) {
                const float* from = values + at + i;
                packed.words[i / 8] = e2m1x4(from[0], from[1], from[2], from[3]) |
                                      e2m1x4(from[4], from[5], from[6], from[7]) << 16;
            }
            packed.store(reinterpret_cast<u32*>(to + at / 2));
        }
    }
}

__device__ __forceinline__ float e4m3_value(u32 bits) {
    const u32 magnitude = bits & 0x7fu;
    float size = __uint_as_float((magnitude << 20) + (120u << 23));
    if (magnitude < 8u) size = float(magnitude) * 0.001953125f;  // 2^-9
    if (magnitude == 0x7fu) size = __uint_as_float(0x7fffffffu);
    return bits & 0x80u ? -size : size;
}

// A group of 16: its scale as e4m3, and what its values are multiplied by.
struct Fp4Scale {
    u8 bits;
    float factor;

    __device__ __forceinline__ Fp4Scale(float amax, float global_scale, float global_reciprocal) {
        const float scale = global_scale * (amax * (1.f / 6.f));
        bits = u8(e4m3x2(scale, 0.f));
        const float rounded = e4m3_value(bits);
        factor = rounded == 0.f ? 0.f : 1.f / (rounded * global_reciprocal);
    }
};

// Where the scale of `group` (of 16, `groups` in a row) is: in tiles of 128 tokens × 4 groups, tokens 32 apart side by
// side.
__device__ __forceinline__ i64 swizzled_index(i64 token, int group, int groups) {
    const i64 tile = token / 128 * ((groups + 3) / 4) + group / 4;
    const int row = int(token % 128);
    return tile * 512 + row % 32 * 16 + row / 32 * 4 + group % 4;
}

// The scales of the rows that are padded, tokens to the next multiple of 128, become zeros: a part by each of `threads`
// threads, of which this is number `thread`. (Padded columns are the business of whoever writes the last group of a row.)
__device__ __forceinline__ void zero_padded_scales(u8* scales, int tokens, int groups, i64 thread, i64 threads) {
    const int words = (groups + 3) / 4;  // of a row: 4 columns of a tile lie side by side
    const i64 end = i64(-tokens & 127) * words;
    for (i64 i = thread; i < end; i += threads)
        *reinterpret_cast<u32*>(scales + swizzled_index(tokens + i / words, int(i % words) * 4, groups)) = 0;
}

// ---- All of it ------------------------------------------------------------------------------------------------------

// Where results go.
struct QuantisedRows {
    u8* values;    // contiguous rows
    void* scales;  // float, or e4m3 (NVFP4); nothing in static FP8
    int tokens;
};

// A scale that is given: static FP8's, or NVFP4's global one.
struct GivenScale {
    float scale = 0.f, reciprocal = 0.f;

    __device__ __forceinline__ void load(const float* from) {
        if (GROUP == 64 || GROUP == 128) return;
        scale = *from;
        reciprocal = 1.f / scale;
    }
};

// Quantises rows of WIDTH elements in units of a group (static FP8: whatever a lane has). LANES neighbouring lanes have
// VECTORS vectors of 16 bytes of a unit each: side by side, or (APART) LANES vectors apart.
template <typename E, int WIDTH, int VECTORS, int LANES, bool APART = false>
struct Quantiser {
    typedef Vector<E, 16> Vec;
    static constexpr int SIZE = Vec::SIZE;
    static constexpr int UNIT = LANES * VECTORS * SIZE;
    static constexpr int UNITS = WIDTH / UNIT;

    static_assert(WIDTH % UNIT == 0 && (GROUP ? UNIT == GROUP : LANES == 1), "a row is whole units, a unit is a group");

    // The element of its unit that a lane's vector begins with.
    static __device__ __forceinline__ int element(int lane, int vector) {
        return (APART ? vector * LANES + lane : lane * VECTORS + vector) * SIZE;
    }

    // All lanes of a warp must call it; where there is no such token, `exists` is false and nothing is stored.
    static __device__ __forceinline__ void run(const Vec (&x)[VECTORS], const GivenScale& given, const QuantisedRows& to,
                                               i64 token, int unit, int lane, bool exists) {
        float values[VECTORS * SIZE];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            float some[SIZE];
            x[v].unpack(some);
#pragma unroll
            for (int e = 0; e < SIZE; ++e) values[v * SIZE + e] = some[e];
        }
        if constexpr (GROUP == 0) {
#pragma unroll
            for (int i = 0; i < VECTORS * SIZE; ++i) values[i] *= given.reciprocal;
        } else {
            u32 largest = 0;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
                for (int w = 0; w < 4; ++w) largest = AbsMax<E>::larger(largest, x[v].words[w]);
            }
            const float amax = AbsMax<E>::value(group_max<E, LANES>(largest));
            if constexpr (GROUP == 16) {
                const Fp4Scale scale(amax, given.scale, given.reciprocal);
                if (exists && lane == 0) store_fp4_scale(scale.bits, static_cast<u8*>(to.scales), token, unit);
#pragma unroll
                for (int i = 0; i < VECTORS * SIZE; ++i) values[i] *= scale.factor;
            } else {
                const Divisor divisor(group_scale(amax));
                if (exists && lane == 0)
                    static_cast<float*>(to.scales)[scale_index(token, unit, UNITS, to.tokens)] = divisor.scale;
#pragma unroll
                for (int i = 0; i < VECTORS * SIZE; ++i) values[i] = divisor.quotient(values[i]);
            }
        }
        if (exists) store(to.values, token * WIDTH + unit * UNIT, lane, values);
    }

  private:
    static __device__ __forceinline__ void store_fp4_scale(u8 bits, u8* scales, i64 token, int unit) {
        scales[swizzled_index(token, unit, UNITS)] = bits;
        if (unit == UNITS - 1)  // the columns that are padded
            for (int column = UNITS; column % 4; ++column) scales[swizzled_index(token, column, UNITS)] = 0;
    }

    static __device__ __forceinline__ void store(u8* out, i64 begin, int lane, const float (&values)[VECTORS * SIZE]) {
        if constexpr (APART) {
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float some[SIZE];
#pragma unroll
                for (int e = 0; e < SIZE; ++e) some[e] = values[v * SIZE + e];
                store_at(out, begin + element(lane, v), some);
            }
        } else {
            store_at(out, begin + element(lane, 0), values);
        }
    }
    template <int COUNT>
    static __device__ __forceinline__ void store_at(u8* out, i64 at, const float (&values)[COUNT]) {
        if constexpr (GROUP == 16) {
            store_e2m1(out + at / 2, values);
        } else {
            store_e4m3(out + at, values);
        }
    }
};

// What NormedRows (rms_norm.cuh, vectors of 16 bytes) is to do with its rows: round them to E, then quantise them.
template <typename E, int WIDTH>
struct QuantiseNormed {
    static constexpr int SIZE = Vector<E, 16>::SIZE;
    static constexpr int LANES = GROUP ? GROUP / SIZE : 1;

    QuantisedRows to;
    const float* scale;
    GivenScale given = {};

    __device__ __forceinline__ void load() { given.load(scale); }

    template <class Place>
    __device__ __forceinline__ void operator()(Place at, const float (&values)[SIZE]) const {
        Vector<E, 16> rounded[1];
        rounded[0].pack(values);
        Quantiser<E, WIDTH, 1, LANES>::run(rounded, given, to, at.token, at.vector / LANES, at.vector % LANES, at.exists());
    }
};
