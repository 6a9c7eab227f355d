// What every GPU kernel here shares: element types, vectors, warp operations, and programmatic dependent launch.
// Needs no vendor header: conversions are one PTX instruction each, with a plain C++ path beside it.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define HAVE_PTX_BF16 1  // cvt.rn.bf16x2.f32
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HAVE_GRIDDEP 1  // griddepcontrol
#endif

#define WARP_SIZE 32

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// ---- Element types. Two 16-bit elements travel as one u32, the first in its low half. -------------------------------

struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};
typedef float fp32;

__device__ __forceinline__ u32 bf16_bits_nearest_even(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // NaN
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// pack2<E>(a, b): rounds two floats to E, nearest even. unpack2<E>(p, a, b): the two floats again.
template <typename E>
struct Pair;

template <>
struct Pair<bf16> {
    static __device__ __forceinline__ u32 pack(float a, float b) {
#if HAVE_PTX_BF16
        u32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
        return packed;
#else
        return bf16_bits_nearest_even(a) | bf16_bits_nearest_even(b) << 16;
#endif
    }
    static __device__ __forceinline__ void unpack(u32 packed, float& a, float& b) {
        a = __uint_as_float(packed << 16);
        b = __uint_as_float(packed & 0xffff0000u);
    }
};

template <>
struct Pair<fp16> {
    static __device__ __forceinline__ u32 pack(float a, float b) {
        u32 packed;
        asm("{ .reg .f16 lo, hi;\n\t"
            "cvt.rn.f16.f32 lo, %1;\n\t"
            "cvt.rn.f16.f32 hi, %2;\n\t"
            "mov.b32 %0, {lo, hi}; }"
            : "=r"(packed)
            : "f"(a), "f"(b));
        return packed;
    }
    static __device__ __forceinline__ void unpack(u32 packed, float& a, float& b) {
        asm("{ .reg .f16 lo, hi;\n\t"
            "mov.b32 {lo, hi}, %2;\n\t"
            "cvt.f32.f16 %0, lo;\n\t"
            "cvt.f32.f16 %1, hi; }"
            : "=f"(a), "=f"(b)
            : "r"(packed));
    }
};

// ---- Vectors: N_BYTES of consecutive elements in registers, moved by one load or store. ----------------------------

template <int N_BYTES>
struct RawVector;
template <>
struct RawVector<16> {
    typedef uint4 type;
};
template <>
struct RawVector<8> {
    typedef uint2 type;
};
template <>
struct RawVector<4> {
    typedef u32 type;
};

template <typename E, int N_BYTES>
struct Vector {
    static constexpr int SIZE = N_BYTES / int(sizeof(E));
    typedef typename RawVector<N_BYTES>::type Raw;

    union {
        Raw raw;
        u32 words[N_BYTES / 4];
    };

    __device__ __forceinline__ void unpack(float (&values)[SIZE]) const {
#pragma unroll
        for (int i = 0; i < N_BYTES / 4; ++i) {
            if constexpr (sizeof(E) == 4) {
                values[i] = __uint_as_float(words[i]);
            } else {
                Pair<E>::unpack(words[i], values[2 * i], values[2 * i + 1]);
            }
        }
    }
    __device__ __forceinline__ void pack(const float (&values)[SIZE]) {
#pragma unroll
        for (int i = 0; i < N_BYTES / 4; ++i) {
            if constexpr (sizeof(E) == 4) {
                words[i] = __float_as_uint(values[i]);
            } else {
                words[i] = Pair<E>::pack(values[2 * i], values[2 * i + 1]);
            }
        }
    }
    __device__ __forceinline__ void load(const E* from) { raw = *reinterpret_cast<const Raw*>(from); }
    __device__ __forceinline__ void store(E* to) const { *reinterpret_cast<Raw*>(to) = raw; }

    // For data that nobody reads again: the first to leave the caches. Not the non-coherent path (ld.global.nc): under
    // programmatic dependent launch the data may be written while this kernel is alive.
    __device__ __forceinline__ void load_once(const E* from) { raw = __ldcs(reinterpret_cast<const Raw*>(from)); }
};

// Rounds each value to E and back.
template <typename E, int N>
__device__ __forceinline__ void round_to(float (&values)[N]) {
    if constexpr (sizeof(E) == 2) {
#pragma unroll
        for (int i = 0; i < N; i += 2) Pair<E>::unpack(Pair<E>::pack(values[i], values[i + 1]), values[i], values[i + 1]);
    }
}

// ---- Warps ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// A barrier among `threads` consecutive threads (whole warps) that share `id` (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void sync_team(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Programmatic dependent launch (sm_90 and later) ---------------------------------------------------------------
// A kernel launched with it may start while the one before it still runs. Nothing that another kernel may have written
// is read, and nothing is written, before wait_for_previous_kernel(). Prefetching into L2 before it is safe whatever
// the memory holds: L2 is where all writes meet, so the load after the wait sees them.

__device__ __forceinline__ void let_next_kernel_start() {
#if HAVE_GRIDDEP
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if HAVE_GRIDDEP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The 128 bytes around `address`. One thread a line: the bulk prefetch of sm_90, a row for each instruction, was no
// faster for few rows and slower for many.
__device__ __forceinline__ void prefetch_line_to_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ u32 multiprocessors() {
    u32 count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
}
