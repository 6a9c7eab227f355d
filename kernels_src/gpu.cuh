// What every GPU kernel here shares: element types, vectors, warp operations, and programmatic dependent launch.
// One source for NVRTC (NVIDIA), hiprtc and clang (AMD), and a C++ compiler (the emulator in tests/emulation, whose
// header comes first and brings what CUDA has built in). Needs no vendor header. What only one of them has stands
// behind a function with a plain path beside it.
#pragma once

#ifdef __CUDA_ARCH__
#define ON_NVIDIA 1
#else
#define ON_NVIDIA 0
#endif
#ifdef __HIP__
#define ON_AMD 1
#else
#define ON_AMD 0
#endif
#define ON_CPU (!ON_NVIDIA && !ON_AMD)

#if ON_NVIDIA && __CUDA_ARCH__ >= 800
#define HAVE_PTX_BF16 1  // cvt.rn.bf16x2.f32
#endif
#if ON_NVIDIA && __CUDA_ARCH__ >= 900
#define HAVE_GRIDDEP 1  // griddepcontrol
#endif

#ifndef WARP_SIZE  // given for AMD: 64 lanes on CDNA
#define WARP_SIZE 32
#endif
#ifndef NAMED_BARRIERS  // given to the emulator, which can do with and without
#define NAMED_BARRIERS ON_NVIDIA
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#if ON_AMD
#ifdef __AMDGCN_WAVEFRONT_SIZE__
static_assert(WARP_SIZE == __AMDGCN_WAVEFRONT_SIZE__, "WARP_SIZE is not the width that is compiled for");
#endif
#ifndef __HIPCC_RTC__  // clang without ROCm's headers; hiprtc brings these itself
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
// As in HIP's headers: clang takes no notice of launch_bounds for AMD, and would leave registers for 1,024 threads.
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))

struct OneDimension {
    u32 x;
};
#define threadIdx (OneDimension{__builtin_amdgcn_workitem_id_x()})
#define blockIdx (OneDimension{__builtin_amdgcn_workgroup_id_x()})

__device__ __forceinline__ void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
__device__ __forceinline__ u32 __float_as_uint(float value) { return __builtin_bit_cast(u32, value); }
__device__ __forceinline__ float __uint_as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
__device__ __forceinline__ float rsqrtf(float value) { return __builtin_amdgcn_rsqf(value); }
__device__ __forceinline__ float rintf(float value) { return __builtin_rintf(value); }
#endif
#endif

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
#if ON_NVIDIA
        u32 packed;
        asm("{ .reg .f16 lo, hi;\n\t"
            "cvt.rn.f16.f32 lo, %1;\n\t"
            "cvt.rn.f16.f32 hi, %2;\n\t"
            "mov.b32 %0, {lo, hi}; }"
            : "=r"(packed)
            : "f"(a), "f"(b));
        return packed;
#else
        return __builtin_bit_cast(u16, _Float16(a)) | u32(__builtin_bit_cast(u16, _Float16(b))) << 16;
#endif
    }
    static __device__ __forceinline__ void unpack(u32 packed, float& a, float& b) {
#if ON_NVIDIA
        asm("{ .reg .f16 lo, hi;\n\t"
            "mov.b32 {lo, hi}, %2;\n\t"
            "cvt.f32.f16 %0, lo;\n\t"
            "cvt.f32.f16 %1, hi; }"
            : "=f"(a), "=f"(b)
            : "r"(packed));
#else
        a = float(__builtin_bit_cast(_Float16, u16(packed)));
        b = float(__builtin_bit_cast(_Float16, u16(packed >> 16)));
#endif
    }
};

// ---- Vectors: N_BYTES of consecutive elements in registers, moved by one load or store. ----------------------------

