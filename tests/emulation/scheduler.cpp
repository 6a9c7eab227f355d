#include "scheduler.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

typedef unsigned long long LaneMask;

struct Dimensions {
    unsigned x, y, z;
};

// ---- Fibres -----------------------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 16 << 10;

#if defined(__x86_64__)
typedef void* Context;
extern "C" void switch_stack(void** saved, void* to);
// Saves what the System V ABI wants kept, and the stack pointer; then takes up the other's.
asm(R"(
.text
.type switch_stack, @function
switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size switch_stack, .-switch_stack
)");
void prepare(Context& context, char* stack, void (*start)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 2;
    *top = reinterpret_cast<void*>(start);  // where switch_stack returns to, with the stack aligned as after a call
    context = top - 6;
}
void switch_context(Context& from, Context& to) { switch_stack(&from, to); }
#else
typedef ucontext_t Context;
void prepare(Context& context, char* stack, void (*start)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, start, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

enum State { READY, AT_EXCHANGE, AT_BARRIER, ENDED };

struct Thread {
    Context context;
    State state;
    bool has_access;  // it has waited for the previous kernel
    LaneMask mask;    // AT_EXCHANGE: the lanes it waits for
    LaneMask brought, lanes[64];  // its own value, and what all lanes of the mask brought
    const char* what;
    int barrier;  // AT_BARRIER
};

struct Barrier {
    int threads, arrived;
};

// The lanes of a warp that wait at an exchange, and for what; `alike`: all of them for the first one's lanes, at its call.
struct Warp {
    LaneMask waiting, mask;
    const char* what;
    bool alike;
};

constexpr int BARRIERS = 16, MAX_CLUSTER = 16;
constexpr int CLUSTER_BARRIER = MAX_CLUSTER * BARRIERS;

unsigned thread_count, current;  // of the cluster
unsigned long shared_bytes;
Thread* threads;
Warp* warps;
char* stacks;
Barrier barriers[CLUSTER_BARRIER + 1];  // BARRIERS for each block, and the cluster's
Context scheduler;
const void* kernel_params;
char* dynamic_shared[MAX_CLUSTER];

unsigned block_in_cluster() { return current / unsigned(emulated_threads); }

void yield() { switch_context(threads[current].context, scheduler); }

void thread_main() {
    emulated_kernel(kernel_params);
    threads[current].state = ENDED;
    yield();
    abort();
}

// What every thread that has not ended waits for.
[[noreturn]] void report_standstill() {
    char text[2000];
    int used = 0;
    auto add = [&](const char* format, auto... values) {
        const int left = int(sizeof text) - used;
        if (left > 1) used += snprintf(text + used, left, format, values...);
    };
    unsigned ended = 0;
    for (unsigned i = 0; i < thread_count; ++i) ended += threads[i].state == ENDED;
    for (int id = 0; id < CLUSTER_BARRIER; ++id)
        if (barriers[id].arrived)
            add("%d of %d threads are at barrier %d; ", barriers[id].arrived, barriers[id].threads, id % BARRIERS);
    if (int arrived = barriers[CLUSTER_BARRIER].arrived) add("%d threads are at the cluster's barrier; ", arrived);
    for (unsigned first = 0; first < thread_count; first += emulated_warp_size) {
        LaneMask here = 0, wanted = 0;
        const char* what = "";
        for (int lane = 0; lane < emulated_warp_size && first + lane < thread_count; ++lane) {
            const Thread& thread = threads[first + lane];
            if (thread.state != AT_EXCHANGE) continue;
            here |= 1ull << lane, wanted |= thread.mask, what = thread.what;
        }
        if (here)
            add("warp %u: lanes 0x%llx are at %s for lanes 0x%llx; ", first / emulated_warp_size, here, what, wanted);
    }
    emulated_error("no thread can go on: %s%u of %u threads have ended", text, ended, thread_count);
}

void arrive(int index, int count) {
    Barrier& barrier = barriers[index];
    barrier.threads = count;
    threads[current].state = AT_BARRIER;
    threads[current].barrier = index;
    if (++barrier.arrived < count) return yield();
    barrier.arrived = 0;
    for (unsigned i = 0; i < thread_count; ++i)
        if (threads[i].state == AT_BARRIER && threads[i].barrier == index) threads[i].state = READY;
}

}  // namespace

