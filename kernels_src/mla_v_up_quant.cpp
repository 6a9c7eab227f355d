// mla_v_up_quant on a CPU: see mla_v_up_quant.cu for what it computes.
//
// A task is one head; THREADS threads take heads in turn. ROWS tokens by PANEL columns of sums stay in registers while LATENT
// passes by. For more than ROWS tokens, the head's W_UV is rearranged first, once for all of them, and stays in the L2 cache.
// For one token it is read once, in the order in which it lies in memory.
//
// Constants of the problem: ELEMENT, HEADS, LATENT, V_DIM, GROUP, UE8M0, SCALE_LAYOUT, as on a GPU.
// Tunables:
//   THREADS        threads of the parallel loop, or as many as PyTorch may use if that is fewer
//   ROWS           tokens whose sums are in registers: W_UV is read less often, until registers run out
//   VECTOR_BYTES   SIMD width
#include "quant.h"

typedef ELEMENT E;

struct Params {
    const E* x;  // o_latent
    const E* w;
    const float* scale;  // static FP8 and NVFP4
    uint8_t* values;
    void* scales;
    int64_t x_token, x_head;  // strides, in elements
    int64_t w_head, w_row;
    int32_t tokens;
};

constexpr int VECTORS = VECTOR_BYTES == 64 ? 4 : 2;  // of sums for each token, in registers
constexpr int PANEL = VECTORS * LANES;
constexpr int WIDTH = HEADS * V_DIM;

static_assert(V_DIM % PANEL == 0, "whole panels");

// Some rows of x, as the multiplier takes them.
template <typename X>
struct Rows {
    const X* first;
    int64_t row;  // elements from row to row
};

// Multiplier<E>: STEP elements of LATENT at a time, of one token with a panel's columns.
template <typename Element>
struct Multiplier {
    static constexpr int STEP = 1;
    typedef float X;
    typedef Floats Vector;

    static inline Rows<X> rows(Rows<Element> x, int count) {
        alignas(64) static thread_local float wide[ROWS][LATENT];
        for (int r = 0; r < count; ++r)
            for (int i = 0; i < LATENT; i += LANES) {
                const Floats values = ::Element<Element>::load(x.first + r * x.row + i);
                memcpy(wide[r] + i, &values, sizeof values);
            }
        return {wide[0], LATENT};
    }
    static inline float load_x(const X* from) { return *from; }
    static inline void load(const Element* from, int64_t, Vector (&vectors)[VECTORS]) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v += 2) {
            const Two two = ::Element<Element>::load_two(from + v * LANES);
            vectors[v] = two.a, vectors[v + 1] = two.b;
        }
    }
    static inline Floats add(Floats sum, float x, Vector w) { return sum + x * w; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && VECTOR_BYTES == 64
// Pairs of rows of W_UV, element by element, and one instruction for both products and both sums.
template <>
struct Multiplier<bf16> {
    static constexpr int STEP = 2;
    typedef bf16 X;
    typedef __m512i Vector;

    static inline Rows<X> rows(Rows<bf16> x, int) { return x; }
    static inline int load_x(const X* from) {
        int pair;
        memcpy(&pair, from, sizeof pair);
        return pair;
    }
    static inline void load(const bf16* from, int64_t row, Vector (&vectors)[VECTORS]) {
        alignas(64) static constexpr uint16_t FIRST[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(FIRST), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v += 2) {
            const __m512i first = _mm512_loadu_si512(from + v * LANES), second = _mm512_loadu_si512(from + row + v * LANES);
            vectors[v] = _mm512_permutex2var_epi16(first, low, second);
            vectors[v + 1] = _mm512_permutex2var_epi16(first, high, second);
        }
    }
    static inline Floats add(Floats sum, int x, Vector w) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
    }
};
#endif

typedef Multiplier<E> Product;
constexpr int STEPS = LATENT / Product::STEP, PANELS = V_DIM / PANEL;

typedef Product::Vector Panel[STEPS][VECTORS];  // of W_UV, rearranged

static inline void store_sums(E* to, const Floats (&sums)[VECTORS]) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v += 2) Element<E>::store_two(to + v * LANES, {sums[v], sums[v + 1]});
}

