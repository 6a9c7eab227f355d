// mla_v_up_quant: attention's output, o_latent [T, HEADS, LATENT], times each head's W_UV [LATENT, V_DIM], rounded to ELEMENT
// and quantised, in one launch. See autofuse/ops/quant.py for the formats.
//
// A block takes TOKENS tokens of a head. Two kernels:
//
// STAGED 0: operands go from global memory into registers, as tensor cores want them. A block's warps have shares of the
// columns (64 each), of the tokens (16 · TILES each) and of LATENT (WARPS); their sums meet in shared memory.
// STAGED 1: operands pass through shared memory, STAGES steps of 64 · TILES of LATENT, and are multiplied by WARPS warpgroups of
// 64 tokens. Where TOKENS is more than that, W_UV stays in shared memory while the tokens pass by in rounds: each byte of
// o_latent crosses memory once, W_UV once per block; and a round's sums, in registers, are quantised while the next one's
// operands come. CLUSTER blocks may share a head's columns; they tell each other the largest values of a row.
//
// Constants of the problem: ELEMENT (bf16, fp16), HEADS, LATENT, V_DIM, GROUP, UE8M0, SCALE_LAYOUT (see quant.cuh), W_CONSTANT
// (no kernel that may still be running writes W_UV).
// Tunables:
//   STAGED    which kernel
//   TOKENS    per block: W_UV is read less often, fewer blocks
//   WARPS     STAGED 0: warps that share LATENT: more loads in flight, more sums to add. STAGED 1: warpgroups
//   TILES     STAGED 0: tiles of 16 tokens of a warp, for which it loads W_UV once. STAGED 1: times 64 of LATENT in a step: fewer
//             steps and longer stretches of memory, fewer stages
//   STAGES    STAGED 0: times 32 of LATENT that a warp loads ahead, in registers. STAGED 1: steps
//   CLUSTER   STAGED 1: blocks that share the columns (sm_90 and later; elsewhere one has them all, if it must know all of a
//             group). STAGED 0: 1
//   PDL       programmatic dependent launch: 0 no; let the next kernel start 1: at once, 2: when the first loads are on their
//             way, 3: when the products are done
//   PREFETCH  with PDL: blocks pull into L2 while they wait 1: their W_UV, 2: their o_latent as well
//   EARLY     with PDL and W_CONSTANT: blocks load W_UV while they wait, as much of it as they have stages for
#include "mma.cuh"
#include "quant.cuh"

typedef ELEMENT Element;

struct Params {
    const Element* x;  // o_latent
    const Element* w;
    const float* scale;  // static FP8 and NVFP4
    u8* values;
    void* scales;
    i64 x_token, x_head;  // strides, in elements
    i64 w_head, w_row;
    int tokens;
};

constexpr int WIDTH = HEADS * V_DIM;
#if HAVE_CLUSTERS
constexpr int SHARERS = CLUSTER;  // of the columns
#else
constexpr int SHARERS = GROUP > V_DIM / CLUSTER ? 1 : CLUSTER;
#endif
constexpr int COLUMNS = V_DIM / SHARERS;                          // of a block
constexpr int PARTNERS = GROUP > COLUMNS ? GROUP / COLUMNS : 1;  // blocks that have a group together
#define BLOCKS_PER_CLUSTER PARTNERS

static_assert(!EARLY || (PDL && W_CONSTANT), "what is read early is there");
static_assert(V_DIM % SHARERS == 0 && (GROUP == 0 || GROUP % COLUMNS == 0 || COLUMNS % GROUP == 0), "whole groups, or shares");

// A block's place in the grid.
struct Place {
    int rank, head, first_token;

    __device__ __forceinline__ Place()
        : rank(blockIdx.x % CLUSTER), head(blockIdx.x / CLUSTER % HEADS), first_token(blockIdx.x / (CLUSTER * HEADS) * TOKENS) {}

    // Of the block's rows from `first` on, how many of `most` are tokens.
    __device__ __forceinline__ int rows(int tokens, int first, int most) const {
        const int all = tokens - first_token, left = (all < TOKENS ? all : TOKENS) - first;
        return left < 0 ? 0 : left < most ? left : most;
    }
};

