// Token shift and its mixtures, forward and backward, on CPU.
//
// Tensors are contiguous: x (B, T, C), every output and its gradient (B, T, C), mu (C), last (B, C) float32, reset
// (B, T) bytes or null. Work is divided into pieces of PIECE tokens of a sequence, whatever the threads: the sums of
// the gradients of mu, one row a piece, do not depend on them.

#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

using namespace spikescale;

namespace {

constexpr int64_t PIECE = 64;
constexpr int MOST = 3;  // mixtures

// Calls body(b, first token, tokens, piece) for every piece of every sequence.
template <typename Body>
inline void for_each_piece(int64_t batch, int64_t length, int64_t channels, int threads, Body body) {
    const int64_t pieces = ceil_div(length, PIECE);
    parallel_for(batch * pieces, threads, batch * length * channels, [&](int64_t task) {
        const int64_t first = task % pieces * PIECE;
        body(task / pieces, first, length - first < PIECE ? length - first : PIECE, task);
    });
}

template <typename Y>
inline void mix(const float* __restrict before, const float* __restrict difference, const float* __restrict share,
                Y* __restrict to, int64_t channels) {
    for (int64_t j = 0; j < channels; j++) to[j] = from_float<Y>(before[j] + share[j] * difference[j]);
}

template <int N, typename X, typename Y>
void forward(const X* x, const float* const* mu, const float* last, const uint8_t* reset, Y* const* out, int64_t B,
             int64_t L, int64_t C, int threads) {
    for_each_piece(B, L, C, threads, [&](int64_t b, int64_t first, int64_t count, int64_t) {
        const X* sequence = x + b * L * C;
        std::vector<float> rows(2 * C);
        float *before = rows.data(), *difference = before + C;
        for (int64_t t = first; t < first + count; t++) {
            const X* now = sequence + t * C;
            if (reset && reset[b * L + t]) {
                for (int64_t j = 0; j < C; j++) before[j] = 0.0f;
            } else if (t == 0) {
                for (int64_t j = 0; j < C; j++) before[j] = last[b * C + j];
            } else {
                for (int64_t j = 0; j < C; j++) before[j] = to_float(now[j - C]);
            }
            for (int64_t j = 0; j < C; j++) difference[j] = to_float(now[j]) - before[j];
            for (int i = 0; i < N; i++) mix(before, difference, mu[i], out[i] + (b * L + t) * C, C);
        }
    });
}

// What the piece's tokens take from the gradients g of one mixture: their own share into own, their predecessor's into
// earlier, and the gradient of mu into sums. FIRST starts the sums over the mixtures.
template <bool FIRST, typename Y>
inline void take(const Y* __restrict g, const float* __restrict share, const float* __restrict difference,
                 const float* __restrict later, float* __restrict own, float* __restrict earlier,
                 float* __restrict sums, int64_t channels) {
    for (int64_t j = 0; j < channels; j++) {
        const float grad = to_float(g[j]);
        own[j] = (FIRST ? later[j] : own[j]) + share[j] * grad;
        earlier[j] = (FIRST ? 0.0f : earlier[j]) + (1.0f - share[j]) * grad;
        sums[j] += grad * difference[j];
    }
}

template <typename X>
inline void subtract(const X* __restrict now, const X* __restrict before, float* __restrict difference,
                     int64_t channels) {
    for (int64_t j = 0; j < channels; j++) difference[j] = to_float(now[j]) - to_float(before[j]);
}

template <int N, typename X, typename Y>
void backward(const X* x, const float* const* mu, const float* last, const uint8_t* reset, const Y* const* grad,
              X* grad_x, float* grad_mu, float* grad_last, int64_t B, int64_t L, int64_t C, int threads) {
    for_each_piece(B, L, C, threads, [&](int64_t b, int64_t first, int64_t count, int64_t piece) {
        const X* sequence = x + b * L * C;
        const uint8_t* resets = reset ? reset + b * L : nullptr;
        const int64_t end = first + count;
        std::vector<float> rows(5 * C, 0.0f);
        float *difference = rows.data(), *own = difference + C, *later = own + C, *earlier = later + C;
        float *unused = earlier + C, *sums = grad_mu + piece * N * C;
        for (int64_t j = 0; j < N * C; j++) sums[j] = 0.0f;
        // The token after the piece reaches into it.
        if (end < L && !(resets && resets[end])) {
            for (int i = 0; i < N; i++) {
                const Y* g = grad[i] + (b * L + end) * C;
                if (i == 0) take<true>(g, mu[i], difference, difference, own, later, unused, C);
                else take<false>(g, mu[i], difference, difference, own, later, unused, C);
            }
        }
        for (int64_t t = end - 1; t >= first; t--) {
            const X* now = sequence + t * C;
            const bool fresh = resets && resets[t];
            if (fresh) {
                for (int64_t j = 0; j < C; j++) difference[j] = to_float(now[j]);
            } else if (t == 0) {
                const float* before = last + b * C;
                for (int64_t j = 0; j < C; j++) difference[j] = to_float(now[j]) - before[j];
            } else {
                subtract(now, now - C, difference, C);
            }
            for (int i = 0; i < N; i++) {
                const Y* g = grad[i] + (b * L + t) * C;
                if (i == 0) take<true>(g, mu[i], difference, later, own, earlier, sums, C);
                else take<false>(g, mu[i], difference, later, own, earlier, sums + i * C, C);
            }
            X* to = grad_x + (b * L + t) * C;
            for (int64_t j = 0; j < C; j++) to[j] = from_float<X>(own[j]);
            std::swap(later, earlier);
            if (fresh) {
                for (int64_t j = 0; j < C; j++) later[j] = 0.0f;
            }
        }
        if (first == 0) {
            for (int64_t j = 0; j < C; j++) grad_last[b * C + j] = later[j];
        }
    });
}

template <typename X, typename Y>
void forward_any(const void* x, const float* const* mu, const float* last, const uint8_t* reset, void* const* out,
                 int64_t B, int64_t L, int64_t C, int32_t N, int32_t threads) {
    auto run = N == 1 ? forward<1, X, Y> : N == 2 ? forward<2, X, Y> : forward<3, X, Y>;
    Y* typed[MOST];
    for (int i = 0; i < N; i++) typed[i] = static_cast<Y*>(out[i]);
    run(static_cast<const X*>(x), mu, last, reset, typed, B, L, C, threads);
}

template <typename X, typename Y>
void backward_any(const void* x, const float* const* mu, const float* last, const uint8_t* reset,
                  const void* const* grad, void* grad_x, float* grad_mu, float* grad_last, int64_t B, int64_t L,
                  int64_t C, int32_t N, int32_t threads) {
    auto run = N == 1 ? backward<1, X, Y> : N == 2 ? backward<2, X, Y> : backward<3, X, Y>;
    const Y* typed[MOST];
    for (int i = 0; i < N; i++) typed[i] = static_cast<const Y*>(grad[i]);
    run(static_cast<const X*>(x), mu, last, reset, typed, static_cast<X*>(grad_x), grad_mu, grad_last, B, L, C,
        threads);
}

}  // namespace

