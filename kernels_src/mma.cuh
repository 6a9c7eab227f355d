// Matrix products on tensor cores, and what feeds them: asynchronous copies to shared memory, and thread-block clusters.
//
// WarpProduct is for operands that come straight from global memory. WarpgroupProduct is for operands that lie in shared
// memory, in tiles of 64 rows of 128 bytes. Both add x · w of 16-bit elements to sums in fp32. On NVIDIA they are mma.sync and
// wgmma (sm_90a); on CDNA WarpProduct is MFMA, with 64 lanes; where there are no such instructions, lanes exchange their
// operands by shuffles, which is right and slow.
#pragma once
#include "gpu.cuh"

#if ON_NVIDIA && __CUDA_ARCH__ >= 800
#define HAVE_MMA 1  // of bf16; cp.async
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAVE_WGMMA 1
#endif
#if (ON_NVIDIA && __CUDA_ARCH__ >= 900) || ON_CPU
#define HAVE_CLUSTERS 1
#endif
#if defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__)
#define HAVE_MFMA 1
#endif

typedef unsigned char u8;

// Makes the compiler compute a value here: ahead of a wait, rather than where it is used.
template <typename T>
__device__ __forceinline__ void compute_now(T& value) {
#if ON_NVIDIA
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(value));
    } else {
        asm volatile("" : "+r"(value));
    }
#endif
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

#if !ON_CPU
extern __shared__ __attribute__((aligned(1024))) u8 dynamic_shared_memory[];
#endif

// The block's dynamic shared memory; a multiple of 1024 on NVIDIA, as swizzled tiles of wgmma want it.
__device__ __forceinline__ u8* dynamic_shared() {
#if ON_CPU
    return static_cast<u8*>(emulated_dynamic_shared());
#else
    return dynamic_shared_memory;
#endif
}

#if ON_NVIDIA
__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }
#endif

// Copies 16 bytes from global to shared memory. It is done when wait_for_copies says so.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if HAVE_MMA
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#elif ON_CPU
    emulated_copy_async(to, from, 16);
#else
    typedef RawVector<16>::type Raw;
    *static_cast<Raw*>(to) = *static_cast<const Raw*>(from);
#endif
}
// The thread's copies since the last call become a group.
__device__ __forceinline__ void commit_copies() {
#if HAVE_MMA
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif ON_CPU
    emulated_commit_copies();
#endif
}
// Waits until all but the thread's last PENDING groups are done. Other threads see them after a barrier, wgmma does after
// this and a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if HAVE_MMA
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#elif ON_CPU
    emulated_wait_for_copies(PENDING);
#endif
#if HAVE_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Prefetches `bytes` of memory into L2, a multiple of 16, with the block's `threads` threads. On sm_90 the copy engine does it,
// beside other accesses; line by line it takes their turns.
__device__ __forceinline__ void prefetch_block_to_l2(const void* from, int bytes, int threads) {
    const char* const begin = static_cast<const char*>(from);
#if HAVE_GRIDDEP
    constexpr int PIECE = 16384;
    if (threadIdx.x == 0)
        for (int at = 0; at < bytes; at += PIECE)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin + at),
                         "r"(bytes - at < PIECE ? bytes - at : PIECE)
                         : "memory");
#else
    for (int at = threadIdx.x * 128; at < bytes; at += threads * 128) prefetch_line_to_l2(begin + at);
#endif
}

// ---- Clusters (sm_90 and later): blocks that write into each other's shared memory -------------------------------

// A block may use all registers of its multiprocessor: ptxas leaves those of a cluster a share of them otherwise.
#if ON_NVIDIA
#define ALL_REGISTERS(threads) __launch_bounds__(threads, 1)
#else
#define ALL_REGISTERS(threads) __launch_bounds__(threads)
#endif

#if HAVE_CLUSTERS && !ON_CPU
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTER_OF(blocks)
#endif

// What blocks of a cluster send each other. Each block says how many bytes it will be sent, and waits for those: no barrier of
// the cluster with its fences, and a block that has been sent everything may end. `place`: 16 bytes of shared memory, the same
// in all blocks. All threads call open, wait_until_all_are_open and receive, once, in this order.
struct Mailbox {
    unsigned long long* place;

    explicit __device__ __forceinline__ Mailbox(void* memory) : place(static_cast<unsigned long long*>(memory)) {}