template <int N_BYTES>
struct RawVector;
template <>
struct RawVector<16> {
#if ON_NVIDIA
    typedef uint4 type;
#else
    typedef u32 type __attribute__((vector_size(16)));
#endif
};
template <>
struct RawVector<8> {
#if ON_NVIDIA
    typedef uint2 type;
#else
    typedef u32 type __attribute__((vector_size(8)));
#endif
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

    // From and to global memory, surely by one instruction of its own: where one of several tensors is meant, the compiler
    // does not always see that all are global; and of an assignment it sometimes makes a store for each word, which are as
    // many writes to L2.
    __device__ __forceinline__ void load_at_once(const E* from) {
#if ON_NVIDIA
        if constexpr (N_BYTES == 16) {
            asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                         : "l"(from)
                         : "memory");
        } else if constexpr (N_BYTES == 8) {
            asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory");
        } else {
            asm volatile("ld.global.b32 %0, [%1];" : "=r"(words[0]) : "l"(from) : "memory");
        }
#else
        load(from);
#endif
    }
    __device__ __forceinline__ void store_at_once(E* to) const {
#if ON_NVIDIA
        if constexpr (N_BYTES == 16) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                         :
                         : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                         : "memory");
        } else if constexpr (N_BYTES == 8) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
        } else {
            asm volatile("st.global.b32 [%0], %1;" : : "l"(to), "r"(words[0]) : "memory");
        }
#else
        store(to);
#endif
    }

    // For data that nobody reads again: the first to leave the caches. Not the non-coherent path (ld.global.nc): under
    // programmatic dependent launch the data may be written while this kernel is alive.
    __device__ __forceinline__ void load_once(const E* from) {
#if ON_NVIDIA
        raw = __ldcs(reinterpret_cast<const Raw*>(from));
#elif ON_AMD
        raw = __builtin_nontemporal_load(reinterpret_cast<const Raw*>(from));
#else
        load(from);
#endif
    }
};

// Rounds each value to E and back.
template <typename E, int N>
__device__ __forceinline__ void round_to(float (&values)[N]) {
    if constexpr (sizeof(E) == 2) {
#pragma unroll
        for (int i = 0; i < N; i += 2) Pair<E>::unpack(Pair<E>::pack(values[i], values[i + 1]), values[i], values[i + 1]);
    }
}

// ---- Warps and barriers ---------------------------------------------------------------------------------------------

// The value of the lane whose number differs in the bits of `mask`. All lanes of the warp must call it.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
#if ON_AMD
    const int lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
    return __uint_as_float(__builtin_amdgcn_ds_bpermute((lane ^ mask) * 4, __float_as_uint(value)));
#else
    return __shfl_xor_sync(~0ull >> (64 - WARP_SIZE), value, mask);
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
    return value;
}

// `value`, which all lanes of the warp agree on. Branch on it, and AMD's compiler makes a jump of the branch; otherwise
// every warp goes through both sides with lanes masked off, barriers included.
__device__ __forceinline__ int warp_uniform(int value) {
#if ON_AMD
    return __builtin_amdgcn_readfirstlane(value);
#elif ON_CPU
    return emulated_warp_uniform(value);
#else
    return value;
#endif
}

// A barrier among `threads` consecutive threads (whole warps) that share `id` (1 to 15; 0 is __syncthreads). Without
// NAMED_BARRIERS it is the block's: every thread of the block must come to one, from wherever it is.
__device__ __forceinline__ void sync_team(int id, int threads) {
#if !NAMED_BARRIERS
    __syncthreads();
#elif ON_CPU
    emulated_named_barrier(id, threads);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
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
#elif ON_CPU
    emulated_wait_for_previous_kernel();
#endif
}
// The 128 bytes around `address`. One thread a line: the bulk prefetch of sm_90, a row for each instruction, was no
// faster for few rows and slower for many.
__device__ __forceinline__ void prefetch_line_to_l2(const void* address) {
#if ON_NVIDIA
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

__device__ __forceinline__ u32 multiprocessors() {
#if ON_NVIDIA
    u32 count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
#else
    return 1;
#endif
}
