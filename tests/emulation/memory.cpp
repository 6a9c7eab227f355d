// Reads one launch from standard input, runs it in several orders of blocks, and writes to standard output what it
// wrote. The format is emulator.py's. Exit code 3 and a line on standard error: the kernel did something wrong.
//
// Each tensor is an allocation of its own that ends where the tensor ends; AddressSanitizer guards what lies around it
// and between its rows. Each block starts from the same memory, so what it wrote is what differs afterwards; the poison
// of results changes from one order to the next, so that a write of the poison's own value does not hide twice.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "scheduler.h"

extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);

struct Index {
    unsigned x, y, z;
};
extern Index blockIdx, threadIdx;
long long emulated_early_read(const long long* address);
void __asan_on_error() { fprintf(stderr, "emulation: block %u, thread %u\n", blockIdx.x, threadIdx.x); }
}

namespace {

typedef long long i64;
typedef unsigned char Byte;

enum Role { INPUT, IN_PLACE, RESULT };

struct Segment {
    i64 offset, bytes;
};

struct Region {
    i64 role, index, skew, constant, bytes, segment_count;
    Segment* segments;
    Byte* start;     // of the tensor
    Byte* original;  // what each block starts from
    Byte* written;   // what the blocks of this order wrote
    Byte* earlier;   // and those of the order before
    int* owner;      // the block that wrote a byte; -1: none
    bool* covered;   // some order showed that the byte is written
};

Region* regions;
i64 region_count;
bool access_granted = true;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "emulation: ");
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    exit(3);
}

void read_bytes(void* to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) fail("the launch on standard input is cut short");
}
i64 read_number() {
    i64 value;
    read_bytes(&value, sizeof value);
    return value;
}

const char* role_name(const Region& region) {
    return region.role == RESULT ? "result" : region.role == INPUT ? "input" : "in-place argument";
}

void read_region(Region& region) {
    region.role = read_number(), region.index = read_number(), region.skew = read_number(), region.constant = read_number();
    region.bytes = read_number(), region.segment_count = read_number();
    region.segments = static_cast<Segment*>(malloc(region.segment_count * sizeof(Segment)));
    read_bytes(region.segments, region.segment_count * sizeof(Segment));
    void* allocation;
    if (posix_memalign(&allocation, 256, region.skew + region.bytes)) fail("there is no memory");
    region.start = static_cast<Byte*>(allocation) + region.skew;
    region.original = static_cast<Byte*>(calloc(1, region.bytes + 1));
    if (region.role != RESULT) read_bytes(region.original, region.bytes);
    memcpy(region.start, region.original, region.bytes);
    region.written = static_cast<Byte*>(malloc(region.bytes + 1));
    region.earlier = static_cast<Byte*>(malloc(region.bytes + 1));
    region.owner = static_cast<int*>(malloc((region.bytes + 1) * sizeof(int)));
    region.covered = static_cast<bool*>(calloc(region.bytes + 1, 1));
    __asan_poison_memory_region(allocation, region.skew + region.bytes);
    for (i64 s = 0; s < region.segment_count; ++s)
        __asan_unpoison_memory_region(region.start + region.segments[s].offset, region.segments[s].bytes);
}

void begin_order(Region& region, Byte poison) {
    if (region.role == INPUT) return;
    for (i64 i = 0; i < region.bytes; ++i) {
        if (region.role == RESULT) region.original[i] = poison;
        region.start[i] = region.written[i] = region.original[i];
        region.owner[i] = -1;
    }
}

void check_unchanged(const Region& region) {
    for (i64 i = 0; region.role == INPUT && i < region.bytes; ++i)
        if (region.start[i] != region.original[i]) fail("byte %lld of input %lld was changed", i, region.index);
}

// Most blocks write little of what there is: chunks that are as they were cost next to nothing.
constexpr i64 CHUNK = 256;
bool same_chunk(const Byte* a, const Byte* b) {
    i64 difference = 0;
    for (i64 i = 0; i < CHUNK; i += sizeof(i64)) {
        i64 x, y;
        __builtin_memcpy(&x, a + i, sizeof x);
        __builtin_memcpy(&y, b + i, sizeof y);
        difference |= x ^ y;
    }
    return difference == 0;
}

void collect_writes(Region& region, int block) {
    if (region.role == INPUT) return;
    for (i64 i = 0; i < region.bytes; ++i) {
        if (i % CHUNK == 0)
            while (i + CHUNK <= region.bytes && same_chunk(region.start + i, region.original + i)) i += CHUNK;
        if (i == region.bytes || region.start[i] == region.original[i]) continue;
        if (region.owner[i] >= 0)
            fail("byte %lld of %s %lld was written by block %d and by block %d", i, role_name(region), region.index,
                 region.owner[i], block);
        region.owner[i] = block;
        region.covered[i] = true;
        region.written[i] = region.start[i];
        region.start[i] = region.original[i];
    }
}