    __device__ __forceinline__ void open(u32 bytes) const {
#if ON_CPU
        if (threadIdx.x == 0) place[0] = bytes, place[1] = 0;
#elif HAVE_CLUSTERS
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
                         "fence.mbarrier_init.release.cluster;\n\t"
                         "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(place)),
                         "r"(bytes)
                         : "memory");
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    // Until then, nothing may be sent: there might be no such block yet.
    __device__ __forceinline__ void wait_until_all_are_open() const {
#if ON_CPU
        emulated_cluster_barrier();
#elif HAVE_CLUSTERS
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    // A word into block `rank`'s shared memory, where `to` is in this block's.
    __device__ __forceinline__ void send(u32 word, u32* to, u32 rank) const {
#if ON_CPU
        *static_cast<u32*>(emulated_shared_of_block(to, rank)) = word;
        static_cast<unsigned long long*>(emulated_shared_of_block(place, rank))[1] += sizeof word;
#elif HAVE_CLUSTERS
        asm volatile("{ .reg .b32 there, box;\n\t"
                     "mapa.shared::cluster.u32 there, %0, %2;\n\t"
                     "mapa.shared::cluster.u32 box, %1, %2;\n\t"
                     "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [box]; }" ::"r"(shared_address(to)),
                     "r"(shared_address(place)), "r"(rank), "r"(word)
                     : "memory");
#endif
    }
    __device__ __forceinline__ void receive() const {
#if ON_CPU
        emulated_cluster_barrier();
        if (place[0] != place[1]) emulated_error("a block was sent %llu bytes, not %llu", place[1], place[0]);
#elif HAVE_CLUSTERS
        asm volatile("{ .reg .pred done;\n"
                     "again:\n\t"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n\t"
                     "@!done bra again; }" ::"r"(shared_address(place))
                     : "memory");
#endif
    }
};

// ---- Products of a warp ---------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shuffle(u32 value, int lane) {
#if ON_AMD
    return __builtin_amdgcn_ds_bpermute(lane * 4, value);
#else
    return __shfl_sync(~0ull >> (64 - WARP_SIZE), value, lane);
#endif
}

template <typename E>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

template <typename E>
__device__ __forceinline__ float dot2(u32 a, u32 b, float sum) {
    float a0, a1, b0, b1;
    Pair<E>::unpack(a, a0, a1);
    Pair<E>::unpack(b, b0, b1);
    return sum + a0 * b0 + a1 * b1;
}

// sums [16 × 8] += a [16 × 16] · b [16 × 8] of 32 lanes (PTX ISA, "Matrix fragments for mma.m16n8k16"). Lane 4·g + q has
//     a:    rows g, g + 8, g, g + 8; of columns 2q, 2q + 1 (first two words) and 2q + 8, 2q + 9
//     b:    rows 2q, 2q + 1 (first word) and 2q + 8, 2q + 9; of column g
//     sums: row g (first two) and g + 8; of columns 2q, 2q + 1
template <typename E>
__device__ __forceinline__ void mma_16x8x16(float& s0, float& s1, float& s2, float& s3, u32 a0, u32 a1, u32 a2, u32 a3,
                                            u32 b0, u32 b1) {
#if HAVE_MMA
    if constexpr (IS_BF16<E>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
#else
    const int lane = threadIdx.x % WARP_SIZE, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
        const u32 low = shuffle(a0, row + q), high = shuffle(a2, row + q);
        const u32 low8 = shuffle(a1, row + q), high8 = shuffle(a3, row + q);
        const u32 first = shuffle(b0, column + q), second = shuffle(b1, column + q);
        const u32 first1 = shuffle(b0, column + 4 + q), second1 = shuffle(b1, column + 4 + q);
        s0 = dot2<E>(high, second, dot2<E>(low, first, s0));
        s1 = dot2<E>(high, second1, dot2<E>(low, first1, s1));
        s2 = dot2<E>(high8, second, dot2<E>(low8, first, s2));
        s3 = dot2<E>(high8, second1, dot2<E>(low8, first1, s3));
    }
#endif
}