// Pulls `rows` rows of so many elements into L2.
template <int ELEMENTS>
__device__ __forceinline__ void prefetch_rows(const Element* from, i64 stride, int rows, int threads) {
    constexpr int LINE = 64, LINES = (ELEMENTS + LINE - 1) / LINE;
    if (stride == ELEMENTS) {
        prefetch_block_to_l2(from, rows * ELEMENTS * int(sizeof(Element)), threads);
    } else {
        for (int i = threadIdx.x; i < rows * LINES; i += threads)
            prefetch_line_to_l2(from + i / LINES * stride + i % LINES * LINE);
    }
}

// W_UV: blocks that share the columns have a part of its rows each.
__device__ __forceinline__ void prefetch(const Params& p, const Place& at, int rows, int threads) {
    constexpr int SHARE = (LATENT + SHARERS - 1) / SHARERS;
    const int first = at.rank * SHARE, left = LATENT - first;
    if (PREFETCH && left > 0)
        prefetch_rows<V_DIM>(p.w + at.head * p.w_head + first * p.w_row, p.w_row, left < SHARE ? left : SHARE, threads);
    if (PREFETCH == 2 && at.rank == 0)
        prefetch_rows<LATENT>(p.x + at.first_token * p.x_token + at.head * p.x_head, p.x_token, at.rows(p.tokens, 0, rows),
                              threads);
}

// NVFP4: a share of the padding by each block.
__device__ __forceinline__ void zero_padding(const Params& p, const Place& at, int threads) {
    if (GROUP == 16) {
        const int block = blockIdx.x / CLUSTER * SHARERS + at.rank, tiles = (p.tokens + TOKENS - 1) / TOKENS;
        zero_padded_scales(static_cast<u8*>(p.scales), p.tokens, WIDTH / 16, i64(block) * threads + threadIdx.x,
                           i64(tiles) * (HEADS * SHARERS * threads));
    }
}

#if !STAGED

typedef WarpProduct<Element> Product;

constexpr int COLUMN_WARPS = V_DIM / Product::COLUMNS;
constexpr int TOKEN_WARPS = TOKENS / (TILES * Product::ROWS);
constexpr int THREADS = COLUMN_WARPS * TOKEN_WARPS * WARPS * WARP_SIZE;
constexpr int STEP = WARPS * Product::DEPTH;  // of LATENT, of all warps
constexpr int STEPS = LATENT / STEP;
constexpr int SUMS_ROW = V_DIM + 8;  // floats of a row of sums in shared memory: rows begin in different banks

static_assert(V_DIM % Product::COLUMNS == 0 && TOKENS % (TILES * Product::ROWS) == 0, "whole tiles");
static_assert(LATENT % STEP == 0 && STEPS % STAGES == 0 && CLUSTER == 1, "whole steps");

// Where a lane's part of x begins, in one of its rows.
struct XRow {
    i64 at;  // of x
    bool exists;
};

// What a lane has of one step: 32 of LATENT.
struct Step {
    Product::WVector w[Product::LANE_DEPTH];
    Product::XVector x[TILES][Product::LANE_ROWS];

    __device__ __forceinline__ void load_w(const Params& p, i64 w_at, int depth) {
        const Element* from = p.w + w_at + depth * p.w_row;
#pragma unroll
        for (int i = 0; i < Product::LANE_DEPTH; ++i, from += p.w_row) w[i].load(from);
    }
    __device__ __forceinline__ void load_x(const Params& p, const XRow (&x_rows)[TILES][Product::LANE_ROWS], int depth) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < Product::LANE_ROWS; ++i) {
                x[t][i].raw = Product::XVector::Raw{};
                if (x_rows[t][i].exists) x[t][i].load(p.x + x_rows[t][i].at + depth);
            }
        }
    }
};