extern "C" {

Dimensions threadIdx, blockIdx, blockDim, gridDim;

void emulated_error(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "emulation: block %u, thread %u: ", blockIdx.x, threadIdx.x);
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    fflush(stderr);
    _exit(3);
}

const LaneMask* emulated_gather(LaneMask mask, LaneMask value, const char* what) {
    Thread& me = threads[current];
    const int lane = int(current) % emulated_warp_size;
    const unsigned first = current - lane;
    if (!(mask >> lane & 1)) emulated_error("%s with mask 0x%llx, which lacks the calling lane %d", what, mask, lane);
    if (emulated_warp_size < 64 && mask >> emulated_warp_size)
        emulated_error("%s with mask 0x%llx, of more than %d lanes", what, mask, emulated_warp_size);
    me.state = AT_EXCHANGE, me.mask = mask, me.brought = value, me.what = what;
    Warp& warp = warps[current / emulated_warp_size];
    if (!warp.waiting) warp.mask = mask, warp.what = what, warp.alike = true;
    warp.alike &= mask == warp.mask && what == warp.what;
    for (LaneMask others = warp.alike ? 0 : warp.waiting & mask; others; others &= others - 1) {
        const int other = __builtin_ctzll(others);
        const Thread& thread = threads[first + other];
        if (thread.mask != mask || thread.what != what)
            emulated_error("lane %d is at %s with mask 0x%llx, lane %d at %s with mask 0x%llx", lane, what, mask, other,
                           thread.what, thread.mask);
    }
    warp.waiting |= 1ull << lane;
    if (mask & ~warp.waiting) {
        yield();
        return me.lanes;
    }
    warp.waiting &= ~mask;
    LaneMask values[64] = {};
    for (LaneMask lanes = mask; lanes; lanes &= lanes - 1) {
        const int other = __builtin_ctzll(lanes);
        values[other] = threads[first + other].brought;
    }
    for (LaneMask lanes = mask; lanes; lanes &= lanes - 1) {
        Thread& thread = threads[first + __builtin_ctzll(lanes)];
        memcpy(thread.lanes, values, emulated_warp_size * sizeof(LaneMask));
        thread.state = READY;
    }
    return me.lanes;
}

void emulated_named_barrier(int id, int count) {
    if (id < 0 || id >= BARRIERS) emulated_error("there is no barrier %d", id);
    if (count % emulated_warp_size != 0 || count > emulated_threads)
        emulated_error("barrier %d is for %d threads: not a number of whole warps of the block", id, count);
    const int index = int(block_in_cluster()) * BARRIERS + id;
    if (barriers[index].arrived && barriers[index].threads != count)
        emulated_error("barrier %d is for %d threads here and for %d elsewhere", id, count, barriers[index].threads);
    arrive(index, count);
}

void emulated_cluster_barrier() { arrive(CLUSTER_BARRIER, int(thread_count)); }

unsigned emulated_thread() { return current; }

void emulated_wait_for_previous_kernel() {
    if (threads[current].has_access) return;
    threads[current].has_access = true;
    yield();  // stays READY: the scheduler grants access when all threads that have none stand still
}

void* emulated_dynamic_shared() { return dynamic_shared[block_in_cluster()]; }

void* emulated_shared_of_block(const void* address, unsigned rank) {
    const long offset = static_cast<const char*>(address) - dynamic_shared[block_in_cluster()];
    if (offset < 0 || offset > long(shared_bytes)) emulated_error("an address is not in the block's shared memory");
    if (rank >= unsigned(emulated_cluster)) emulated_error("the cluster has no block %u", rank);
    return dynamic_shared[rank] + offset;
}

extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));
}

unsigned* ordered(unsigned count, Order order) {
    unsigned* list = static_cast<unsigned*>(malloc(count * sizeof(unsigned)));
    for (unsigned i = 0; i < count; ++i) list[i] = order == REVERSE ? count - 1 - i : i;
    if (order == SHUFFLED) {
        unsigned long long state = 88172645463325252ull;  // xorshift64: the same order each time
        for (unsigned i = count; i > 1; --i) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            const unsigned other = unsigned(state % i), kept = list[i - 1];
            list[i - 1] = list[other], list[other] = kept;
        }
    }
    return list;
}

void set_launch(unsigned blocks, unsigned long dynamic_shared_bytes) {
    gridDim = {blocks, 1, 1};
    blockDim = {unsigned(emulated_threads), 1, 1};
    thread_count = unsigned(emulated_threads) * unsigned(emulated_cluster);
    shared_bytes = dynamic_shared_bytes;
    threads = static_cast<Thread*>(calloc(thread_count, sizeof(Thread)));
    warps = static_cast<Warp*>(calloc(thread_count / emulated_warp_size + 1, sizeof(Warp)));
    if (emulated_cluster > MAX_CLUSTER || blocks % emulated_cluster)
        emulated_error("%u blocks are not launched in clusters of %d", blocks, emulated_cluster);
    if (emulated_cluster > 1 && __start_emulated_shared != __stop_emulated_shared)
        emulated_error("blocks of a cluster have only dynamic shared memory here");
    for (int rank = 0; rank < emulated_cluster; ++rank) dynamic_shared[rank] = static_cast<char*>(malloc(shared_bytes));
    const size_t step = STACK_BYTES + GUARD_BYTES;
    stacks = static_cast<char*>(mmap(nullptr, thread_count * step, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) emulated_error("there is no memory for %u stacks", thread_count);
    for (unsigned i = 0; i < thread_count; ++i) mprotect(stacks + i * step, GUARD_BYTES, PROT_NONE);
}

void run_cluster(unsigned index, Order order, bool programmatic, const void* params) {
    kernel_params = params;
    for (Barrier& barrier : barriers) barrier = {0, 0};
    memset(warps, 0, (thread_count / emulated_warp_size + 1) * sizeof(Warp));
    // Shared memory starts as NaN: what is read before it is written shows.
    for (char* byte = __start_emulated_shared; byte < __stop_emulated_shared; ++byte) *byte = char(0xff);
    for (int rank = 0; rank < emulated_cluster; ++rank)
        for (unsigned long i = 0; i < shared_bytes; ++i) dynamic_shared[rank][i] = char(0xff);
    for (unsigned i = 0; i < thread_count; ++i) {
        threads[i].state = READY;
        threads[i].has_access = !programmatic;
        prepare(threads[i].context, stacks + i * (STACK_BYTES + GUARD_BYTES) + GUARD_BYTES, thread_main);
    }
    unsigned* turns = ordered(thread_count, order);
    bool progress = true;
    while (progress) {
        progress = false;
        for (int access = programmatic ? 0 : 1; access < 2; ++access) {
            set_access(access == 1);
            for (unsigned i = 0; i < thread_count; ++i) {
                Thread& thread = threads[current = turns[i]];
                if (thread.state != READY || thread.has_access != (access == 1)) continue;
                threadIdx = {current % unsigned(emulated_threads), 0, 0};
                blockIdx = {index + block_in_cluster(), 0, 0};
                switch_context(scheduler, thread.context);
                progress = true;
            }
        }
    }
    free(turns);
    for (unsigned i = 0; i < thread_count; ++i)
        if (threads[i].state != ENDED) report_standstill();
}
