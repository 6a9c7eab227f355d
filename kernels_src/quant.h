// What CPU kernels share that quantise their result: see quant.cuh for the formats, the constants, and how bits are
// defined. Divisions are plain IEEE divisions here.
#pragma once
#include "cpu.h"

typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

// ---- amax: of magnitudes as integers, so that a NaN is the largest of all. ------------------------------------------

static inline Words larger_magnitudes(Words largest, Floats values) {
    const Words magnitudes = words_of(values) & 0x7fffffffu;
    return magnitudes > largest ? magnitudes : largest;
}
static inline float largest_of(Words magnitudes) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    Four parts[LANES / 4], most = {};
    memcpy(parts, &magnitudes, sizeof parts);
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; ++i) most = parts[i] > most ? parts[i] : most;
    const uint32_t low = most[0] > most[1] ? most[0] : most[1], high = most[2] > most[3] ? most[2] : most[3];
    const uint32_t largest = low > high ? low : high;
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

// Of COUNT elements, a multiple of LANES.
template <typename E, int COUNT>
static inline float amax_of(const E* from) {
    static_assert(COUNT % LANES == 0, "whole vectors");
    Words largest = {};
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i += LANES) largest = larger_magnitudes(largest, Element<E>::load(from + i));
    return largest_of(largest);
}

// ---- Scales ---------------------------------------------------------------------------------------------------------

