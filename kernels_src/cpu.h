// What every CPU kernel here shares: element types and explicit SIMD vectors, through GCC's and Clang's vector extensions
// (no intrinsics, so any architecture that those compilers know will do).
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 32
#endif

constexpr int LANES = VECTOR_BYTES / 4;  // floats per vector

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
typedef float fp32;

static inline Words words_of(Floats values) {
    Words bits;
    memcpy(&bits, &values, sizeof bits);
    return bits;
}

static inline Floats floats_of(Words bits) {
    Floats values;
    memcpy(&values, &bits, sizeof values);
    return values;
}

// 2 * LANES consecutive elements as floats, for what treats all elements alike.
struct Two {
    Floats a, b;
};

// Element<E>: LANES consecutive elements as floats, and back, rounded to nearest even. The same for 2 * LANES of them, in an
// order that is E's own: where EVEN_ODD is set, a has the even ones and b the odd ones, else a those that come first.
template <typename E>
struct Element;

template <typename E>
struct InOrder {
    static constexpr bool EVEN_ODD = false;
    static inline Two load_two(const E* from) { return {Element<E>::load(from), Element<E>::load(from + LANES)}; }
    static inline void store_two(E* to, Two values) {
        Element<E>::store(to, values.a);
        Element<E>::store(to + LANES, values.b);
    }
};

template <>
struct Element<fp32> : InOrder<fp32> {
    static inline Floats load(const float* from) {
        Floats values;
        memcpy(&values, from, sizeof values);
        return values;
    }
    static inline void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }
    static inline Floats round(Floats values) { return values; }
};

#if defined(__AVX512BF16__) && (VECTOR_BYTES == 64 || VECTOR_BYTES == 32)
template <>
struct Element<bf16> : InOrder<bf16> {
    static inline Floats widen(Halves bits) {
#if VECTOR_BYTES == 64
        return floats_of((Words)_mm512_cvtepu16_epi32((__m256i)bits) << 16);  // of which GCC makes five instructions
#else
        return floats_of(__builtin_convertvector(bits, Words) << 16);
#endif
    }
    // It flushes results below 2^-126 to zero.
    static inline Halves narrow(Floats values) {
#if VECTOR_BYTES == 64
        return (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
        return (Halves)_mm256_cvtneps_pbh((__m256)values);
#endif
    }
    static inline Floats round(Floats values) { return widen(narrow(values)); }
#else
template <>
struct Element<bf16> {
    static inline Floats widen(Halves bits) { return floats_of(__builtin_convertvector(bits, Words) << 16); }
    // Rounded, in the high half of each word; what is in the low half does not count. Results of arithmetic are quiet NaNs,
    // which stay NaNs as they are.
    static inline Words rounded(Floats values) {
        const Words bits = words_of(values);
        return bits + ((0x7fffu + ((bits >> 16) & 1u)) & (Words)(values == values));
    }
    static inline Halves narrow(Floats values) { return __builtin_convertvector(rounded(values) >> 16, Halves); }
    static inline Floats round(Floats values) { return floats_of(rounded(values) & 0xffff0000u); }

    // A word of two elements has both in reach of one instruction each.
    static constexpr bool EVEN_ODD = true;
    static inline Two load_two(const bf16* from) {
        Words bits;
        memcpy(&bits, from, sizeof bits);
        return {floats_of(bits << 16), floats_of(bits & 0xffff0000u)};
    }
    static inline void store_two(bf16* to, Two values) {
        const Words bits = rounded(values.a) >> 16 | (rounded(values.b) & 0xffff0000u);
        memcpy(to, &bits, sizeof bits);
    }
#endif
    static inline Floats load(const bf16* from) {
        Halves bits;
        memcpy(&bits, from, sizeof bits);
        return widen(bits);
    }
    static inline void store(bf16* to, Floats values) {
        const Halves bits = narrow(values);
        memcpy(to, &bits, sizeof bits);
    }
};

template <>
struct Element<fp16> : InOrder<fp16> {
    typedef _Float16 Packed __attribute__((vector_size(VECTOR_BYTES / 2)));
    static inline Floats load(const fp16* from) {
        Packed packed;
        memcpy(&packed, from, sizeof packed);
        return __builtin_convertvector(packed, Floats);
    }
    static inline void store(fp16* to, Floats values) {
        const Packed packed = __builtin_convertvector(values, Packed);
        memcpy(to, &packed, sizeof packed);
    }
    static inline Floats round(Floats values) { return __builtin_convertvector(__builtin_convertvector(values, Packed), Floats); }
};

// Halves are added until one float is left: fewer instructions than lane by lane, and a shorter chain of them.
template <int COUNT>
static inline float sum_of_floats(const float* values) {
    if constexpr (COUNT == 1) {
        return *values;
    } else {
        typedef float Half __attribute__((vector_size(2 * COUNT)));
        Half low, high;
        memcpy(&low, values, sizeof low);
        memcpy(&high, values + COUNT / 2, sizeof high);
        low += high;
        float sums[COUNT / 2];
        memcpy(sums, &low, sizeof sums);
        return sum_of_floats<COUNT / 2>(sums);
    }
}
static inline float sum_of(Floats values) {
    float floats[LANES];
    memcpy(floats, &values, sizeof floats);
    return sum_of_floats<LANES>(floats);
}

// One element at a time, for what is left of a row after whole vectors.
template <typename E>
static inline float load_one(const E* from) {
    E block[LANES] = {};
    block[0] = *from;
    return Element<E>::load(block)[0];
}
template <typename E>
static inline void store_one(E* to, float value) {
    Floats values = {};
    values[0] = value;
    E block[LANES];
    Element<E>::store(block, values);
    *to = block[0];
}
template <typename E>
static inline float round_one(float value) {
    E rounded;
    store_one(&rounded, value);
    return load_one(&rounded);
}

// fp8 e4m3, rounded to nearest even, saturated: see fp8.cuh.
static inline uint8_t e4m3_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint8_t(sign | 0x7fu);
    const float size = fabsf(value);
    if (size >= 448.f) return uint8_t(sign | 0x7eu);
    if (size < 0.015625f) return uint8_t(sign | uint32_t(rintf(size * 512.f)));
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    return uint8_t(sign | ((rounded >> 20) - (120u << 3)));
}

// A kernel's THREADS, unless torch.set_num_threads allows fewer: PyTorch's OpenMP is ours, so its limit is as well.
static inline int threads_to_use(int tuned) {
    const int most = omp_get_max_threads();
    return tuned < most ? tuned : most;
}
