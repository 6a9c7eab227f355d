// mla_q_absorb_rope_kv_cache: takes each head's q_nope [T, QK_NOPE] to the latent space, by its W_UK [QK_NOPE, NOPE], lays it
// beside the rotated q_pe, and does the rest of mla_rope_kv_cache_cat as well, in one launch.
//
// The first blocks multiply, the others have units of mla_rope.cuh; both write into the same rows of the query. Each warp of
// a block that multiplies has 64 columns of a head, all of QK_NOPE for them in registers, while the block's TOKENS tokens pass
// by, 16 at a time. So operands go from global memory into registers, as tensor cores want them, and sums from there to the
// query: no barrier, no shared memory.
//
// Constants of the problem: those of mla_rope.cuh, QK_NOPE, and W_CONSTANT (no kernel that may still be running writes W_UK).
// Tunables: those of mla_rope.cuh, of which THREADS is also the size of a block that multiplies, PDL 2 lets the next kernel
// start when the first loads are on their way, and PREFETCH also stands for pulling W_UK into L2 while waiting; and
//   TOKENS    per block that multiplies: W_UK is read less often, fewer blocks
//   EARLY     with PDL and W_CONSTANT: blocks load W_UK while they wait
#define COPY_Q_NOPE 0
#include "mla_rope.cuh"
#include "mma.cuh"

struct Params {
    RopeParams rope;
    const Element* w;
    i64 w_head, w_row;  // strides, in elements
};

typedef WarpProduct<Element> Product;

constexpr int STEPS = QK_NOPE / Product::DEPTH;
constexpr int COLUMNS = THREADS / WARP_SIZE * Product::COLUMNS;  // of a block
constexpr int SHARERS = NOPE / COLUMNS;                          // blocks that share a head's columns
constexpr int TILE = Product::ROWS;

static_assert(QK_NOPE % Product::DEPTH == 0 && NOPE % COLUMNS == 0 && TOKENS % TILE == 0, "whole tiles");
static_assert(Q_ROW * (Q_FP8 ? 1 : int(sizeof(Element))) % 16 == 0, "rows of the query begin where 16 bytes may");
static_assert(!EARLY || (PDL && W_CONSTANT), "what is read early is there");

// A lane's part of W_UK: all of QK_NOPE, for the warp's columns.
struct Weights {
    Product::WVector rows[STEPS][Product::LANE_DEPTH];

    __device__ __forceinline__ void load(const Element* from, i64 row) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
#pragma unroll
            for (int i = 0; i < Product::LANE_DEPTH; ++i) rows[s][i].load(from + (s * Product::DEPTH + i) * row);
        }
    }
};

// A lane's part of a tile of q_nope.
struct Queries {
    Product::XVector rows[STEPS][Product::LANE_ROWS];

    // `count`: of the tile's rows, how many are tokens.
    __device__ __forceinline__ void load(const Element* tile, i64 row, int count) {
#pragma unroll
        for (int i = 0; i < Product::LANE_ROWS; ++i) {
            const bool exists = Product::row(i) < count;
            const Element* const from = tile + Product::row(i) * row + Product::depth();
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                rows[s][i].raw = Product::XVector::Raw{};
                if (exists) rows[s][i].load(from + s * Product::DEPTH);
            }
        }
    }
};

// Sums of one row of a tile, from the lane's first column on.
__device__ __forceinline__ void store_sums(const RopeParams& p, i64 to, const float (&sums)[Product::LANE_COLUMNS],
                                           const Fp8Scale& scale) {
#pragma unroll
    for (int begin = 0; begin < Product::LANE_COLUMNS; begin += 8) {
        float values[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) values[e] = sums[begin + e];
        Vector<Element, 16> rounded;
        rounded.pack(values);
        if constexpr (Q_FP8) {
            rounded.unpack(values);
            scale.divide(values);
            Fp8<8, 8>::store(static_cast<unsigned char*>(p.q_out) + to + begin, values);
        } else {
            rounded.store(static_cast<Element*>(p.q_out) + to + begin);
        }
    }
}

// What block `block` of those that multiply does.
__device__ __forceinline__ void multiply(const Params& p, u32 block) {
    const int sharer = int(block % SHARERS), head = int(block / SHARERS % HEADS);
    const i64 first = i64(block / (SHARERS * HEADS)) * TOKENS;
    const int left = int(p.rope.tokens - first), tokens = left < TOKENS ? left : TOKENS;
    const int column = sharer * COLUMNS + warp_uniform(threadIdx.x / WARP_SIZE) * Product::COLUMNS;
    const Element* const w = p.w + head * p.w_head + Product::depth() * p.w_row + column + Product::w_column();
    const i64 row = p.rope.q_nope_token;
    const Element* x = p.rope.q_nope + first * row + head * p.rope.q_nope_head;
    Weights weights;
    if (EARLY) weights.load(w, p.w_row);
    if (PDL) {
        if (!EARLY && PREFETCH) {
            constexpr int LINE = 64;  // elements of 128 bytes
            const Element* const from = p.w + head * p.w_head + sharer * COLUMNS;
            for (int i = threadIdx.x; i < QK_NOPE * (COLUMNS / LINE); i += THREADS)
                prefetch_line_to_l2(from + i / (COLUMNS / LINE) * p.w_row + i % (COLUMNS / LINE) * LINE);
        }
        wait_for_previous_kernel();
    }
    if (!EARLY) weights.load(w, p.w_row);
    Queries queries;
    queries.load(x, row, tokens);
    const float q_scale = Q_FP8 ? *p.rope.q_scale : 1.f;
    if (PDL == 2) let_next_kernel_start();
    const Fp8Scale scale(q_scale);

    Product product;
#pragma unroll 1
    for (int tile = 0; tile < tokens; tile += TILE) {
        product.clear();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) product.add(queries.rows[s], Product::W(weights.rows[s]));
        x += TILE * row;
        if (tile + TILE < tokens) queries.load(x, row, tokens - tile - TILE);
#pragma unroll
        for (int i = 0; i < Product::LANE_ROWS; ++i) {
            const i64 token = first + tile + Product::row(i);
            if (tile + Product::row(i) < tokens)
                store_sums(p.rope, (token * HEADS + head) * Q_ROW + column + Product::column(), product.sums[i], scale);
        }
    }
}

extern "C" __global__ void ALL_REGISTERS(THREADS) mla_q_absorb_rope_kv_cache(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const u32 multipliers = u32((p.rope.tokens + TOKENS - 1) / TOKENS) * (HEADS * SHARERS);
    if (blockIdx.x < multipliers) {
        multiply(p, blockIdx.x);
    } else {
        rope_block(p.rope, blockIdx.x - multipliers);
    }
}