// sums [16 × 16] += a [16 × 16] · b [16 × 16] of 64 lanes (AMD CDNA ISA, V_MFMA_F32_16X16X16). Lane 16·h + i has row i of a and
// column i of b, elements 4h to 4h + 3; and of sums rows 4h to 4h + 3 of column i.
template <typename E>
__device__ __forceinline__ void mma_16x16x16(float (&sums)[4], u32 a0, u32 a1, u32 b0, u32 b1) {
#if HAVE_MFMA
    typedef float Four __attribute__((ext_vector_type(4)));
    typedef u32 Words __attribute__((ext_vector_type(2)));
    const Words a = {a0, a1}, b = {b0, b1};
    Four four = {sums[0], sums[1], sums[2], sums[3]};
    if constexpr (IS_BF16<E>) {
        typedef short Elements __attribute__((ext_vector_type(4)));
        four = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(Elements, a), __builtin_bit_cast(Elements, b), four,
                                                        0, 0, 0);
    } else {
        typedef _Float16 Elements __attribute__((ext_vector_type(4)));
        four = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(Elements, a), __builtin_bit_cast(Elements, b), four, 0,
                                                    0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = four[i];
#else
    const int lane = threadIdx.x % WARP_SIZE, row = lane / 16 * 4, column = lane % 16;
#pragma unroll 1
    for (int part = 0; part < WARP_SIZE; part += 16) {
        const u32 low = shuffle(b0, part + column), high = shuffle(b1, part + column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[i] = dot2<E>(shuffle(a1, part + row + i), high, dot2<E>(shuffle(a0, part + row + i), low, sums[i]));
    }
#endif
}

// The sums [16, 64] of x [16, DEPTH] · w [DEPTH, 64], held by one warp, whose lanes load both operands from global memory by
// vectors along their contiguous dimensions, x's second and w's second. Which elements of an operand meet in one instruction
// is free as long as both operands agree on it: so a lane gets DEPTH elements' worth of operands without any exchange, and
// ends up with 16 neighbouring columns of a row.
//
// Of every 32 of x's columns (w's rows), lane group q = 0 to 3 has 8q to 8q + 7. With 32 lanes, lane 4·g + q has rows g and
// g + 8 of x, columns 8g to 8g + 7 of w, and of the sums columns 16q to 16q + 15 of rows g and g + 8. With 64 lanes, lane
// 16·q + i has row i of x, columns 4i to 4i + 3 of w, and of the sums columns 16q to 16q + 15 of row i.
template <typename E>
struct WarpProduct {
    static constexpr int ROWS = 16, COLUMNS = 64, DEPTH = 32;
    static constexpr int LANE_ROWS = WARP_SIZE == 32 ? 2 : 1, LANE_COLUMNS = 16, LANE_DEPTH = 8;
    static constexpr int PARTS = WARP_SIZE == 32 ? 8 : 4;  // columns of w that a lane loads: side by side

    typedef Vector<E, 16> XVector;
    typedef Vector<E, 2 * PARTS> WVector;

    static __device__ __forceinline__ int lane() { return threadIdx.x % WARP_SIZE; }
    static __device__ __forceinline__ int group() { return WARP_SIZE == 32 ? lane() % 4 : lane() / 16; }
    // Of x and of the sums.
    static __device__ __forceinline__ int row(int i) { return WARP_SIZE == 32 ? lane() / 4 + 8 * i : lane() % 16; }
    // The first of the lane's columns of x, rows of w.
    static __device__ __forceinline__ int depth() { return group() * LANE_DEPTH; }
    // The first of its columns of w.
    static __device__ __forceinline__ int w_column() { return (WARP_SIZE == 32 ? lane() / 4 : lane() % 16) * PARTS; }
    // And of the sums.
    static __device__ __forceinline__ int column() { return group() * LANE_COLUMNS; }

    // w, rearranged: two words for each of its columns and each half of the lane's rows, in pairs of rows.
    struct W {
        u32 words[2][PARTS][2];

        __device__ __forceinline__ explicit W(const WVector (&rows)[LANE_DEPTH]) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const u32 first = rows[4 * half + 2 * i].words[part / 2];
                        const u32 second = rows[4 * half + 2 * i + 1].words[part / 2];
                        words[half][part][i] = part % 2 ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
                    }
                }
            }
        }
    };

    float sums[LANE_ROWS][LANE_COLUMNS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c) sums[i][c] = 0.f;
        }
    }

    __device__ __forceinline__ void add(const XVector (&x)[LANE_ROWS], const W& w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const u32 w0 = w.words[half][part][0], w1 = w.words[half][part][1];
                if constexpr (WARP_SIZE == 32) {
                    mma_16x8x16<E>(sums[0][part], sums[0][part + 8], sums[1][part], sums[1][part + 8], x[0].words[2 * half],
                                   x[1].words[2 * half], x[0].words[2 * half + 1], x[1].words[2 * half + 1], w0, w1);
                } else {
                    float some[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) some[i] = sums[0][4 * i + part];
                    mma_16x16x16<E>(some, w0, w1, x[0].words[2 * half], x[0].words[2 * half + 1]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[0][4 * i + part] = some[i];
                }
            }
        }
    }
};

