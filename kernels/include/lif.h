// The leaky integrate-and-fire neuron, one token at a time, for the kernels that contain it. The maths is in
// kernels/lif/README.md. Every floating-point operation is the reference's, in its order and uncontracted, so
// that the same neurons fire.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace spikescale {

constexpr int64_t MARK = 16;  // tokens from one saved membrane to the next

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

}  // namespace spikescale
