// LIF neuron along the token axis, forward and backward, on CPU. The maths is in README.md.
//
// Tensors are contiguous: x, spikes, h are (B, T, C); v is (B, C); reset is (B, T) bytes or null. The
// order of the floating-point operations is the reference's, so that the same neurons fire.

#include "simd.h"

using namespace spikescale;

struct LifOptions {
    float tau, v_threshold, v_reset, alpha;
    int32_t soft_reset, detach_reset;
};

namespace {

template <bool FULL, bool SOFT, typename T>
void forward_block(const T* x, const float* v0, const uint8_t* reset, T* spikes, float* v_out, float* h_out,
                   int64_t length, int64_t channels, int n, const LifOptions& o) {
    float v[LANES], in[LANES], s[LANES], h[LANES];
    fill(v, 0.0f);
    fill(in, 0.0f);
    load<FULL>(v0, n, v);
    for (int64_t t = 0; t < length; t++) {
        if (reset && reset[t]) fill(v, 0.0f);
        load<FULL>(x + t * channels, n, in);
        for (int j = 0; j < LANES; j++) {
            h[j] = v[j] + (in[j] - (v[j] - o.v_reset)) / o.tau;
            const float above = h[j] - o.v_threshold;
            const bool fired = SOFT ? above > 0.0f : above >= 0.0f;
            s[j] = above != above ? above : (fired ? 1.0f : 0.0f);
            v[j] = SOFT ? h[j] - s[j] * o.v_threshold : h[j] * (1.0f - s[j]) + o.v_reset * s[j];
        }
        store<FULL>(s, n, spikes + t * channels);
        if (h_out) store<FULL>(h, n, h_out + t * channels);
    }
    store<FULL>(v, n, v_out);
}

template <bool FULL, bool SOFT, bool DETACH, typename T>
void backward_block(const float* h_in, const uint8_t* reset, const T* grad_spikes, const float* grad_v, T* grad_x,
                    float* grad_v0, int64_t length, int64_t channels, int n, const LifOptions& o) {
    float h[LANES], gs[LANES], gv[LANES], gx[LANES];
    fill(h, 0.0f);
    fill(gs, 0.0f);
    fill(gv, 0.0f);
    if (grad_v) load<FULL>(grad_v, n, gv);
    const float half_alpha = o.alpha / 2.0f, slope = float(M_PI / 2.0) * o.alpha;
    for (int64_t t = length - 1; t >= 0; t--) {
        load<FULL>(h_in + t * channels, n, h);
        load<FULL>(grad_spikes + t * channels, n, gs);
        for (int j = 0; j < LANES; j++) {
            const float above = h[j] - o.v_threshold;
            const float scaled = slope * above;
            const float surrogate = half_alpha / (1.0f + scaled * scaled);
            float dv_dh;  // of the membrane after the reset with respect to the one before
            if (SOFT) {
                dv_dh = DETACH ? 1.0f : 1.0f - o.v_threshold * surrogate;
            } else {
                const float silent = above >= 0.0f ? 0.0f : 1.0f;
                dv_dh = DETACH ? silent : silent + (o.v_reset - h[j]) * surrogate;
            }
            const float gh = gs[j] * surrogate + gv[j] * dv_dh;
            gx[j] = gh / o.tau;
            gv[j] = gh - gx[j];
        }
        store<FULL>(gx, n, grad_x + t * channels);
        if (reset && reset[t]) fill(gv, 0.0f);
    }
    store<FULL>(gv, n, grad_v0);
}

template <typename T>
void forward(const T* x, const float* v, const uint8_t* reset, T* spikes, float* v_out, float* h, int64_t B, int64_t L,
             int64_t C, const LifOptions& o, int threads) {
    for_each_block(B, L, C, threads, [&](int64_t b, int64_t c0, int n) {
        const int64_t at = b * L * C + c0, at_v = b * C + c0;
        auto run = [&](auto block) {
            block(x + at, v + at_v, reset ? reset + b * L : nullptr, spikes + at, v_out + at_v, h ? h + at : nullptr, L,
                  C, n, o);
        };
        const bool full = n == LANES;
        if (o.soft_reset) run(full ? forward_block<true, true, T> : forward_block<false, true, T>);
        else run(full ? forward_block<true, false, T> : forward_block<false, false, T>);
    });
}

template <bool SOFT, bool DETACH, typename T>
void backward(const float* h, const uint8_t* reset, const T* gs, const float* gv, T* gx, float* gv0, int64_t B,
              int64_t L, int64_t C, const LifOptions& o, int threads) {
    for_each_block(B, L, C, threads, [&](int64_t b, int64_t c0, int n) {
        const int64_t at = b * L * C + c0, at_v = b * C + c0;
        auto block = n == LANES ? backward_block<true, SOFT, DETACH, T> : backward_block<false, SOFT, DETACH, T>;
        block(h + at, reset ? reset + b * L : nullptr, gs + at, gv ? gv + at_v : nullptr, gx + at, gv0 + at_v, L, C, n,
              o);
    });
}

template <typename T>
void backward_dispatch(const float* h, const uint8_t* reset, const T* gs, const float* gv, T* gx, float* gv0,
                       int64_t B, int64_t L, int64_t C, const LifOptions& o, int threads) {
    auto run = o.soft_reset ? (o.detach_reset ? backward<true, true, T> : backward<true, false, T>)
                            : (o.detach_reset ? backward<false, true, T> : backward<false, false, T>);
    run(h, reset, gs, gv, gx, gv0, B, L, C, o, threads);
}

}  // namespace

extern "C" {

void lif_forward_f32(const float* x, const float* v, const uint8_t* reset, float* spikes, float* v_out, float* h,
                     int64_t B, int64_t L, int64_t C, LifOptions o, int32_t threads) {
    forward(x, v, reset, spikes, v_out, h, B, L, C, o, threads);
}

void lif_forward_bf16(const bf16* x, const float* v, const uint8_t* reset, bf16* spikes, float* v_out, float* h,
                      int64_t B, int64_t L, int64_t C, LifOptions o, int32_t threads) {
    forward(x, v, reset, spikes, v_out, h, B, L, C, o, threads);
}

void lif_backward_f32(const float* h, const uint8_t* reset, const float* gs, const float* gv, float* gx, float* gv0,
                      int64_t B, int64_t L, int64_t C, LifOptions o, int32_t threads) {
    backward_dispatch(h, reset, gs, gv, gx, gv0, B, L, C, o, threads);
}

void lif_backward_bf16(const float* h, const uint8_t* reset, const bf16* gs, const float* gv, bf16* gx, float* gv0,
                       int64_t B, int64_t L, int64_t C, LifOptions o, int32_t threads) {
    backward_dispatch(h, reset, gs, gv, gx, gv0, B, L, C, o, threads);
}
}