// ---- Products of a warpgroup: four warps of 32 lanes ----------------------------------------------------------------

// Tiles in shared memory have 64 rows of ROW_BYTES (32, 64 or 128), in pieces of 16 bytes, swapped so that the same pieces of
// several rows lie in different banks (wgmma's swizzles). Tiles begin at multiples of 1024 bytes. The pattern repeats every 8
// rows.
constexpr int TILE_ROWS = 64;

template <int ROW_BYTES>
__device__ __forceinline__ int tile_offset(int row, int piece) {
    const int at = row * ROW_BYTES + piece * 16;
    return at ^ (at >> 3 & (ROW_BYTES - 16));
}

#if HAVE_MMA && !HAVE_WGMMA
// Four matrices of 8 × 8 elements; lanes 8i to 8i + 7 give the rows of matrix i.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&words)[4], const u8* row) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}
#endif

#if HAVE_WGMMA
// `next`: how far the tile of the next columns is, if w has more than a row of a tile (PTX ISA, "Matrix descriptor format").
template <int ROW_BYTES>
__device__ __forceinline__ unsigned long long tile_descriptor(const u8* tile, u32 next) {
    constexpr unsigned long long SWIZZLE = ROW_BYTES == 128 ? 1 : ROW_BYTES == 64 ? 2 : 3;
    return (shared_address(tile) & 0x3ffffu) >> 4 | (unsigned long long)(next >> 4) << 16 |
           (unsigned long long)(8 * ROW_BYTES >> 4) << 32 | SWIZZLE << 62;
}

#define WGMMA_16(i) \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
    "+f"(sums[i + 6]), "+f"(sums[i + 7]), "+f"(sums[i + 8]), "+f"(sums[i + 9]), "+f"(sums[i + 10]), "+f"(sums[i + 11]), \
    "+f"(sums[i + 12]), "+f"(sums[i + 13]), "+f"(sums[i + 14]), "+f"(sums[i + 15])
#define WGMMA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_32 \
    WGMMA_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_64 \
    WGMMA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
                       "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(columns, type, registers, operands, accumulate_operand, ...) \
    asm volatile("{ .reg .pred accumulate;\n\t" \
                 "setp.ne.b32 accumulate, " accumulate_operand ", 0;\n\t" \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " operands \
                 ", accumulate, 1, 1, 0, 1; }" \
                 : __VA_ARGS__ \
                 : "l"(x), "l"(w), "r"(accumulate))
#define WGMMA_32(type) WGMMA("32", type, WGMMA_REGISTERS_16, "%16, %17", "%18", WGMMA_16(0))
#define WGMMA_64(type) WGMMA("64", type, WGMMA_REGISTERS_32, "%32, %33", "%34", WGMMA_16(0), WGMMA_16(16))
#define WGMMA_128(type) \
    WGMMA("128", type, WGMMA_REGISTERS_64, "%64, %65", "%66", WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48))

// sums [64 × COLUMNS] += x [64 × 16] · w [16 × COLUMNS], x and w in shared memory, rows of w contiguous.
template <typename E, int COLUMNS>
__device__ __forceinline__ void wgmma(float (&sums)[COLUMNS / 2], unsigned long long x, unsigned long long w, int accumulate) {
    if constexpr (IS_BF16<E>) {
        if constexpr (COLUMNS == 32) WGMMA_32("bf16");
        if constexpr (COLUMNS == 64) WGMMA_64("bf16");
        if constexpr (COLUMNS == 128) WGMMA_128("bf16");
    } else {
        if constexpr (COLUMNS == 32) WGMMA_32("f16");
        if constexpr (COLUMNS == 64) WGMMA_64("f16");
        if constexpr (COLUMNS == 128) WGMMA_128("f16");
    }
}
#endif