// Adds up the sums [WARPS, TOKENS, SUMS_ROW] of warps that share LATENT, and quantises the rows.
__device__ __forceinline__ void quantise(const Params& p, const Place& at, const float* sums) {
    constexpr int LANES = GROUP ? GROUP / 8 : 1;  // of a unit
    typedef Quantiser<Element, WIDTH, 1, LANES> Units;
    constexpr int VECTORS = V_DIM / 8;  // of a row
    GivenScale given;
    given.load(p.scale);
    const int vectors = at.rows(p.tokens, 0, TOKENS) * VECTORS;
    // All lanes of a warp go round as often: a unit's lanes find their maximum together.
    for (int begin = 0; begin < vectors; begin += THREADS) {
        const int vector = begin + threadIdx.x, read = vector < vectors ? vector : 0;
        const int row = read / VECTORS, column = read % VECTORS * 8;
        float total[8] = {};
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                Vector<fp32, 16> some;
                some.load(sums + (warp * TOKENS + row) * SUMS_ROW + column + i);
#pragma unroll
                for (int e = 0; e < 4; ++e) total[i + e] += __uint_as_float(some.words[e]);
            }
        }
        Vector<Element, 16> rounded[1];
        rounded[0].pack(total);
        Units::run(rounded, given, {p.values, p.scales, p.tokens}, at.first_token + row,
                   (at.head * V_DIM + column) / Units::UNIT, column / 8 % LANES, vector < vectors);
    }
}

extern "C" __global__ void ALL_REGISTERS(THREADS) mla_v_up_quant(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const Place at;
    float* const sums = reinterpret_cast<float*>(dynamic_shared());
    const int warp = warp_uniform(threadIdx.x / WARP_SIZE);
    const int column_warp = warp % COLUMN_WARPS, token_warp = warp / COLUMN_WARPS % TOKEN_WARPS;
    const int latent_warp = warp / (COLUMN_WARPS * TOKEN_WARPS);
    const int first_row = token_warp * TILES * Product::ROWS, rows = at.rows(p.tokens, 0, TOKENS);
    // Warps take steps in turn, so that what is read at one time lies side by side.
    const int first_latent = latent_warp * Product::DEPTH + Product::depth();
    i64 w_at = at.head * p.w_head + first_latent * p.w_row + column_warp * Product::COLUMNS + Product::w_column();
    compute_now(w_at);
    XRow x_rows[TILES][Product::LANE_ROWS];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int i = 0; i < Product::LANE_ROWS; ++i) {
            const int row = first_row + t * Product::ROWS + Product::row(i);
            x_rows[t][i] = {(at.first_token + row) * p.x_token + at.head * p.x_head + first_latent, row < rows};
            compute_now(x_rows[t][i].at);
        }
    }
    Step steps[STAGES];
    if (EARLY) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) steps[s].load_w(p, w_at, s * STEP);
    }
    if (PDL) {
        prefetch(p, at, TOKENS, THREADS);
        wait_for_previous_kernel();
    }

    Product products[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) products[t].clear();
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        if (!EARLY) steps[s].load_w(p, w_at, s * STEP);
        steps[s].load_x(p, x_rows, s * STEP);
    }
    if (PDL == 2) let_next_kernel_start();
#pragma unroll 1
    for (int begin = 0; begin < STEPS; begin += STAGES) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) {
            const Product::W weights(steps[s].w);
#pragma unroll
            for (int t = 0; t < TILES; ++t) products[t].add(steps[s].x[t], weights);
            if (begin + STAGES < STEPS) {
                steps[s].load_w(p, w_at, (begin + STAGES + s) * STEP);
                steps[s].load_x(p, x_rows, (begin + STAGES + s) * STEP);
            }
        }
    }
    if (PDL == 3) let_next_kernel_start();

#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int i = 0; i < Product::LANE_ROWS; ++i) {
            const int row = first_row + t * Product::ROWS + Product::row(i);
            if (row >= rows) continue;
            float* const to =
                sums + (latent_warp * TOKENS + row) * SUMS_ROW + column_warp * Product::COLUMNS + Product::column();
