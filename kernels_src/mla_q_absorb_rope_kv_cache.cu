// mla_q_absorb_rope_kv_cache: takes each head's q_nope [T, QK_NOPE] to the latent space, by its W_UK [QK_NOPE, NOPE], lays it
// beside the rotated q_pe, and does the rest of mla_rope_kv_cache_cat as well, in one launch.
//
// The first blocks multiply, the others have units of mla_rope.cuh; both write into the same rows of the query. A block that
// multiplies takes some tokens of a head by some of its columns. Two kernels:
//
// STAGED 0: each warp has 64 columns, all of QK_NOPE for them in registers, while the block's tokens pass by, 16 at a time. So
// operands go from global memory into registers, as tensor cores want them, and sums from there to the query: no barrier, no
// shared memory.
// STAGED 1: operands pass through shared memory. Each warpgroup has 64 tokens at a time, all share W_UK. Where TOKENS is more
// than that, W_UK stays there while the tokens pass by in rounds: the next round's come while this one's are multiplied and
// stored.
//
// Constants of the problem: those of mla_rope.cuh, QK_NOPE, and W_CONSTANT (no kernel that may still be running writes W_UK).
// Tunables: those of mla_rope.cuh, of which THREADS is also the size of a block that multiplies, PDL 2 lets the next kernel
// start when the first loads are on their way, and PREFETCH also stands for pulling W_UK into L2 while waiting; and
//   STAGED    which kernel
//   TOKENS    per block: W_UK is read less often, fewer blocks
//   W_COLUMNS STAGED 1: per block: q_nope is read less often, fewer blocks. STAGED 0: 64 for each warp, whatever it says
//   EARLY     with PDL and W_CONSTANT: blocks load W_UK while they wait
#define COPY_Q_NOPE 0
#include "mla_rope.cuh"
#include "mma.cuh"

struct Params {
    RopeParams rope;
    const Element* w;
    i64 w_head, w_row;  // strides, in elements
};

// Of a block that multiplies.
constexpr int BLOCK_COLUMNS = STAGED ? W_COLUMNS : THREADS / WARP_SIZE * 64;
constexpr int SHARERS = NOPE / BLOCK_COLUMNS;  // blocks that share a head's columns

static_assert(NOPE % BLOCK_COLUMNS == 0, "whole blocks");
static_assert(Q_ROW * (Q_FP8 ? 1 : int(sizeof(Element))) % 16 == 0, "rows of the query begin where 16 bytes may");
static_assert(!EARLY || (PDL && W_CONSTANT), "what is read early is there");

// A block's place in the product.
struct Place {
    int column, head;  // its first column
    i64 first;         // token
    int tokens;        // that there are, of TOKENS

    __device__ __forceinline__ Place(const RopeParams& p, u32 block)
        : column(int(block % SHARERS) * BLOCK_COLUMNS),
          head(int(block / SHARERS % HEADS)),
          first(i64(block / (SHARERS * HEADS)) * TOKENS) {
        const int left = int(p.tokens - first);
        tokens = left < TOKENS ? left : TOKENS;
    }

    __device__ __forceinline__ const Element* weights(const Params& p) const { return p.w + head * p.w_head + column; }
    __device__ __forceinline__ const Element* queries(const RopeParams& p) const {
        return p.q_nope + first * p.q_nope_token + head * p.q_nope_head;
    }
};

// While the block waits.
__device__ __forceinline__ void prefetch_weights(const Params& p, const Place& at) {
    constexpr int LINE = 64, LINES = (BLOCK_COLUMNS + LINE - 1) / LINE;  // of 64 elements
    if (EARLY || !PREFETCH) return;
    for (int i = threadIdx.x; i < QK_NOPE * LINES; i += THREADS)
        prefetch_line_to_l2(at.weights(p) + i / LINES * p.w_row + i % LINES * LINE);
}

// Eight columns of the block's token `token`, from the block's column `column` on.
__device__ __forceinline__ void store_product(const RopeParams& p, const Place& at, int token, int column,
                                              const Vector<Element, 16>& values, const Fp8Scale& scale) {
    const i64 to = ((at.first + token) * HEADS + at.head) * Q_ROW + at.column + column;
    if constexpr (Q_FP8) {
        float quotients[8];
        values.unpack(quotients);
        scale.divide(quotients);
        Fp8<8, 8>::store(static_cast<unsigned char*>(p.q_out) + to, quotients);
    } else {
        values.store(static_cast<Element*>(p.q_out) + to);
    }
}

