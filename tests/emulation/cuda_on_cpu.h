// What CUDA has built in, for a kernel compiled as C++: one fibre per GPU thread runs it, see scheduler.cpp.
// A kernel may use shared memory (dynamic: emulated_dynamic_shared()), __syncthreads, warp shuffles and votes, and what
// gpu.cuh and mma.cuh put behind their functions: clusters (dynamic shared memory only) and asynchronous copies among it. Not
// emulated: atomics between blocks, grid-wide barriers, tensor cores (their products take mma.cuh's plain path).
#pragma once
#include <math.h>
#include <string.h>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// A section of its own, so that every block can start with garbage in it. Blocks run one after the other.
#define __shared__ static __attribute__((section("emulated_shared")))

typedef unsigned long long LaneMask;

struct Dimensions {
    unsigned x, y, z;
};
extern "C" {
extern Dimensions threadIdx, blockIdx, blockDim, gridDim;

// What each lane of `mask` brings, by lane: returns when all of them have come. `what` is for messages.
const LaneMask* emulated_gather(LaneMask mask, LaneMask value, const char* what);
// Waits for `threads` threads at barrier `id`.
void emulated_named_barrier(int id, int threads);
// Until a thread has come here, it may touch nothing that a pointer parameter leads to.
void emulated_wait_for_previous_kernel();
// What memory behind a pointer parameter holds while the previous kernel may be writing it: not always what it will hold.
long long emulated_early_read(const long long* address);
void* emulated_dynamic_shared();
// Block `rank` of the cluster's dynamic shared memory, from where `address` is in this block's.
void* emulated_shared_of_block(const void* address, unsigned rank);
// Waits for all threads of the cluster.
void emulated_cluster_barrier();
// The running thread's number in its cluster.
unsigned emulated_thread();
[[noreturn]] void emulated_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
}

// Asynchronous copies happen when they are waited for, as late as on a GPU; until then their destination is garbage.
struct EmulatedCopy {
    void* to;
    const void* from;
    int bytes, group;
    EmulatedCopy* next;
};
struct EmulatedCopies {
    EmulatedCopy *first, **last;
    int committed;  // groups
};
static inline EmulatedCopies& emulated_copies() {
    static EmulatedCopies all[16 * 1024];
    return all[emulated_thread()];
}
static inline void emulated_copy_async(void* to, const void* from, int bytes) {
    EmulatedCopies& copies = emulated_copies();
    if ((unsigned long)to % bytes || (unsigned long)from % bytes)
        emulated_error("an asynchronous copy of %d bytes is misaligned", bytes);
    // Both must be there from now on. Volatile: an optimiser would leave out what is not used.
    for (int i = 0; i < bytes; ++i)
        static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i] | char(0xff);
    if (!copies.first) copies.last = &copies.first;
    *copies.last = new EmulatedCopy{to, from, bytes, copies.committed, nullptr};
    copies.last = &(*copies.last)->next;
}
static inline void emulated_commit_copies() { ++emulated_copies().committed; }
static inline void emulated_wait_for_copies(int pending_groups) {
    EmulatedCopies& copies = emulated_copies();
    while (EmulatedCopy* copy = copies.first) {
        if (copy->group >= copies.committed - pending_groups) return;
        memcpy(copy->to, copy->from, copy->bytes);
        copies.first = copy->next;
        delete copy;
    }
}

static inline int emulated_lane() { return int(threadIdx.x % WARP_SIZE); }
static inline LaneMask emulated_all_lanes() { return ~0ull >> (64 - WARP_SIZE); }

template <typename T>
T emulated_shuffle(LaneMask mask, T value, int from, const char* what) {
    static_assert(sizeof(T) <= sizeof(LaneMask), "a lane gives at most 8 bytes");
    LaneMask bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const LaneMask* lanes = emulated_gather(mask, bits, what);
    if (!(mask >> from & 1)) emulated_error("%s with mask 0x%llx reads lane %d, which is not in it", what, mask, from);
    memcpy(&value, &lanes[from], sizeof(T));
    return value;
}
template <typename T>
T __shfl_xor_sync(LaneMask mask, T value, int lane_mask, int width = WARP_SIZE) {
    const int lane = emulated_lane(), from = lane ^ lane_mask;
    return emulated_shuffle(mask, value, from / width > lane / width ? lane : from, "__shfl_xor_sync");
}
template <typename T>
T __shfl_sync(LaneMask mask, T value, int source, int width = WARP_SIZE) {
    return emulated_shuffle(mask, value, emulated_lane() / width * width + (source & (width - 1)), "__shfl_sync");
}
template <typename T>
T __shfl_up_sync(LaneMask mask, T value, unsigned delta, int width = WARP_SIZE) {
    const int lane = emulated_lane(), inside = lane % width;
    return emulated_shuffle(mask, value, inside < int(delta) ? lane : lane - int(delta), "__shfl_up_sync");
}
template <typename T>
T __shfl_down_sync(LaneMask mask, T value, unsigned delta, int width = WARP_SIZE) {
    const int lane = emulated_lane(), inside = lane % width;
    return emulated_shuffle(mask, value, inside + int(delta) >= width ? lane : lane + int(delta), "__shfl_down_sync");
}
static inline LaneMask __ballot_sync(LaneMask mask, int predicate) {
    const LaneMask* lanes = emulated_gather(mask, predicate != 0, "__ballot_sync");
    LaneMask votes = 0;
    for (int lane = 0; lane < WARP_SIZE; ++lane) votes |= (mask >> lane & 1 ? lanes[lane] : 0) << lane;
    return votes;
}
static inline int __any_sync(LaneMask mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(LaneMask mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline void __syncwarp(LaneMask mask = emulated_all_lanes()) { emulated_gather(mask, 0, "__syncwarp"); }
static inline void __syncthreads() { emulated_named_barrier(0, int(blockDim.x)); }

static inline int emulated_warp_uniform(int value) {
    const LaneMask* lanes = emulated_gather(emulated_all_lanes(), unsigned(value), "warp_uniform");
    for (int lane = 0; lane < WARP_SIZE; ++lane)
        if (int(lanes[lane]) != value)
            emulated_error("warp_uniform: lane %d has %d, lane %d has %d", emulated_lane(), value, lane,
                           int(lanes[lane]));
    return value;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float rsqrtf(float value) { return 1.f / sqrtf(value); }
