// Graded neurons along the token axis, forward and backward, on CPU. The maths is in graded.py.
//
// Tensors are contiguous float32: x, h, spikes and their gradients are (B, T, C), v and its gradients (B, C), tau and
// threshold (C,), reset (B, T) bytes or null; sums are (B, C) float64. The forward operations are the definition's in
// its order, uncontracted, so that the same neurons fire.

#include <utility>

#include "parallel.h"
#include "simd.h"

using namespace spikescale;

namespace {

struct Options {
    float v_reset, alpha;
    int32_t levels, soft_reset, is_signed, detach_reset;
};

// What level k adds to the spike of a membrane.
template <bool SOFT, bool SIGNED>
inline float level(float h, float threshold, float k) {
    const float above = h - k * threshold, below = -h - k * threshold;
    const float up = (SOFT ? above > 0.0f : above >= 0.0f) ? 1.0f : 0.0f;
    return SIGNED ? up - ((SOFT ? below > 0.0f : below >= 0.0f) ? 1.0f : 0.0f) : up;
}

// The spike of a membrane at a number of levels that the compiler knows.
template <bool SOFT, bool SIGNED, int LEVELS>
inline float spike(float h, float threshold) {
    float s = 0.0f;
    for (int32_t k = 1; k <= LEVELS; k++) s += level<SOFT, SIGNED>(h, threshold, float(k));
    return h != h ? h : s;  // a NaN must stay visible
}

// The spikes of a row of membranes. LEVELS is the number of levels; 0: `levels` are, and the row is gone through for
// each, since a loop over the levels inside, whose number is not known here, would not be vector code.
template <bool SOFT, bool SIGNED, int LEVELS>
inline void fire(const float* h, const float* threshold, float* spikes, int64_t channels, int32_t levels) {
    if (LEVELS) {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) spikes[c] = spike<SOFT, SIGNED, LEVELS>(h[c], threshold[c]);
        return;
    }
    std::memset(spikes, 0, size_t(channels) * sizeof(float));
    for (int32_t k = 1; k <= levels; k++)
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) spikes[c] += level<SOFT, SIGNED>(h[c], threshold[c], float(k));
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) spikes[c] = h[c] != h[c] ? h[c] : spikes[c];
}

// The membrane that a spike leaves.
template <bool SOFT>
inline float left(float h, float s, float threshold, float v_reset) {
    return SOFT ? h - s * threshold : (s == 0.0f || s != s ? h : v_reset);
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
            float *membrane = h + at, *fired = spikes + at;
#pragma omp simd
            for (int64_t c = 0; c < e.channels; c++) {
                membrane[c] = v[c] + (x[at + c] - (v[c] - v_reset)) / tau[c];
                if (!LEVELS) continue;
                fired[c] = spike<SOFT, SIGNED, LEVELS>(membrane[c], threshold[c]);
                v[c] = left<SOFT>(membrane[c], fired[c], threshold[c], v_reset);
            }
            if (LEVELS) continue;
            fire<SOFT, SIGNED, LEVELS>(membrane, threshold, fired, e.channels, levels);
#pragma omp simd
            for (int64_t c = 0; c < e.channels; c++)
                v[c] = left<SOFT>(membrane[c], fired[c], threshold[c], v_reset);
        }
    });
}

template <bool SOFT, bool SIGNED, int LEVELS, bool DETACH>
void backward(const float* x, const float* v0, const uint8_t* reset, const float* tau, const float* threshold,
              const float* h, const float* grad_spikes, const float* grad_v, float* grad_x, float* grad_v0,
              double* sum_tau, double* sum_threshold, const Extent& e, const Options& o, int threads) {
    const float v_reset = o.v_reset, alpha = o.alpha;
    const int32_t levels = o.levels;
    parallel_for(e.batch, threads, e.elements(), [=](int64_t b) {
        Buffer<float> part_tau(e.channels), part_threshold(e.channels), past(e.channels), now(e.channels),
            earlier(e.channels), by_membrane(e.channels), by_theta(e.channels);
        float *of_tau = part_tau, *of_threshold = part_threshold, *before = past, *slopes = by_membrane;
        float *slopes_threshold = by_theta, *spikes = now, *spikes_before = earlier;
        fire<SOFT, SIGNED, LEVELS>(h + ((b + 1) * e.length - 1) * e.channels, threshold, spikes, e.channels, levels);
        float* g = grad_v0 + b * e.channels;
        double *by_tau = sum_tau + b * e.channels, *by_threshold = sum_threshold + b * e.channels;
        std::memcpy(g, grad_v + b * e.channels, size_t(e.channels) * sizeof(float));
        for (int64_t t = e.length - 1; t >= 0; t--) {
            const int64_t row = b * e.length + t, at = row * e.channels;
            const bool cut = reset && reset[row];
            // The membrane that the token met.
            if (t > 0) {
                const float* last = h + at - e.channels;
                fire<SOFT, SIGNED, LEVELS>(last, threshold, spikes_before, e.channels, levels);
#pragma omp simd
                for (int64_t c = 0; c < e.channels; c++)
                    before[c] = left<SOFT>(last[c], spikes_before[c], threshold[c], v_reset);
            } else {
                std::memcpy(before, v0 + b * e.channels, size_t(e.channels) * sizeof(float));
            }
            if (cut) std::memset(before, 0, size_t(e.channels) * sizeof(float));
            // What a spike's derivatives by membrane and threshold are.
            std::memset(slopes, 0, size_t(e.channels) * sizeof(float));
            std::memset(slopes_threshold, 0, size_t(e.channels) * sizeof(float));
            for (int32_t k = 1; k <= (LEVELS ? LEVELS : levels); k++)
#pragma omp simd
                for (int64_t c = 0; c < e.channels; c++) {
                    const float m = h[at + c], theta = float(k) * threshold[c];
                    const float up = surrogate(m - theta, alpha), down = SIGNED ? surrogate(-m - theta, alpha) : 0.0f;
                    slopes[c] += up + down;
                    slopes_threshold[c] += float(k) * (down - up);
                }
#pragma omp simd
            for (int64_t c = 0; c < e.channels; c++) {
                const float m = h[at + c], theta = threshold[c], s = spikes[c];
                const float slope = slopes[c], slope_threshold = slopes_threshold[c];
                float carried, carried_threshold;
                if (SOFT) {
                    carried = DETACH ? 1.0f : 1.0f - theta * slope;
                    carried_threshold = DETACH ? -s : -s - theta * slope_threshold;
                } else {
                    const float up = surrogate(m - theta, alpha);
                    const float down = SIGNED ? surrogate(-m - theta, alpha) : 0.0f;
                    const float kept = DETACH ? 0.0f : v_reset - m;
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
            std::swap(spikes, spikes_before);
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
        // With a single level known, the compiler merges loops into one that it cannot make vector code of.
        constexpr int known = decltype(levels)::value == 1 ? 0 : decltype(levels)::value;
        with_bool(o.detach_reset, [&](auto detach) {
            backward<decltype(soft)::value, decltype(is_signed)::value, known, decltype(detach)::value>(
                x, v0, reset, tau, threshold, h, grad_spikes, grad_v, grad_x, grad_v0, sum_tau, sum_threshold,
                {B, L, C}, o, threads);
        });
    });
}
}