#if !STAGED

typedef WarpProduct<Element> Product;

constexpr int STEPS = QK_NOPE / Product::DEPTH;
constexpr int TILE = Product::ROWS;

static_assert(QK_NOPE % Product::DEPTH == 0 && TOKENS % TILE == 0, "whole tiles");

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

__device__ __forceinline__ void multiply(const Params& p, u32 block) {
    const Place at(p.rope, block);
    const int column = warp_uniform(threadIdx.x / WARP_SIZE) * Product::COLUMNS;
    const Element* const w = at.weights(p) + Product::depth() * p.w_row + column + Product::w_column();
    const i64 row = p.rope.q_nope_token;
    const Element* x = at.queries(p.rope);
    Weights weights;
    if (EARLY) weights.load(w, p.w_row);
    if (PDL) {
        prefetch_weights(p, at);
        wait_for_previous_kernel();
    }
    if (!EARLY) weights.load(w, p.w_row);
    Queries queries;
    queries.load(x, row, at.tokens);
    const float q_scale = Q_FP8 ? *p.rope.q_scale : 1.f;
    if (PDL == 2) let_next_kernel_start();
    const Fp8Scale scale(q_scale);

    Product product;
#pragma unroll 1
    for (int tile = 0; tile < at.tokens; tile += TILE) {
        product.clear();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) product.add(queries.rows[s], Product::W(weights.rows[s]));
        x += TILE * row;
        if (tile + TILE < at.tokens) queries.load(x, row, at.tokens - tile - TILE);
#pragma unroll
        for (int i = 0; i < Product::LANE_ROWS; ++i) {
            const int token = tile + Product::row(i);
            if (token >= at.tokens) continue;
#pragma unroll
            for (int c = 0; c < Product::LANE_COLUMNS; c += 8) {
                float values[8];
#pragma unroll
                for (int e = 0; e < 8; ++e) values[e] = product.sums[i][c + e];
                Vector<Element, 16> rounded;
                rounded.pack(values);
                store_product(p.rope, at, token, column + Product::column() + c, rounded, scale);
            }
        }
    }
}

#else

typedef WarpgroupProduct<Element, BLOCK_COLUMNS < 128 ? BLOCK_COLUMNS : 128> Product;

constexpr int WARPGROUP = 128, WARPGROUPS = THREADS / WARPGROUP;
constexpr int ROUND = WARPGROUPS * Product::ROWS, ROUNDS = TOKENS / ROUND;  // tokens; their number
constexpr int BUFFERS = ROUNDS > 1 ? 2 : 1;                                // of a warpgroup's q_nope
constexpr int TILES = QK_NOPE / Product::DEPTH;
constexpr int W_TILES_BYTES = TILES * Product::W_BYTES, X_TILES_BYTES = TILES * Product::X_TILE_BYTES;
constexpr int PARTS = BLOCK_COLUMNS / Product::COLUMNS;  // of the columns, one after the other

static_assert(WARP_SIZE == 32, "warpgroups have 32 lanes a warp");
static_assert(QK_NOPE % Product::DEPTH == 0 && THREADS % WARPGROUP == 0 && TOKENS % ROUND == 0, "whole tiles");

// The thread's share of the block's W_UK.
__device__ __forceinline__ void copy_weights(const Params& p, const Place& at, u8* tiles) {
    constexpr int PIECES = BLOCK_COLUMNS / 8, PART_PIECES = Product::COLUMNS / 8;  // of 16 bytes, in a row
    constexpr int TILE_PIECES = Product::W_ROW_BYTES / 16;
    static_assert(QK_NOPE * PIECES % THREADS == 0, "as many for each thread");
#pragma unroll
    for (int i = 0; i < QK_NOPE * PIECES / THREADS; ++i) {
        const int number = i * THREADS + threadIdx.x, row = number / PIECES, piece = number % PIECES;
        const int part = piece / PART_PIECES, tile_of_part = piece % PART_PIECES / TILE_PIECES;
        u8* const tile = tiles + part * W_TILES_BYTES + row / TILE_ROWS * Product::W_BYTES + tile_of_part * Product::W_TILE_BYTES;
        copy_async(tile + tile_offset<Product::W_ROW_BYTES>(row % TILE_ROWS, piece % TILE_PIECES),
                   at.weights(p) + row * p.w_row + piece * 8);
    }
}