extern "C" {

int32_t token_mix_piece() { return PIECE; }

// kind: 0 float32 in and out, 1 float32 in and bfloat16 out, 2 bfloat16 in and float32 out, 3 bfloat16 in and out.
void token_mix_forward(int32_t kind, const void* x, const float* const* mu, const float* last, const uint8_t* reset,
                       void* const* out, int64_t B, int64_t L, int64_t C, int32_t N, int32_t threads) {
    auto run = kind == 0   ? forward_any<float, float>
               : kind == 1 ? forward_any<float, bf16>
               : kind == 2 ? forward_any<bf16, float>
                           : forward_any<bf16, bf16>;
    run(x, mu, last, reset, out, B, L, C, N, threads);
}

// grad_mu is (pieces, N, C), grad_last (B, C).
void token_mix_backward(int32_t kind, const void* x, const float* const* mu, const float* last, const uint8_t* reset,
                        const void* const* grad, void* grad_x, float* grad_mu, float* grad_last, int64_t B, int64_t L,
                        int64_t C, int32_t N, int32_t threads) {
    auto run = kind == 0   ? backward_any<float, float>
               : kind == 1 ? backward_any<float, bf16>
               : kind == 2 ? backward_any<bf16, float>
                           : backward_any<bf16, bf16>;
    run(x, mu, last, reset, grad, grad_x, grad_mu, grad_last, B, L, C, N, threads);
}
}
