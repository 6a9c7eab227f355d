// One kernel, unmodified, as C++. SOURCE and KERNEL are its file and its function; its tunables are given beside them.
// A kernel calls its parameter struct Params, and its threads per block THREADS.
#include "cuda_on_cpu.h"

#include SOURCE

extern "C" {
extern const unsigned long emulated_params_bytes = sizeof(Params);
extern const int emulated_warp_size = WARP_SIZE;
extern const int emulated_threads = THREADS;
void emulated_kernel(const void* params) { KERNEL(*static_cast<const Params*>(params)); }
}
