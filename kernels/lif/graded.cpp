// Graded neurons along the token axis, forward and backward, on CPU. The maths is in graded.py.
//
// Tensors are contiguous float32: x, h, spikes and their gradients are (B, T, C), v and its gradients (B, C), tau and
// threshold (C,), reset (B, T) bytes or null; sums are (B, C) float64. The forward operations are the definition's in
// its order, uncontracted, so that the same neurons fire.

#include "parallel.h"
#include "simd.h"

using namespace spikescale;

namespace {

struct Options {
    float v_reset, alpha;
    int32_t levels, soft_reset, is_signed, detach_reset;
};

// The spike of a membrane. LEVELS is the number of levels, or 0: `levels` are.
template <bool SOFT, bool SIGNED, int LEVELS>
inline float spike(float h, float threshold, int32_t levels) {
    const int32_t count = LEVELS ? LEVELS : levels;
    float s = 0.0f;
    for (int32_t k = 1; k <= count; k++) {
        const float above = h - float(k) * threshold;
        s += (SOFT ? above > 0.0f : above >= 0.0f) ? 1.0f : 0.0f;
        if (SIGNED) {
            const float below = -h - float(k) * threshold;
            s -= (SOFT ? below > 0.0f : below >= 0.0f) ? 1.0f : 0.0f;
        }
    }
    return h != h ? h : s;  // a NaN must stay visible
}

inline float surrogate(float x, float alpha) {
    const float scaled = 1.57079632679f * alpha * x;
    return 0.5f * alpha / (1.0f + scaled * scaled);
}

template <bool SOFT, bool SIGNED, int LEVELS>
void forward(const float* x, const float* v0, const uint8_t* reset, const float* tau, const float* threshold, float* h,
             float* spikes, float* v_out, const Extent& e, const Options& o, int threads) {
    // Copies: what lies behind a reference might be changed by what the loops write.
    const float v_reset = o.v_reset;
    const int32_t levels = o.levels;
    parallel_for(e.batch, threads, e.elements(), [=](int64_t b) {
        float* v = v_out + b * e.channels;
        std::memcpy(v, v0 + b * e.channels, size_t(e.channels) * sizeof(float));
        for (int64_t t = 0; t < e.length; t++) {
            const int64_t row = b * e.length + t, at = row * e.channels;
            if (reset && reset[row]) std::memset(v, 0, size_t(e.channels) * sizeof(float));
#pragma omp simd
            for (int64_t c = 0; c < e.channels; c++) {
                const float membrane = v[c] + (x[at + c] - (v[c] - v_reset)) / tau[c];
                const float s = spike<SOFT, SIGNED, LEVELS>(membrane, threshold[c], levels);
                h[at + c] = membrane;
                spikes[at + c] = s;
                v[c] = SOFT ? membrane - s * threshold[c] : (s == 0.0f || s != s ? membrane : v_reset);
            }
        }
    });
}

template <bool SOFT, bool SIGNED, int LEVELS>
void backward(const float* x, const float* v0, const uint8_t* reset, const float* tau, const float* threshold,
              const float* h, const float* grad_spikes, const float* grad_v, float* grad_x, float* grad_v0,
              double* sum_tau, double* sum_threshold, const Extent& e, const Options& o, int threads) {
    const float v_reset = o.v_reset, alpha = o.alpha;
    const int32_t levels = o.levels;
    const bool detach = o.detach_reset;
    parallel_for(e.batch, threads, e.elements(), [=](int64_t b) {
        Buffer<float> part_tau(e.channels), part_threshold(e.channels), past(e.channels);
        float *of_tau = part_tau, *of_threshold = part_threshold, *before = past;
        float* g = grad_v0 + b * e.channels;
        double *by_tau = sum_tau + b * e.channels, *by_threshold = sum_threshold + b * e.channels;
        std::memcpy(g, grad_v + b * e.channels, size_t(e.channels) * sizeof(float));
        for (int64_t t = e.length - 1; t >= 0; t--) {
            const int64_t row = b * e.length + t, at = row * e.channels;
            const bool cut = reset && reset[row];
            // The membrane that the token met.
            if (cut) std::memset(before, 0, size_t(e.channels) * sizeof(float));
            else if (t == 0) std::memcpy(before, v0 + b * e.channels, size_t(e.channels) * sizeof(float));
            else
#pragma omp simd
                for (int64_t c = 0; c < e.channels; c++) {
                    const float m = h[at - e.channels + c];
                    const float s = spike<SOFT, SIGNED, LEVELS>(m, threshold[c], levels);
                    before[c] = SOFT ? m - s * threshold[c] : (s == 0.0f ? m : v_reset);
                }
#pragma omp simd
            for (int64_t c = 0; c < e.channels; c++) {
                const int32_t count = LEVELS ? LEVELS : levels;
                const float m = h[at + c], theta = threshold[c];
                float slope = 0.0f, slope_threshold = 0.0f;
                for (int32_t k = 1; k <= count; k++) {
                    const float up = surrogate(m - float(k) * theta, alpha);
                    slope += up;
                    slope_threshold -= float(k) * up;
                    if (SIGNED) {
                        const float down = surrogate(-m - float(k) * theta, alpha);
                        slope += down;
                        slope_threshold += float(k) * down;
                    }
                }
                const float s = spike<SOFT, SIGNED, LEVELS>(m, theta, levels);
                float carried, carried_threshold;
                if (SOFT) {
                    carried = detach ? 1.0f : 1.0f - theta * slope;
                    carried_threshold = detach ? -s : -s - theta * slope_threshold;
                } else {
                    const float up = surrogate(m - theta, alpha);
                    const float down = SIGNED ? surrogate(-m - theta, alpha) : 0.0f;
                    const float kept = detach ? 0.0f : v_reset - m;
                    carried = (s == 0.0f ? 1.0f : 0.0f) + kept * (up - down);
                    carried_threshold = -kept * (up + down);
                }
                const float gs = grad_spikes[at + c];
                const float at_h = gs * slope + g[c] * carried;
                const float gx = at_h / tau[c];
                of_threshold[c] = gs * slope_threshold + g[c] * carried_threshold;
                of_tau[c] = gx * ((x[at + c] - (before[c] - v_reset)) / tau[c]);
                grad_x[at + c] = gx;
                g[c] = at_h - gx;
            }
            if (cut) std::memset(g, 0, size_t(e.channels) * sizeof(float));
            // Summed in float64, apart from the loop above, which would not be vector code with it.
            for (int64_t c = 0; c < e.channels; c++) {
                by_threshold[c] += of_threshold[c];
                by_tau[c] -= of_tau[c];
            }
        }
    });
}

// body(soft, signed, levels) with the switches of `o` as constants; the usual numbers of levels have their own code.
template <typename Body>
void with_kind(const Options& o, Body body) {
    with_bool(o.soft_reset, [&](auto soft) {
        with_bool(o.is_signed, [&](auto is_signed) {
            if (o.levels == 1) return body(soft, is_signed, std::integral_constant<int, 1>{});
            if (o.levels == 3) return body(soft, is_signed, std::integral_constant<int, 3>{});
            return body(soft, is_signed, std::integral_constant<int, 0>{});
        });
    });
}

}  // namespace

extern "C" {
void graded_forward(const float* x, const float* v0, const uint8_t* reset, const float* tau, const float* threshold,
                    float* h, float* spikes, float* v_out, int64_t B, int64_t L, int64_t C, Options o,
                    int32_t threads) {
    with_kind(o, [&](auto soft, auto is_signed, auto levels) {
        forward<decltype(soft)::value, decltype(is_signed)::value, decltype(levels)::value>(
            x, v0, reset, tau, threshold, h, spikes, v_out, {B, L, C}, o, threads);
    });
}

void graded_backward(const float* x, const float* v0, const uint8_t* reset, const float* tau, const float* threshold,
                     const float* h, const float* grad_spikes, const float* grad_v, float* grad_x, float* grad_v0,
                     double* sum_tau, double* sum_threshold, int64_t B, int64_t L, int64_t C, Options o,
                     int32_t threads) {
    with_kind(o, [&](auto soft, auto is_signed, auto levels) {
        backward<decltype(soft)::value, decltype(is_signed)::value, decltype(levels)::value>(
            x, v0, reset, tau, threshold, h, grad_spikes, grad_v, grad_x, grad_v0, sum_tau, sum_threshold, {B, L, C},
            o, threads);
    });
}
}
