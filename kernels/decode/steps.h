// What happens between the matrix products, one token: neurons, WKV, what the next product reads. Everything works on
// blocks of PANEL channels of one row, at fixed lengths so that the compiler makes vector code of the loops.
//
// Each function performs the operations of its namesake among the other kernels in the same order.
#pragma once

#include <type_traits>

#include "matmul.h"

namespace spikescale {
namespace decode {
namespace {

enum Neuron : int32_t { NONE, HEAVISIDE, LIF };

struct LifOptions {
    float tau, v_threshold, v_reset;
    int32_t soft_reset;
};

// One token of leaky integrate-and-fire neurons: x becomes the spikes, v the membrane after them.
inline void lif(float* x, float* v, const LifOptions& o) {
    auto run = [&](auto soft) {
#pragma omp simd
        for (int j = 0; j < PANEL; j++) {
            const float h = v[j] + (x[j] - (v[j] - o.v_reset)) / o.tau;
            const float above = h - o.v_threshold;
            const bool fired = soft ? above > 0.0f : above >= 0.0f;
            const float s = above != above ? above : (fired ? 1.0f : 0.0f);
            v[j] = soft ? h - s * o.v_threshold : h * (1.0f - s) + o.v_reset * s;
            x[j] = s;
        }
    };
    if (o.soft_reset) run(std::true_type{});
    else run(std::false_type{});
}

inline void heaviside(float* x) {
#pragma omp simd
    for (int j = 0; j < PANEL; j++) x[j] = x[j] != x[j] ? x[j] : (x[j] >= 0.0f ? 1.0f : 0.0f);
}

// Activations for the next product, in the type that it reads.
inline void put(const Activations& to, Arithmetic arithmetic, int64_t row, int64_t channel, const float* values) {
    const int64_t at = to.at(row, channel);
    if (arithmetic == BFLOAT16) {
        bf16* out = static_cast<bf16*>(to.data) + at;
#pragma omp simd
        for (int j = 0; j < PANEL; j++) out[j] = from_float<bf16>(values[j]);
    } else {
        float* out = static_cast<float*>(to.data) + at;
#pragma omp simd
        for (int j = 0; j < PANEL; j++) out[j] = values[j];
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_f(-x)); }

inline void squared_relu(float* x) {
#pragma omp simd
    for (int j = 0; j < PANEL; j++) {
        const float positive = x[j] < 0.0f ? 0.0f : x[j];  // a NaN stays
        x[j] = positive * positive;
    }
}

// The past of one row, as in ../wkv: `b` the sum of the weights, `mean` that of the values under them, both on
// the scale e^(base + age w). Kept this way between tokens: nothing is rounded that need not be.
struct Past {
    float *mean, *b, *base, *age;
};

// What a - b loses to rounding (Knuth's two-sum).
inline float lost(float a, float b, float difference) {
    const float back = difference - a;
    return (a - (difference - back)) - (b + back);
}

// One token of WKV times its gate: y = sigmoid(r) wkv(k, v).
inline void gated_wkv(const Past& p, const float* w, const float* u, const float* k, const float* v, const float* r,
                      float* y) {
#pragma omp simd
    for (int j = 0; j < PANEL; j++) {
        // A key of -inf has the weight 0, one of +inf none that is defined: NaN.
        float key = k[j] < -FLT_MAX ? -FLT_MAX : k[j];
        key = key > FLT_MAX ? std::numeric_limits<float>::quiet_NaN() : key;
        const float above = key - p.base[j], low_bits = lost(key, p.base[j], above);
        const float news = v[j] - p.mean[j];
        // Output: the past against the current token with its bonus.
        const float out_lead = multiply_add(-p.age[j], w[j], above) + (u[j] + low_bits);
        const float out_smaller = exp_f(-std::fabs(out_lead));
        const float out_now = out_lead > 0.0f ? 1.0f : out_smaller;
        const float out_past = (out_lead > 0.0f ? out_smaller : 1.0f) * p.b[j];
        const float out = multiply_add(out_now / (out_past + out_now), news, p.mean[j]);
        // Update: the past, one token older, against the current token without the bonus.
        const float older = p.age[j] + 1.0f;
        const float lead = multiply_add(-older, w[j], above) + low_bits;
        const float smaller = exp_f(-std::fabs(lead));
        const bool taller = lead > 0.0f;
        const float now = taller ? 1.0f : smaller;
        const float sum = (taller ? smaller : 1.0f) * p.b[j] + now;
        p.mean[j] = multiply_add(now / sum, news, p.mean[j]);
        p.b[j] = sum;
        p.base[j] = taller ? key : p.base[j];
        p.age[j] = taller ? 0.0f : older;
        y[j] = sigmoid(r[j]) * out;
    }
}

}  // namespace
}  // namespace decode
}  // namespace spikescale