void check_coverage(const Region& region) {
    if (region.role != RESULT) return;
    i64 missing = 0, first = -1;
    for (i64 g = region.segment_count - 1; g >= 0; --g)
        for (i64 i = region.segments[g].offset + region.segments[g].bytes - 1; i >= region.segments[g].offset; --i)
            if (!region.covered[i]) ++missing, first = i;
    if (missing)
        fail("%lld of %lld bytes of result %lld were not written, the first is byte %lld", missing, region.bytes,
             region.index, first);
}

void check_same(const Region& region) {
    if (region.role == INPUT) return;
    for (i64 i = 0; i < region.bytes; ++i) {
        if (region.role == RESULT && !region.covered[i]) region.written[i] = region.earlier[i];  // unwritten so far
        if (region.written[i] != region.earlier[i])
            fail("byte %lld of %s %lld depends on the order of blocks or threads", i, role_name(region), region.index);
    }
}

}  // namespace

void set_access(bool granted) {
    if (granted == access_granted) return;
    access_granted = granted;
    auto* change = granted ? __asan_unpoison_memory_region : __asan_poison_memory_region;
    for (i64 r = 0; r < region_count; ++r)
        for (i64 s = 0; !regions[r].constant && s < regions[r].segment_count; ++s)
            change(regions[r].start + regions[r].segments[s].offset, regions[r].segments[s].bytes);
}

long long emulated_early_read(const long long* address) {
    const Byte* at = reinterpret_cast<const Byte*>(address);
    for (i64 r = 0; r < region_count; ++r)
        for (i64 s = 0; s < regions[r].segment_count; ++s) {
            const Byte* start = regions[r].start + regions[r].segments[s].offset;
            if (at < start || at + sizeof *address > start + regions[r].segments[s].bytes) continue;
            const i64 word = (at - regions[r].start) / i64(sizeof *address) % 4;
            return word == 1 ? ~*address : word == 2 ? 0x5a5a5a5a5a5a5a5a : *address;
        }
    emulated_error("an early read is outside every tensor");
}

int main() {
    const i64 blocks = read_number(), threads = read_number();  // 0: as many as the kernel says, at another warp width
    const i64 shared_bytes = read_number(), programmatic = read_number();
    const i64 params_bytes = read_number(), pointer_count = read_number();
    region_count = read_number();
    const i64 order_count = read_number();
    if (params_bytes > i64(emulated_params_bytes) || params_bytes <= i64(emulated_params_bytes) - 8)
        fail("Params has %lu bytes in the kernel, %lld in its params_format", emulated_params_bytes, params_bytes);
    if (threads && threads != emulated_threads)
        fail("a block has %d threads in the kernel, %lld in its spec", emulated_threads, threads);
    Byte* params = static_cast<Byte*>(calloc(1, emulated_params_bytes));
    read_bytes(params, params_bytes);
    i64* pointers = static_cast<i64*>(malloc((2 * pointer_count + 1) * sizeof(i64)));  // (offset in params, region)
    read_bytes(pointers, 2 * pointer_count * sizeof(i64));
    regions = static_cast<Region*>(calloc(region_count + 1, sizeof(Region)));
    for (i64 r = 0; r < region_count; ++r) read_region(regions[r]);
    for (i64 p = 0; p < pointer_count; ++p)
        memcpy(params + pointers[2 * p], &regions[pointers[2 * p + 1]].start, sizeof(Byte*));

    set_launch(unsigned(blocks), shared_bytes);
    const unsigned clusters = unsigned(blocks / emulated_cluster);
    for (i64 pass = 0; pass < order_count; ++pass) {
        const Order order = Order(read_number());
        const Byte poison = Byte(read_number());
        for (i64 r = 0; r < region_count; ++r) begin_order(regions[r], poison);
        unsigned* list = ordered(clusters, order);
        for (unsigned c = 0; c < clusters; ++c) {
            const unsigned block = list[c] * unsigned(emulated_cluster);
            run_cluster(block, order, programmatic != 0, params);
            for (i64 r = 0; r < region_count; ++r) collect_writes(regions[r], int(block));
        }
        for (i64 r = 0; r < region_count; ++r) check_unchanged(regions[r]);
        free(list);
        // Unwritten bytes show as poison, which differs: say that they are unwritten, not that they differ.
        if (pass + 1 == order_count)
            for (i64 r = 0; r < region_count; ++r) check_coverage(regions[r]);
        for (i64 r = 0; r < region_count; ++r) {
            Region& region = regions[r];
            if (pass > 0) check_same(region);
            Byte* kept = region.earlier;
            region.earlier = region.written, region.written = kept;
        }
    }
    for (i64 r = 0; r < region_count; ++r)
        if (regions[r].role != INPUT) fwrite(regions[r].earlier, 1, regions[r].bytes, stdout);
    return fflush(stdout) ? 4 : 0;
}
