// What may be done with memory that a kernel before this one may still be writing (programmatic dependent launch, before
// wait_for_previous_kernel): look at it for a hint. Whatever depends on the hint's being right has to check it afterwards.
#pragma once
#include "gpu.cuh"

// *address, past the L1 cache: what an early read left there would be old.
__device__ __forceinline__ i64 read_past_l1(const i64* address) {
#if ON_NVIDIA
    i64 value;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
#else
    return *address;
#endif
}

// Before the wait: what *address holds now, which may be anything. Read it with read_past_l1 after the wait.
__device__ __forceinline__ i64 read_early(const i64* address) {
#if ON_CPU
    return emulated_early_read(address);
#else
    return read_past_l1(address);
#endif
}
