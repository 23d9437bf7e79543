// The leaky integrate-and-fire neuron over tokens, forward and backward, for the kernels that contain it.
// The maths is in kernels/lif/README.md. Every floating-point operation of forward is the reference's, in
// its order and uncontracted, so that the same neurons fire.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace spikescale {

constexpr int64_t MARK = 16;                 // tokens from one saved membrane to the next
constexpr int64_t LIF_BACKWARD_WIDTH = 512;  // channels whose MARK tokens of scratch stay in the nearest cache

struct LifOptions {
    float tau, v_threshold, v_reset, alpha;
    int32_t soft_reset, detach_reset;
};

// A quotient by a power of two may be taken as a product: both round the same number.
inline bool has_exact_reciprocal(float tau) {
    const uint32_t bits = bits_of(tau);
    const uint32_t exponent = (bits >> 23) & 0xFFu;
    return !(bits & 0x7FFFFFu) && exponent > 1 && exponent < 253;
}

// The parameters of all channels; `taus` and `thresholds` are (C,), or null where one number serves all.
class Neurons {
  public:
    Neurons(const LifOptions& options, const float* taus, const float* thresholds, int64_t channels)
        : o(options), tau_(channels), inverse_(channels), threshold_(channels) {
        product = true;
        for (int64_t c = 0; c < channels; c++) {
            tau_[c] = taus ? taus[c] : o.tau;
            inverse_[c] = 1.0f / tau_[c];
            threshold_[c] = thresholds ? thresholds[c] : o.v_threshold;
            product = product && has_exact_reciprocal(tau_[c]);
        }
    }
    const float* tau() const { return tau_; }
    const float* inverse_tau() const { return inverse_; }
    const float* threshold() const { return threshold_; }

    const LifOptions o;
    bool product;  // every 1 / tau is exact

  private:
    Buffer<float> tau_, inverse_, threshold_;
};

// One token of n channels from c0 on: `in` and v are those channels' current and membrane, which is
// updated. emit(c, s, h, q) receives the spike, the membrane before the reset and (in - (v - v_reset)) / tau.
template <bool SOFT, bool PRODUCT, typename T, typename Emit>
inline void lif_token(const Neurons& p, int64_t c0, int64_t n, const T* in, float* v, Emit emit) {
    const float* tau = (PRODUCT ? p.inverse_tau() : p.tau()) + c0;
    const float* threshold = p.threshold() + c0;
    const float v_reset = p.o.v_reset;
#pragma omp simd
    for (int64_t c = 0; c < n; c++) {
        const float difference = to_float(in[c]) - (v[c] - v_reset);
        const float q = PRODUCT ? difference * tau[c] : difference / tau[c];
        const float h = v[c] + q;
        const float above = h - threshold[c];
        const bool fired = SOFT ? above > 0.0f : above >= 0.0f;
        // A NaN must stay visible: as a spike of 0 it would hide a diverged run.
        const float s = above != above ? above : (fired ? 1.0f : 0.0f);
        v[c] = SOFT ? h - s * threshold[c] : h * (1.0f - s) + v_reset * s;
        emit(c, s, h, q);
    }
}