// The thread's share of its warpgroup's rows of q_nope, of which there are `rows`. What is in the place of others only makes
// for sums that nobody reads.
__device__ __forceinline__ void copy_queries(const Element* from, i64 stride, int rows, u8* tiles) {
    constexpr int PIECES = QK_NOPE / 8, TILE_PIECES = Product::X_ROW_BYTES / 16;
#pragma unroll
    for (int i = 0; i < TILE_ROWS * PIECES / WARPGROUP; ++i) {
        const int number = i * WARPGROUP + threadIdx.x % WARPGROUP, row = number / PIECES, piece = number % PIECES;
        u8* const tile = tiles + piece / TILE_PIECES * Product::X_TILE_BYTES;
        if (row < rows)
            copy_async(tile + tile_offset<Product::X_ROW_BYTES>(row, piece % TILE_PIECES), from + row * stride + piece * 8);
    }
}

__device__ __forceinline__ void multiply(const Params& p, u32 block) {
    const Place at(p.rope, block);
    const int warpgroup = WARPGROUPS == 1 ? 0 : int(shuffle(threadIdx.x / WARPGROUP, 0));  // the same for all of a warp
    u8* const w_tiles = dynamic_shared();
    u8* const x_tiles = w_tiles + PARTS * W_TILES_BYTES + warpgroup * BUFFERS * X_TILES_BYTES;
    // The warpgroup's rows of a round, as a group of copies that is empty where there are none.
    const auto load_round = [&](int round) {
        const int first = round * ROUND + warpgroup * Product::ROWS;
        if (round < ROUNDS)
            copy_queries(at.queries(p.rope) + first * p.rope.q_nope_token, p.rope.q_nope_token, at.tokens - first,
                         x_tiles + round % BUFFERS * X_TILES_BYTES);
        commit_copies();
    };
    if (EARLY) copy_weights(p, at, w_tiles);
    if (PDL) {
        prefetch_weights(p, at);
        wait_for_previous_kernel();
    }
    if (!EARLY) copy_weights(p, at, w_tiles);
    load_round(0);
    const float q_scale = Q_FP8 ? *p.rope.q_scale : 1.f;
    if (PDL == 2) let_next_kernel_start();
    const Fp8Scale scale(q_scale);

#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
        const int first = round * ROUND + warpgroup * Product::ROWS;
        if (round > 0 && first >= at.tokens) break;  // in the first round, a warpgroup without tokens has loaded some of W_UK
        wait_for_copies<0>();
        // Now this round's rows are there, and those of the one before are free, as far as this thread knows.
        if (round == 0) {
            __syncthreads();
        } else {
            sync_team(1 + warpgroup, WARPGROUP);
        }
        if (BUFFERS > 1) load_round(round + 1);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            Product product;
            product.template add<TILES>(x_tiles + round % BUFFERS * X_TILES_BYTES, w_tiles + part * W_TILES_BYTES, true);
            Product::wait();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = first + Product::row(i);
#pragma unroll
                for (int c = 0; c < Product::COLUMNS / 8; c += 4) {
                    Vector<Element, 16> rounded;
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        rounded.words[e] =
                            Pair<Element>::pack(product.sums[4 * (c + e) + 2 * i], product.sums[4 * (c + e) + 2 * i + 1]);
                    transpose(rounded.words);  // now all lanes' pairs of one of the eights of columns
                    if (token < at.tokens)
                        store_product(p.rope, at, token, part * Product::COLUMNS + (c + threadIdx.x % 4) * 8, rounded, scale);
                }
            }
        }
    }
}

#endif

extern "C" __global__ void ALL_REGISTERS(THREADS) mla_q_absorb_rope_kv_cache(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const u32 multipliers = u32((p.rope.tokens + TOKENS - 1) / TOKENS) * (HEADS * SHARERS);
    if (blockIdx.x < multipliers) {
        multiply(p, blockIdx.x);
    } else {
        rope_block(p.rope, blockIdx.x - multipliers);
    }
}
