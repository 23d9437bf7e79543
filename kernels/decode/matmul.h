// Products of a packed matrix with a few rows of activations. The layouts are described in README.md.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"
#include "vector.h"

namespace spikescale {
namespace decode {
namespace {

constexpr int PANEL = 32;            // outputs that are computed together
constexpr int CHUNK = 512;           // inputs at most that are read together
constexpr int STRIDE = CHUNK + 16;   // elements between two rows of activations: no power of 2, for the cache's sets
constexpr int UNROLL = 4;            // inputs a round of the innermost loop
constexpr int MAX_ROWS = ACCUMULATORS / 2 - (ACCUMULATORS == 24 ? 1 : 0);
constexpr int LINE = 64;             // bytes of a cache line

enum Arithmetic : int32_t {
    FLOAT32,      // float32 weights
    WIDENED,      // bfloat16 weights, widened; float32 activations
    BFLOAT16,     // bfloat16 weights and activations, summed in float32 (AVX512-BF16)
};

// Activations of some rows, cut along the inputs into chunks of `chunk` (a multiple of PANEL): row b of a chunk
// starts at (chunk's number * rows + b) * STRIDE.
struct Activations {
    void* data;
    int64_t inputs, chunk, rows;

    int64_t at(int64_t row, int64_t input) const {
        return (input / chunk * rows + row) * STRIDE + input % chunk;
    }
};

inline int64_t chunk_length(int64_t inputs) {
    const int64_t chunks = (inputs + CHUNK - 1) / CHUNK;
    const int64_t even = (inputs + chunks - 1) / chunks;
    return (even + PANEL - 1) / PANEL * PANEL;
}

// y (rows, PANEL) = or += x (rows, STRIDE) times w, `length` inputs of one panel. Meanwhile `lines` cache lines
// a round are fetched from `ahead` on.
using Kernel = void (*)(const void* w, const void* x, int length, float* y, bool first, const char* ahead, int lines);

// Registers a row takes; few rows use the whole panel's width, so that memory is read in order.
constexpr int vectors(int rows) {
    int count = PANEL / WIDTH;
    while (count > 2 && rows * count > ACCUMULATORS) count /= 2;
    return count;
}

// Independent sums a result is split into, so that the multiply-adds need not wait for one another.
constexpr int chains(int rows) {
    const int wanted = 8 / (rows * vectors(rows));
    return wanted < 1 ? 1 : (wanted > UNROLL ? UNROLL : wanted);
}

inline void fetch(const char*& ahead, int lines) {
    for (int i = 0; i < lines; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
}

template <int ROWS, int N, int CHAINS>
inline void begin(Vec (&sums)[CHAINS][ROWS][N], const float* y, bool first) {
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < N; j++) sums[c][i][j] = c || first ? zero() : load(y + i * PANEL + j * WIDTH);
}

template <int ROWS, int N, int CHAINS>
inline void finish(Vec (&sums)[CHAINS][ROWS][N], float* y) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < N; j++) {
            Vec sum = sums[0][i][j];
            for (int c = 1; c < CHAINS; c++) sum = add(sum, sums[c][i][j]);
            store(y + i * PANEL + j * WIDTH, sum);
        }
}

template <int ROWS, int N>
inline void step_f32(const float* w, const float* x, Vec (&sums)[ROWS][N]) {
    Vec weights[N];
    for (int j = 0; j < N; j++) weights[j] = load(w + j * WIDTH);
    for (int i = 0; i < ROWS; i++) {
        const Vec value = broadcast(x + i * STRIDE);
        for (int j = 0; j < N; j++) sums[i][j] = fma(weights[j], value, sums[i][j]);
    }
}

template <int ROWS>
void multiply_f32(const void* w_in, const void* x_in, int length, float* y, bool first, const char* ahead, int lines) {
    constexpr int N = vectors(ROWS), CHAINS = chains(ROWS);
    for (int column = 0; column < PANEL; column += N * WIDTH, lines = 0) {
        const float *w = static_cast<const float*>(w_in) + column, *x = static_cast<const float*>(x_in);
        Vec sums[CHAINS][ROWS][N];
        begin<ROWS, N, CHAINS>(sums, y + column, first);
        int k = 0;
        for (; k + UNROLL <= length; k += UNROLL) {
            fetch(ahead, lines);
#pragma GCC unroll 4
            for (int q = 0; q < UNROLL; q++) step_f32<ROWS, N>(w + (k + q) * PANEL, x + k + q, sums[q % CHAINS]);
        }
        for (; k < length; k++) step_f32<ROWS, N>(w + k * PANEL, x + k, sums[0]);
        finish<ROWS, N, CHAINS>(sums, y + column);
    }
}

template <int ROWS, int N>
inline void step_widened(const uint16_t* w, const float* x, Vec (&even)[ROWS][N], Vec (&odd)[ROWS][N]) {
    Vec first[N], second[N];
    for (int j = 0; j < N; j++) load_pairs(w + 2 * j * WIDTH, first[j], second[j]);
    for (int i = 0; i < ROWS; i++) {
        const Vec value = broadcast(x + i * STRIDE), next = broadcast(x + i * STRIDE + 1);
        for (int j = 0; j < N; j++) even[i][j] = fma(first[j], value, even[i][j]);
        for (int j = 0; j < N; j++) odd[i][j] = fma(second[j], next, odd[i][j]);
    }
}

template <int ROWS>
void multiply_widened(const void* w_in, const void* x_in, int length, float* y, bool first, const char* ahead,
                      int lines) {
    constexpr int N = vectors(ROWS), CHAINS = chains(ROWS);
    for (int column = 0; column < PANEL; column += N * WIDTH, lines = 0) {
        const uint16_t* w = static_cast<const uint16_t*>(w_in) + 2 * column;
        const float* x = static_cast<const float*>(x_in);
        Vec sums[CHAINS][ROWS][N];
        begin<ROWS, N, CHAINS>(sums, y + column, first);
        int k = 0;
        for (; k + UNROLL <= length; k += UNROLL) {
            fetch(ahead, lines);
#pragma GCC unroll 4
            for (int q = 0; q < UNROLL; q += 2)
                step_widened<ROWS, N>(w + (k + q) * PANEL, x + k + q, sums[q % CHAINS], sums[(q + 1) % CHAINS]);
        }
        for (; k < length; k += 2) step_widened<ROWS, N>(w + k * PANEL, x + k, sums[0], sums[CHAINS - 1]);
        finish<ROWS, N, CHAINS>(sums, y + column);
    }
}

#if defined(__AVX512F__)

inline bool has_bf16_dots() { return __builtin_cpu_supports("avx512bf16"); }

template <int ROWS>
__attribute__((target("avx512bf16"))) void multiply_bf16(const void* w_in, const void* x_in, int length, float* y,
                                                         bool first, const char* ahead, int lines) {
    constexpr int N = PANEL / WIDTH;
    const uint16_t *w = static_cast<const uint16_t*>(w_in), *x = static_cast<const uint16_t*>(x_in);
    Vec sums[1][ROWS][N];
    begin<ROWS, N, 1>(sums, y, first);
    for (int k = 0; k < length; k += 2) {
        if (k % UNROLL == 0) fetch(ahead, lines);
        __m512i weights[N];
        for (int j = 0; j < N; j++) weights[j] = _mm512_loadu_si512(w + k * PANEL + 2 * j * WIDTH);
        for (int i = 0; i < ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, x + i * STRIDE + k, sizeof pair);
            const __m512i values = _mm512_set1_epi32(pair);
            for (int j = 0; j < N; j++)
                sums[0][i][j] = _mm512_dpbf16_ps(sums[0][i][j], (__m512bh)weights[j], (__m512bh)values);
        }
    }
    finish<ROWS, N, 1>(sums, y);
}