// Group FP8: a group's scale, from its amax.
static inline float group_scale(float amax) {
    const float scale = (amax < 1e-10f ? 1e-10f : amax) / 448.f;
    if (!UE8M0 || !(scale < INFINITY)) return scale;
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    bits = (bits + 0x7fffffu) & 0xff800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// Where a group's scale is, of `groups` in a row.
static inline int64_t scale_index(int64_t token, int64_t group, int64_t groups, int64_t tokens) {
    if (SCALE_LAYOUT == 0) return token * groups + group;
    return group * (SCALE_LAYOUT == 1 ? tokens : (tokens + 3) / 4 * 4) + token;
}

// NVFP4: a group's scale as e4m3, and what its values are multiplied by.
struct Fp4Scale {
    uint8_t bits;
    float factor;

    Fp4Scale(float amax, float global_scale) {
        bits = e4m3_bits(global_scale * (amax * (1.f / 6.f)));
        const uint32_t magnitude = bits & 0x7fu;
        float rounded = float(magnitude) * 0.001953125f;  // 2^-9
        if (magnitude >= 8u) rounded = ldexpf(float(8u + magnitude % 8u), int(magnitude / 8u) - 10);
        if (magnitude == 0x7fu) rounded = NAN;
        if (bits & 0x80u) rounded = -rounded;
        factor = rounded == 0.f ? 0.f : 1.f / (rounded * (1.f / global_scale));
    }
};

// NVFP4: where a group's scale is, of `groups` in a row.
static inline int64_t swizzled_index(int64_t token, int64_t group, int64_t groups) {
    const int64_t tile = token / 128 * ((groups + 3) / 4) + group / 4, row = token % 128;
    return tile * 512 + row % 32 * 16 + row / 32 * 4 + group % 4;
}

// ---- Rounding -------------------------------------------------------------------------------------------------------

// LANES values as e4m3: nearest even, saturated.
static inline void store_e4m3(uint8_t* to, Floats values) {
    const Words bits = words_of(values), magnitude = bits & 0x7fffffffu;
    // Below 2^-6: multiples of 2^-9, which is what the addition of 2^14 rounds to.
    const Words small = words_of(floats_of(magnitude) + 16384.f) - 0x46800000u;
    const Words large = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    Words code = magnitude < 0x3c800000u ? small : large;
    code = code < 0x7eu ? code : Words{} + 0x7eu;                     // 448
    code = magnitude > 0x7f800000u ? Words{} + 0x7fu : code;          // NaN
    const Bytes packed = __builtin_convertvector(code | ((bits >> 24) & 0x80u), Bytes);
    memcpy(to, &packed, sizeof packed);
}

// LANES values as e2m1, two in a byte: nearest, ties to an even code, saturated; NaN is 6.
static inline void store_e2m1(uint8_t* to, Floats values) {
    const Words bits = words_of(values), magnitude = bits & 0x7fffffffu;
    // Below 1: multiples of 0.5, which is what the addition of 2^22 rounds to.
    const Words small = words_of(floats_of(magnitude) + 4194304.f) - 0x4a800000u;
    const Words large = ((magnitude + 0x1fffffu + ((magnitude >> 22) & 1u)) >> 22) - (126u << 1);
    const Words sign = magnitude > 0x7f800000u ? Words{} : (bits >> 28) & 8u;
    Words code = magnitude < 0x3f800000u ? small : large;
    code = magnitude > 0x40a00000u ? Words{} + 7u : code;  // above 5, and NaN
    const Bytes codes = __builtin_convertvector(code | sign, Bytes);
    uint16_t pairs[LANES / 2];
    memcpy(pairs, &codes, sizeof pairs);
    for (int i = 0; i < LANES / 2; ++i) to[i] = uint8_t(pairs[i] | pairs[i] >> 4);
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

// NVFP4: zeros for the last tile of 128 tokens, if it is not full. The scales of its tokens are written afterwards.
static inline void zero_padded_scales(uint8_t* scales, int64_t tokens, int64_t groups) {
    const int64_t tile = 128 * ((groups + 3) / 4 * 4);
    if (tokens % 128) memset(scales + tokens / 128 * tile, 0, tile);
}

// One row of WIDTH elements, or COUNT of its elements from `first` on (whole groups), to contiguous rows of values.
template <typename E, int WIDTH, int COUNT = WIDTH>
static inline void quantise_row(const E* __restrict x, uint8_t* __restrict values, void* __restrict scales,
                                const float* given, int64_t token, int64_t tokens, int64_t first = 0) {
    if constexpr (GROUP == 0) {
        const float factor = 1.f / *given;
        uint8_t* out = values + token * WIDTH + first;
        int i = 0;
        for (; i + LANES <= COUNT; i += LANES) store_e4m3(out + i, Element<E>::load(x + i) * factor);
        for (; i < COUNT; ++i) out[i] = e4m3_bits(load_one(x + i) * factor);
    } else {
        constexpr int GROUPS = WIDTH / GROUP, VECTORS = GROUP / LANES;
        static_assert(GROUP % LANES == 0 && COUNT % GROUP == 0, "whole vectors and groups");
        const int64_t at = token * WIDTH + first, first_group = first / GROUP;
        for (int64_t g = 0; g < COUNT / GROUP; ++g) {
            Floats group[VECTORS];
            Words largest = {};
#pragma GCC unroll 32
            for (int v = 0; v < VECTORS; ++v) {
                group[v] = Element<E>::load(x + g * GROUP + v * LANES);
                largest = larger_magnitudes(largest, group[v]);
            }
            const float amax = largest_of(largest);
            if constexpr (GROUP == 16) {
                const Fp4Scale scale(amax, *given);
                static_cast<uint8_t*>(scales)[swizzled_index(token, first_group + g, GROUPS)] = scale.bits;
#pragma GCC unroll 32
                for (int v = 0; v < VECTORS; ++v)
                    store_e2m1(values + (at + g * GROUP + v * LANES) / 2, group[v] * scale.factor);
            } else {
                const float scale = group_scale(amax);
                static_cast<float*>(scales)[scale_index(token, first_group + g, GROUPS, tokens)] = scale;
#pragma GCC unroll 32
                for (int v = 0; v < VECTORS; ++v)
                    store_e4m3(values + at + g * GROUP + v * LANES, group[v] / scale);
            }
        }
        if (GROUP == 16 && first + COUNT == WIDTH)  // the columns that are padded
            for (int64_t column = GROUPS; column % 4; ++column)
                static_cast<uint8_t*>(scales)[swizzled_index(token, column, GROUPS)] = 0;
    }
}
