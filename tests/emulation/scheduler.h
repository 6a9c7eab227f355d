// Runs the threads of one block, or of a cluster of blocks, as fibres of this one thread, in lock step where the kernel asks
// for it.
#pragma once

extern "C" {
extern const unsigned long emulated_params_bytes;
extern const int emulated_warp_size;
extern const int emulated_threads;  // of a block
extern const int emulated_cluster;  // blocks of a cluster
void emulated_kernel(const void* params);
[[noreturn]] void emulated_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
}

enum Order { FORWARD, REVERSE, SHUFFLED };

// 0 to count-1 in `order`; the caller frees it.
unsigned* ordered(unsigned count, Order order);

// Grants or refuses the running thread the memory behind the kernel's pointers; see memory.cpp.
void set_access(bool granted);

// Runs the cluster whose first block is `index`, resuming its threads in `order`. With `programmatic`, a thread has no access
// to memory before it has waited for the previous kernel.
void run_cluster(unsigned index, Order order, bool programmatic, const void* params);
void set_launch(unsigned blocks, unsigned long dynamic_shared_bytes);