#pragma unroll
            for (int c = 0; c < Product::LANE_COLUMNS; c += 4) {
                Vector<fp32, 16> some;
#pragma unroll
                for (int e = 0; e < 4; ++e) some.words[e] = __float_as_uint(products[t].sums[i][c + e]);
                some.store(to + c);
            }
        }
    }
    __syncthreads();
    quantise(p, at, sums);
    zero_padding(p, at, THREADS);
}

#else

typedef WarpgroupProduct<Element, COLUMNS> Product;

constexpr int WARPGROUP = 128;
constexpr int THREADS = WARPS * WARPGROUP;
constexpr int STEP = TILES * Product::DEPTH;  // of LATENT
constexpr int STEPS = LATENT / STEP;          // of one round
constexpr int ROUNDS = (TOKENS + WARPS * Product::ROWS - 1) / (WARPS * Product::ROWS);
constexpr int W_STAGES = ROUNDS > 1 ? STEPS : STAGES;
constexpr bool ALL_FIT = ROUNDS == 1 && STAGES >= STEPS;  // every step has a stage of its own
constexpr int EARLY_STEPS = !EARLY ? 0 : W_STAGES < STEPS ? W_STAGES : STEPS;  // whose W_UV is loaded early
constexpr int X_STEP_BYTES = TILES * Product::X_TILE_BYTES, W_STEP_BYTES = TILES * Product::W_BYTES;

static_assert(WARP_SIZE == 32, "warpgroups have 32 lanes a warp");
static_assert(LATENT % STEP == 0 && TOKENS % Product::ROWS == 0 && STAGES >= 2, "whole tiles");
static_assert(ROUNDS == 1 || SHARERS == 1, "blocks that share columns have one round");

// Copies steps of operands into shared memory, one after the other. A thread has the same 16 bytes of every 16th row of x's
// tiles, and of every 8th, 16th, 32nd or 64th of W_UV's, whose places in shared memory are constants apart.
struct Loader {
    static constexpr int W_PIECES = COLUMNS / 8, W_TILE_PIECES = Product::W_ROW_BYTES / 16;  // of 16 bytes, in a row
    static constexpr int X_ROWS = WARPGROUP / 8, W_ROWS = THREADS / W_PIECES;              // that are copied at once
    static constexpr int X_COUNT = TILE_ROWS / X_ROWS, W_COUNT = STEP / W_ROWS, W_COUNT_OF_TILE = TILE_ROWS / W_ROWS;
    const Params& p;
    const Place& at;
    const int warpgroup;
    const Element* x[X_COUNT];  // the thread's part of the next step
    const Element* w;
    i64 w_rows;  // elements between what is copied at once
    u8 *x_place, *w_place;  // the thread's, in the first stage
    int rows;  // of the thread's X_COUNT, how many are tokens
    int step = 0, round = 0, stage = 0;

    static_assert(X_ROWS % 8 == 0 && W_ROWS % 8 == 0 && TILE_ROWS % W_ROWS == 0, "whole turns of the swizzle");

    __device__ __forceinline__ Loader(const Params& p, const Place& at, int warpgroup, u8* x_steps, u8* w_steps)
        : p(p), at(at), warpgroup(warpgroup) {
        const int w_row = threadIdx.x / W_PIECES, piece = threadIdx.x % W_PIECES;
        w = p.w + at.head * p.w_head + w_row * p.w_row + at.rank * COLUMNS + piece * 8;
        w_rows = W_ROWS * p.w_row;
        w_place = w_steps + piece / W_TILE_PIECES * Product::W_TILE_BYTES +
                  tile_offset<Product::W_ROW_BYTES>(w_row, piece % W_TILE_PIECES);
        x_place = x_steps + tile_offset<Product::X_ROW_BYTES>(threadIdx.x % WARPGROUP / 8, threadIdx.x % 8);
        begin_round();
        compute_now(w);
        compute_now(w_rows);
#pragma unroll
        for (int i = 0; i < X_COUNT; ++i) compute_now(x[i]);
    }