// The hardware's prefetcher follows ascending addresses; backward passes go the other way.
template <typename T>
inline void prefetch(const T* row, int64_t n) {
    for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// What one thread needs to go backwards through MARK tokens of `width` channels.
struct LifScratch {
    LifScratch(int64_t width, bool parameters)
        : v(width), h(MARK * width), q(parameters ? MARK * width : 0), tau(width), threshold(width) {}
    Buffer<float> v, h, q, tau, threshold;
};

// Rows h and q of lif_token for `count` tokens from the membrane v on, and a prefetch of what backward reads next.
template <bool SOFT, bool PRODUCT, bool WITH_Q, typename T, typename G>
NOINLINE void lif_membranes(const Neurons& p, int64_t c0, int64_t n, int64_t count, int64_t stride, const float* mark,
                            const uint8_t* reset, const T* in, const G* grad_s, const T* grad_in, LifScratch& scratch) {
    float* v = scratch.v;
    std::memcpy(v, mark, size_t(n) * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
        if (reset && reset[t]) std::memset(v, 0, size_t(n) * sizeof(float));
        prefetch(grad_s + t * stride, n);
        prefetch(grad_in + t * stride, n);
        float *h_row = scratch.h + t * n, *q_row = WITH_Q ? scratch.q + t * n : nullptr;
        lif_token<SOFT, PRODUCT>(p, c0, n, in + t * stride, v, [=](int64_t c, float, float h, float q) {
            h_row[c] = h;
            if (WITH_Q) q_row[c] = q;
        });
    }
}

// Tokens count - 1 .. 0, count <= MARK, of n channels from c0 on. `mark` is the membrane before them; rows of
// `in`, `grad_s` and `grad_in` are `stride` apart; `reset` is null or a byte a token; gv is the gradient of the
// membrane after them, then of that before. With PARAMETERS their gradients are added to grad_tau, grad_threshold.
// `first`: there are no tokens before these.
template <bool SOFT, bool DETACH, bool PARAMETERS, typename T, typename G>
NOINLINE void lif_backward_tokens(const Neurons& p, int64_t c0, int64_t n, int64_t count, int64_t stride,
                                  const float* mark, const uint8_t* reset, const T* in, const G* grad_s, T* grad_in,
                                  float* gv, double* grad_tau, double* grad_threshold, bool first,
                                  LifScratch& scratch) {
    with_bool(p.product, [&](auto product) {
        lif_membranes<SOFT, decltype(product)::value, PARAMETERS>(p, c0, n, count, stride, mark, reset, in, grad_s,
                                                                  grad_in, scratch);
    });
    const float *threshold = p.threshold() + c0, *inverse = p.inverse_tau() + c0;
    const float v_reset = p.o.v_reset, half_alpha = p.o.alpha / 2.0f, slope = float(M_PI / 2.0) * p.o.alpha;
    float *sum_tau = scratch.tau, *sum_threshold = scratch.threshold;
    if (PARAMETERS) {
        std::memset(sum_tau, 0, size_t(n) * sizeof(float));
        std::memset(sum_threshold, 0, size_t(n) * sizeof(float));
    }
    for (int64_t t = count - 1; t >= 0; t--) {
        const float *h_row = scratch.h + t * n, *q_row = PARAMETERS ? scratch.q + t * n : nullptr;
        const G* gs = grad_s + t * stride;
        T* gx = grad_in + t * stride;
        if (!first) prefetch(in + (t - count) * stride, n);
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            const float h = h_row[c], above = h - threshold[c];
            const float scaled = slope * above;
            const float surrogate = half_alpha / (1.0f + scaled * scaled);
            // How the membrane after the reset follows the spike, and the one before the reset.
            const float by_spike = DETACH ? 0.0f : (SOFT ? -threshold[c] : v_reset - h);
            const float by_h = SOFT ? 1.0f : (above >= 0.0f ? 0.0f : 1.0f);
            const float through_spike =
                DETACH ? to_float(gs[c]) * surrogate : (to_float(gs[c]) + gv[c] * by_spike) * surrogate;
            const float gh = through_spike + gv[c] * by_h;
            const float g = gh * inverse[c];
            if (PARAMETERS) {
                sum_tau[c] -= g * q_row[c];
                sum_threshold[c] -= SOFT ? through_spike + (above > 0.0f ? gv[c] : 0.0f) : through_spike;
            }
            gx[c] = from_float<T>(g);
            gv[c] = gh - g;
        }
        if (reset && reset[t]) std::memset(gv, 0, size_t(n) * sizeof(float));
    }
    if (PARAMETERS) {
        for (int64_t c = 0; c < n; c++) {
            grad_tau[c] += double(sum_tau[c]);
            grad_threshold[c] += double(sum_threshold[c]);
        }
    }
}

// The tensors of one backward pass: `in` with its gradient and that of the spikes are (B, T, C), marks
// (B, ceil(T / MARK), C), reset (B, T) or null, the parameters' gradients (B, C) or both null.
template <typename T, typename G>
struct LifBackward {
    const Neurons& neurons;
    Extent e;
    const float* marks;
    const uint8_t* reset;
    const T* in;
    const G* grad_s;
    T* grad_in;
    double *grad_tau, *grad_threshold;

    int64_t marks_per_row() const { return ceil_div(e.length, MARK); }

    // The tokens from mark m of batch row b on; gv as above, for channels c0 .. c0 + n.
    void chunk(int64_t b, int64_t m, int64_t c0, int64_t n, float* gv, LifScratch& scratch) const {
        const int64_t t0 = m * MARK, count = e.length - t0 < MARK ? e.length - t0 : MARK;
        const int64_t at = (b * e.length + t0) * e.channels + c0, row = b * e.channels + c0;
        const bool parameters = grad_tau != nullptr;
        with_bool(neurons.o.soft_reset, [&](auto soft) {
            with_bool(neurons.o.detach_reset, [&](auto detach) {
                with_bool(parameters, [&](auto with_parameters) {
                    lif_backward_tokens<decltype(soft)::value, decltype(detach)::value,
                                        decltype(with_parameters)::value>(
                        neurons, c0, n, count, e.channels, marks + (b * marks_per_row() + m) * e.channels + c0,
                        reset ? reset + b * e.length + t0 : nullptr, in + at, grad_s + at, grad_in + at, gv,
                        parameters ? grad_tau + row : nullptr, parameters ? grad_threshold + row : nullptr, m == 0,
                        scratch);
                });
            });
        });
    }

    // All tokens, over batch rows and blocks of channels. grad_v (B, C) or null belongs to the last membrane,
    // grad_v0 to the first.
    void by_blocks(const float* grad_v, float* grad_v0, int threads) const {
        if (!e.elements()) return;
        int64_t width = block_width(e.batch, e.channels, threads, 16);
        if (width > LIF_BACKWARD_WIDTH) width = LIF_BACKWARD_WIDTH;
        const int64_t blocks = ceil_div(e.channels, width);
        parallel_for(e.batch * blocks, threads, e.elements(), [&](int64_t task) {
            const int64_t b = task / blocks, c0 = task % blocks * width, at = b * e.channels + c0;
            const int64_t n = e.channels - c0 < width ? e.channels - c0 : width;
            LifScratch scratch(n, grad_tau != nullptr);
            Buffer<float> gv(n);
            if (grad_v) std::memcpy(gv, grad_v + at, size_t(n) * sizeof(float));
            for (int64_t m = marks_per_row() - 1; m >= 0; m--) chunk(b, m, c0, n, gv, scratch);
            std::memcpy(grad_v0 + at, gv, size_t(n) * sizeof(float));
        });
    }
};

}  // namespace spikescale
