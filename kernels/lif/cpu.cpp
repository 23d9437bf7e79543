// LIF neuron along the token axis, forward and backward, on CPU. The maths is in README.md.
//
// Tensors are contiguous: x, spikes and their gradients are (B, T, C); v is (B, C); reset is (B, T) bytes or
// null; marks are (B, ceil(T / MARK), C); tau and threshold are (C,) or null.

#include "lif_backward.h"

using namespace spikescale;

namespace {

template <typename T>
void forward(const T* x, const float* v0, const uint8_t* reset, const float* taus, const float* thresholds, T* spikes,
             float* v_out, float* marks, const Extent& e, const LifOptions& o, int threads) {
    const Neurons neurons(o, taus, thresholds, e.channels);
    auto run = [&](auto soft, auto product) {
        const Tokens tokens = [&](int64_t b, int64_t c0, int64_t n, int64_t t0, int64_t t1, float* v, bool emit) {
            Buffer<T> unread(emit ? 0 : n);
            for (int64_t t = t0; t < t1; t++) {
                const int64_t row = b * e.length + t, at = row * e.channels + c0;
                if (reset && reset[row]) std::memset(v, 0, size_t(n) * sizeof(float));
                T* out = emit ? spikes + at : static_cast<T*>(unread);
                lif_token<decltype(soft)::value, decltype(product)::value>(
                    neurons, c0, n, x + at, v, [=](int64_t c, float s, float, float) { out[c] = from_float<T>(s); });
            }
        };
        NeuronRun(e, v0, v_out, marks, tokens).by_blocks(threads);
    };
    with_bool(o.soft_reset, [&](auto soft) { with_bool(neurons.product, [&](auto product) { run(soft, product); }); });
}

template <typename T>
void backward(const T* x, const uint8_t* reset, const float* taus, const float* thresholds, const float* marks,
              const T* grad_s, const float* grad_v, T* grad_x, float* grad_v0, float* grad_tau, float* grad_threshold,
              const Extent& e, const LifOptions& o, int threads) {
    const Neurons neurons(o, taus, thresholds, e.channels);
    // One sum a batch row, in float64.
    const int64_t sums = grad_tau ? e.batch * e.channels : 0;
    Buffer<double> sum_tau(sums), sum_threshold(sums);
    const LifBackward<T, T> pass{neurons, e, marks, reset, x, grad_s, grad_x, sum_tau, sum_threshold};
    pass.by_blocks(grad_v, grad_v0, threads);
    if (grad_tau) {
        add_rows(sum_tau, e.batch, e.channels, e.channels, grad_tau);
        add_rows(sum_threshold, e.batch, e.channels, e.channels, grad_threshold);
    }
}

}  // namespace

#define LIF(SUFFIX, T)                                                                                              \
    void lif_forward_##SUFFIX(const T* x, const float* v, const uint8_t* reset, const float* taus,                  \
                              const float* thresholds, T* spikes, float* v_out, float* marks, int64_t B, int64_t L, \
                              int64_t C, LifOptions o, int32_t threads) {                                           \
        forward(x, v, reset, taus, thresholds, spikes, v_out, marks, {B, L, C}, o, threads);                        \
    }                                                                                                               \
    void lif_backward_##SUFFIX(const T* x, const uint8_t* reset, const float* taus, const float* thresholds,        \
                               const float* marks, const T* grad_s, const float* grad_v, T* grad_x, float* grad_v0, \
                               float* grad_tau, float* grad_threshold, int64_t B, int64_t L, int64_t C,             \
                               LifOptions o, int32_t threads) {                                                     \
        backward(x, reset, taus, thresholds, marks, grad_s, grad_v, grad_x, grad_v0, grad_tau, grad_threshold,      \
                 {B, L, C}, o, threads);                                                                            \
    }

extern "C" {
LIF(f32, float)
LIF(bf16, bf16)
int64_t lif_mark() { return MARK; }

// Into how many segments of time backward cuts a tensor of this size.
int64_t lif_backward_segments(int64_t B, int64_t L, int64_t C, int32_t threads) {
    return B * L * C ? lif_backward_plan({B, L, C}, threads).segments : 1;
}
}