    // The thread's share of W_UV for the first steps. These copies are of the group that the first call of next() makes.
    __device__ __forceinline__ void begin_early() {
#pragma unroll
        for (int early = 0; early < EARLY_STEPS; ++early) copy_w(early);
    }

    // Of x, of all rounds one after the other; in the first round, the thread's share of W_UV as well, unless it was loaded
    // early. What is in the place of rows that are no tokens only makes for sums that nobody reads.
    __device__ __forceinline__ void next() {
        u8* const x_to = x_place + stage * X_STEP_BYTES;
#pragma unroll
        for (int i = 0; i < X_COUNT; ++i) {
            if (i < rows) {
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
                    copy_async(x_to + tile * Product::X_TILE_BYTES + i * X_ROWS * Product::X_ROW_BYTES, x[i] + tile * 64);
            }
            x[i] += STEP;
        }
        if (round == 0 && EARLY_STEPS < STEPS && step >= EARLY_STEPS) copy_w(ROUNDS > 1 ? step : stage);
        commit_copies();
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        if (++step == STEPS) {
            step = 0, ++round;
            if (ROUNDS > 1) {
                begin_round();
            } else {
                rows = 0;
            }
        }
    }

  private:
    // Of the next step that W_UV is loaded for.
    __device__ __forceinline__ void copy_w(int w_stage) {
        u8* const w_to = w_place + w_stage * W_STEP_BYTES;
#pragma unroll
        for (int i = 0; i < W_COUNT; ++i, w += w_rows)
            copy_async(w_to + i / W_COUNT_OF_TILE * Product::W_BYTES + i % W_COUNT_OF_TILE * W_ROWS * Product::W_ROW_BYTES, w);
    }
    __device__ __forceinline__ void begin_round() {
        const int row = (round * WARPS + warpgroup) * Product::ROWS + threadIdx.x % WARPGROUP / 8;
        rows = (at.rows(p.tokens, row, TILE_ROWS) + X_ROWS - 1) / X_ROWS;
        if (rows > X_COUNT) rows = X_COUNT;
        const Element* const from = p.x + (at.first_token + row) * p.x_token + at.head * p.x_head + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < X_COUNT; ++i) x[i] = from + i * X_ROWS * p.x_token;
    }
};

// Stores a row of 8 · COUNT e4m3 values, of each eight of which lane q of four has values 2q and 2q + 1.
template <int COUNT>
__device__ __forceinline__ void store_pairs(u8* to, u32 (&pairs)[COUNT], bool exists) {
    const int lane = threadIdx.x % 4;
    if constexpr (COUNT == 4) {
        transpose(pairs);  // now all pairs of an eight
        Vector<u32, 8> eight;
        eight.words[0] = pairs[0] | pairs[1] << 16;
        eight.words[1] = pairs[2] | pairs[3] << 16;
        if (exists) eight.store(reinterpret_cast<u32*>(to + lane * 8));
    } else {
#pragma unroll
        for (int begin = 0; begin < COUNT; begin += 8) {
            u32 some[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) some[i] = pairs[begin + 2 * i] | pairs[begin + 2 * i + 1] << 16;
            transpose(some);  // now all pairs of two neighbouring eights
            Vector<u32, 16> sixteen;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sixteen.words[i] = (some[2 * i] & 0xffffu) | some[2 * i + 1] << 16;
                sixteen.words[2 + i] = some[2 * i] >> 16 | (some[2 * i + 1] & 0xffff0000u);
            }
            if (exists) sixteen.store(reinterpret_cast<u32*>(to + begin * 8 + lane * 16));
        }
    }
}

// One of a lane's two rows of a tile, its sums rounded: lane q of four has columns 8c + 2q and 8c + 2q + 1.
struct Row {
    static constexpr int COUNT = COLUMNS / 8;
    static constexpr int GROUPS = GROUP > 16 && PARTNERS == 1 ? COLUMNS / GROUP : 1;  // or a part of one
    u32 words[COUNT];