// One panel of columns of COUNT tokens. `panel` holds the columns if it is not null, else they are at w.
template <int COUNT>
static inline void multiply(const Params& p, Rows<Product::X> x, const E* w, const Panel* panel,
                            E (*out)[V_DIM]) {
    Floats sums[COUNT][VECTORS] = {};
    for (int s = 0; s < STEPS; ++s) {
        Product::Vector columns[VECTORS];
        if (panel) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) columns[v] = (*panel)[s][v];
        } else {
            Product::load(w + s * Product::STEP * p.w_row, p.w_row, columns);
        }
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; ++r) {
            const auto element = Product::load_x(x.first + r * x.row + s * Product::STEP);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = Product::add(sums[r][v], element, columns[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r) store_sums(out[r], sums[r]);
}

// The same for `count` tokens, at most COUNT.
template <int COUNT>
static inline void multiply_some(int count, const Params& p, Rows<Product::X> x, const E* w,
                                 const Panel* panel, E (*out)[V_DIM]) {
    if constexpr (COUNT > 1) {
        if (count < COUNT) return multiply_some<COUNT - 1>(count, p, x, w, panel, out);
    }
    multiply<COUNT>(p, x, w, panel, out);
}

// All columns of one token. Some rows of W_UV at a time come into the L1 cache, and as many panels' sums are in registers as
// fit.
static inline void multiply_one(const Params& p, Rows<Product::X> x, const E* w, E* out) {
    constexpr int MOST = 8 / VECTORS, AT_ONCE = PANELS % MOST == 0 ? MOST : 1, BLOCK = 16;
    Floats sums[PANELS][VECTORS] = {};
    for (int first = 0; first < STEPS; first += BLOCK) {
        const int end = first + BLOCK < STEPS ? first + BLOCK : STEPS;
        for (int c = 0; c < PANELS; c += AT_ONCE) {
            Floats some[AT_ONCE][VECTORS];
            memcpy(some, sums[c], sizeof some);
            for (int s = first; s < end; ++s) {
                const auto element = Product::load_x(x.first + s * Product::STEP);
#pragma GCC unroll 4
                for (int a = 0; a < AT_ONCE; ++a) {
                    Product::Vector columns[VECTORS];
                    Product::load(w + s * Product::STEP * p.w_row + (c + a) * PANEL, p.w_row, columns);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) some[a][v] = Product::add(some[a][v], element, columns[v]);
                }
            }
            memcpy(sums[c], some, sizeof some);
        }
    }
    for (int c = 0; c < PANELS; ++c) store_sums(out + c * PANEL, sums[c]);
}

static void task(const Params& p, int64_t head) {
    alignas(64) static thread_local Panel panels[PANELS];
    const E* w = p.w + head * p.w_head;
    const bool rearrange = p.tokens > ROWS;
    for (int c = 0; rearrange && c < PANELS; ++c)
        for (int s = 0; s < STEPS; ++s) Product::load(w + s * Product::STEP * p.w_row + c * PANEL, p.w_row, panels[c][s]);
    for (int64_t t = 0; t < p.tokens; t += ROWS) {
        const int count = p.tokens - t < ROWS ? int(p.tokens - t) : ROWS;
        const auto x = Product::rows({p.x + t * p.x_token + head * p.x_head, p.x_token}, count);
        alignas(64) E rounded[ROWS][V_DIM];
        if (p.tokens == 1) multiply_one(p, x, w, rounded[0]);
        for (int c = 0; p.tokens > 1 && c < PANELS; ++c) {
            E(*out)[V_DIM] = reinterpret_cast<E(*)[V_DIM]>(rounded[0] + c * PANEL);
            multiply_some<ROWS>(count, p, x, w + c * PANEL, rearrange ? &panels[c] : nullptr, out);
        }
        for (int r = 0; r < count; ++r)
            quantise_row<E, WIDTH, V_DIM>(rounded[r], p.values, p.scales, p.scale, t + r, p.tokens, head * V_DIM);
    }
}

extern "C" void mla_v_up_quant(const Params* params) {
    const Params p = *params;
    if (GROUP == 16) zero_padded_scales(static_cast<uint8_t*>(p.scales), p.tokens, WIDTH / 16);
    const int threads = threads_to_use(THREADS);
    if (threads == 1) {
        for (int64_t head = 0; head < HEADS; ++head) task(p, head);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t head = 0; head < HEADS; ++head) task(p, head);
    }
}