// The sums [64, WIDTH] of x [64, K] · w [K, WIDTH], in steps of 64 of K, held by a warpgroup. Lane 4·g + q of warp i (of four) has
// rows 16i + g and 16i + g + 8: of both, in turn, columns 8c + 2q and 8c + 2q + 1 for c = 0 to WIDTH / 8 - 1.
template <typename E, int WIDTH>
struct WarpgroupProduct {
    static_assert(WIDTH == 32 || WIDTH == 64 || WIDTH == 128, "of wgmma's sizes");
    static constexpr int ROWS = 64, COLUMNS = WIDTH, DEPTH = 64;
    static constexpr int X_ROW_BYTES = 128, W_ROW_BYTES = WIDTH < 64 ? WIDTH * 2 : 128;
    static constexpr int X_TILE_BYTES = TILE_ROWS * X_ROW_BYTES;
    static constexpr int W_TILE_BYTES = TILE_ROWS * W_ROW_BYTES;  // of up to 64 columns
    static constexpr int W_BYTES = TILE_ROWS * WIDTH * 2;         // of all columns: one tile, or two

    float sums[WIDTH / 2];

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / 32 % 4 * 16 + lane() / 4 + 8 * i; }

    // x: COUNT tiles, their rows x's, 64 of K each; w: for each of them W_BYTES, rows of tiles w's. With wgmma the products are
    // under way when it returns: wait() says when the sums are there and the tiles are free. `first` starts the sums anew.
    template <int COUNT>
    __device__ __forceinline__ void add(const u8* x, const u8* w, bool first) {
#if HAVE_WGMMA
        const unsigned long long x_tile = tile_descriptor<X_ROW_BYTES>(x, 0);
        const unsigned long long w_tile = tile_descriptor<W_ROW_BYTES>(w, W_TILE_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < 4 * COUNT; ++step)
            wgmma<E, WIDTH>(sums, x_tile + (step / 4 * X_TILE_BYTES + step % 4 * 32) / 16,
                            w_tile + (step / 4 * W_BYTES + step % 4 * 16 * W_ROW_BYTES) / 16, step > 0 || !first);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
        if (first) {
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0.f;
        }
#pragma unroll 1
        for (int step = 0; step < 4 * COUNT; ++step) {
            u32 a[4];
            load_x(a, x + step / 4 * X_TILE_BYTES, step % 4);
#pragma unroll
            for (int c = 0; c < WIDTH / 8; c += 2) {
                u32 b[4];
                load_w(b, w + step / 4 * W_BYTES + c / 8 * W_TILE_BYTES, step % 4, c % 8);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float* s = sums + 4 * (c + i);
                    mma_16x8x16<E>(s[0], s[1], s[2], s[3], a[0], a[1], a[2], a[3], b[2 * i], b[2 * i + 1]);
                }
            }
        }
#endif
    }
    static __device__ __forceinline__ void wait() {
#if HAVE_WGMMA
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
    }

  private:
    // Operands of mma_16x8x16: of x 16 rows and 16 columns; of w 16 rows and twice 8 columns.
    static __device__ __forceinline__ void load_x(u32 (&words)[4], const u8* tile, int step) {
        const int first = threadIdx.x / 32 % 4 * 16;
#if HAVE_MMA && !HAVE_WGMMA
        load_matrices<false>(words, tile + tile_offset<X_ROW_BYTES>(first + lane() % 16, 2 * step + lane() / 16));
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first + lane() / 4 + i % 2 * 8;
            words[i] = *reinterpret_cast<const u32*>(tile + tile_offset<X_ROW_BYTES>(row, 2 * step + i / 2) + lane() % 4 * 4);
        }
#endif
    }
    static __device__ __forceinline__ void load_w(u32 (&words)[4], const u8* tile, int step, int column) {
#if HAVE_MMA && !HAVE_WGMMA
        load_matrices<true>(words, tile + tile_offset<W_ROW_BYTES>(16 * step + lane() % 16, column + lane() / 16));
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * step + i % 2 * 8 + lane() % 4 * 2;
            const auto element = [&](int r) {
                return u32(*reinterpret_cast<const u16*>(tile + tile_offset<W_ROW_BYTES>(r, column + i / 2) + lane() / 4 * 2));
            };
            words[i] = element(row) | element(row + 1) << 16;
        }
#endif
    }
};

// Word w of each of 4 lanes' 4 becomes lane w's: four words of such sums, as pairs of columns 8c + 2q and 8c + 2q + 1 for four c,
// become eight neighbouring columns.
__device__ __forceinline__ void transpose(u32 (&words)[4]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & mask) continue;
            const u32 low = words[i], high = words[i | mask];
            const u32 received = __float_as_uint(shuffle_xor(__uint_as_float(lane & mask ? low : high), mask));
            words[i] = lane & mask ? received : low;
            words[i | mask] = lane & mask ? high : received;
        }
    }
}