    __device__ __forceinline__ void round(const Product& product, int i) {
#pragma unroll
        for (int c = 0; c < COUNT; ++c)
            words[c] = Pair<Element>::pack(product.sums[4 * c + 2 * i], product.sums[4 * c + 2 * i + 1]);
    }
    // Of a group, over the four lanes: see AbsMax.
    __device__ __forceinline__ u32 largest(int group) const {
        u32 largest = 0;
#pragma unroll
        for (int c = 0; c < COUNT / GROUPS; ++c)
            largest = AbsMax<Element>::larger(largest, words[group * (COUNT / GROUPS) + c]);
        return group_max<Element, 4>(largest);
    }
    // `largest`: of the whole row's groups. `row`: of the block's.
    __device__ __forceinline__ void quantise(const Params& p, const Place& at, const GivenScale& given, int row,
                                             const u32 (&largest)[GROUPS]) const {
        const i64 token = at.first_token + row;
        const int first_column = at.head * V_DIM + at.rank * COLUMNS, lane = threadIdx.x % 4;
        const bool exists = at.rows(p.tokens, row, 1) > 0;
        if constexpr (GROUP == 16) {
            quantise_to_fp4(p, given, token, first_column, exists);
        } else {
            u32 pairs[COUNT];  // of e4m3 values
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                const Divisor divisor(group_scale(AbsMax<Element>::value(largest[g])));
                if (GROUP && exists && lane == 0 && at.rank % PARTNERS == 0)
                    static_cast<float*>(p.scales)[scale_index(token, first_column / (GROUP ? GROUP : 1) + g,
                                                              WIDTH / (GROUP ? GROUP : 1), p.tokens)] = divisor.scale;
#pragma unroll
                for (int i = 0; i < COUNT / GROUPS; ++i) {
                    const int c = g * (COUNT / GROUPS) + i;
                    float a, b;
                    Pair<Element>::unpack(words[c], a, b);
                    pairs[c] = GROUP ? e4m3x2(divisor.quotient(a), divisor.quotient(b))
                                     : e4m3x2(a * given.reciprocal, b * given.reciprocal);
                }
            }
            store_pairs(p.values + token * WIDTH + first_column, pairs, exists);
        }
    }

  private:
    __device__ __forceinline__ void quantise_to_fp4(const Params& p, const GivenScale& given, i64 token, int first_column,
                                                    bool exists) const {
        typedef Quantiser<Element, WIDTH, 1, GROUP ? GROUP / 8 : 1> Units;  // two lanes; other groups do not come here
        const int lane = threadIdx.x % 4;
#pragma unroll
        for (int begin = 0; begin < COUNT; begin += 4) {
            Units::Vec vector[1];
#pragma unroll
            for (int c = 0; c < 4; ++c) vector[0].words[c] = words[begin + c];
            transpose(vector[0].words);  // now all lanes' pairs of one of the eights of columns
            Units::run(vector, given, {p.values, p.scales, p.tokens}, token, (first_column + begin * 8 + lane * 8) / 16, lane % 2,
                       exists);
        }
    }
};