#else

inline bool has_bf16_dots() { return false; }

template <int ROWS>
void multiply_bf16(const void*, const void*, int, float*, bool, const char*, int) {}

#endif

template <int... ROWS>
constexpr std::array<std::array<Kernel, sizeof...(ROWS)>, 3> kernels(std::integer_sequence<int, ROWS...>) {
    return {{{multiply_f32<ROWS + 1>...}, {multiply_widened<ROWS + 1>...}, {multiply_bf16<ROWS + 1>...}}};
}

// y (x.rows, PANEL) = one panel of weights, from `w` on, times all rows of x. `next` is where this thread reads
// on after the panel.
inline void multiply(Arithmetic arithmetic, const char* w, const Activations& x, float* y, const char* next) {
    static constexpr auto table = kernels(std::make_integer_sequence<int, MAX_ROWS>{});
    const int64_t w_bytes = (arithmetic == FLOAT32 ? 4 : 2) * PANEL, x_bytes = arithmetic == BFLOAT16 ? 2 : 4;
    const int64_t blocks = (x.rows + MAX_ROWS - 1) / MAX_ROWS;
    const int lines = int((UNROLL * w_bytes + LINE * blocks - 1) / (LINE * blocks));
    for (int64_t k = 0; k < x.inputs; k += x.chunk) {
        const int64_t left = x.inputs - k, length = left < x.chunk ? left : x.chunk;
        // bfloat16 weights come in pairs of inputs.
        const int64_t stored = arithmetic == FLOAT32 ? length : (length + 1) / 2 * 2;
        const char* after = w + stored * w_bytes;
        const char* ahead = left > x.chunk ? after : next;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t row = x.rows * block / blocks, rows = x.rows * (block + 1) / blocks - row;
            const char* values = static_cast<const char*>(x.data) + x.at(row, k) * x_bytes;
            table[arithmetic][rows - 1](w, values, int(length), y + row * PANEL, k == 0, ahead, lines);
            ahead += length / UNROLL * lines * LINE;
        }
        w = after;
    }
}

}  // namespace
}  // namespace decode
}  // namespace spikescale