extern "C" __global__ void ALL_REGISTERS(THREADS) CLUSTER_OF(PARTNERS) mla_v_up_quant(const Params p) {
    if (PDL == 1) let_next_kernel_start();
    const Place at;
    if (at.rank >= SHARERS) return;
    // From one lane, so that the compiler knows that it is the same for all of a warp: so are the tiles' addresses then.
    const int warpgroup = WARPS == 1 ? 0 : int(shuffle(threadIdx.x / WARPGROUP, 0));
    u8* const w_steps = dynamic_shared();
    u8* const x_steps = w_steps + W_STAGES * W_STEP_BYTES + warpgroup * STAGES * X_STEP_BYTES;
    // The largest magnitudes of each row, by block: see AbsMax.
    u32* const exchanged = reinterpret_cast<u32*>(w_steps + W_STAGES * W_STEP_BYTES + WARPS * STAGES * X_STEP_BYTES);
    const Mailbox mailbox(exchanged + TOKENS * PARTNERS);
    if (PARTNERS > 1) mailbox.open(at.rows(p.tokens, 0, TOKENS) * (PARTNERS - 1) * int(sizeof(u32)));
    Loader loader(p, at, warpgroup, x_steps, w_steps);
    if (EARLY) loader.begin_early();
    if (PDL) {
        prefetch(p, at, WARPS * Product::ROWS, THREADS);
        wait_for_previous_kernel();
    }
#pragma unroll
    for (int step = 0; step < STAGES; ++step) loader.next();
    if (PDL == 2) let_next_kernel_start();
    GivenScale given;
    given.load(p.scale);
    Product product;
    Row finished[2];  // of the round before, quantised while this one's operands come
    const auto row_of = [&](int i, int round) { return (round * WARPS + warpgroup) * Product::ROWS + Product::row(i); };
    // Of the warp's eight. Where there are several rounds, nearly always.
    const auto any_rows = [&](int i, int round) {
        return ROUNDS > 1 || __any_sync(0xffffffffu, at.rows(p.tokens, row_of(i, round), 1));
    };
    const auto quantise = [&](int i, int round) {
        if (!any_rows(i, round)) return;
        u32 largest[Row::GROUPS];
#pragma unroll
        for (int g = 0; g < Row::GROUPS; ++g) largest[g] = GROUP > 16 ? finished[i].largest(g) : 0;
        finished[i].quantise(p, at, given, row_of(i, round), largest);
    };
    int stage = 0, round = 0;
    for (; round < ROUNDS; ++round) {
        // In the first round a warpgroup without tokens still loads its share of W_UV.
        if (round > 0 && at.rows(p.tokens, (round * WARPS + warpgroup) * Product::ROWS, 1) == 0) break;
        for (int step = 0; step < STEPS; ++step) {
            if (ALL_FIT || step == 0) {
                wait_for_copies<STAGES - 1>();
            } else {
                wait_for_copies<STAGES - 2>();
            }
            if (!ALL_FIT) Product::wait();
            // Now this step's tiles are there and the previous one's are free, as far as this thread knows.
            if (round == 0) {
                __syncthreads();
            } else {
                sync_team(1 + warpgroup, WARPGROUP);
            }
            product.add<TILES>(x_steps + stage * X_STEP_BYTES, w_steps + (ROUNDS > 1 ? step : stage) * W_STEP_BYTES,
                                        step == 0);
            if (ALL_FIT) {
                commit_copies();  // none: as many as are to be pending in the next step
            } else if (step > 0) {
                loader.next();
            }
            if (ROUNDS > 1 && round > 0) {
                if (step == 0) quantise(0, round - 1);
                if (step == STEPS / 2) quantise(1, round - 1);
            }
            stage = stage + 1 < STAGES ? stage + 1 : 0;
        }
        Product::wait();
        if (ROUNDS > 1) {  // the last step's tiles are free already
            sync_team(1 + warpgroup, WARPGROUP);
            loader.next();
        }
        finished[0].round(product, 0);
        finished[1].round(product, 1);
    }
    if (PDL == 3) let_next_kernel_start();
    if constexpr (PARTNERS > 1) {
        const int self = at.rank % PARTNERS;
        u32 largest[2][Row::GROUPS];
        mailbox.wait_until_all_are_open();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!any_rows(i, 0)) continue;
            const int row = row_of(i, 0), to = threadIdx.x % 4;
            largest[i][0] = finished[i].largest(0);
            if (to < PARTNERS && to != self && at.rows(p.tokens, row, 1))
                mailbox.send(largest[i][0], exchanged + row * PARTNERS + self, to);
        }
        mailbox.receive();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!any_rows(i, 0)) continue;
            const int row = row_of(i, 0);
#pragma unroll
            for (int other = 0; other < PARTNERS; ++other)
                if (other != self)
                    largest[i][0] = AbsMax<Element>::larger(largest[i][0], exchanged[row * PARTNERS + other]);
            finished[i].quantise(p, at, given, row, largest[i]);
        }
    } else {
        quantise(0, round - 1);
        quantise(1, round - 1);
    }
    zero_padding(p, at, THREADS);
}

#endif
