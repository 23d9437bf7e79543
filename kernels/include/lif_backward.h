// Leaky integrate-and-fire neurons backwards over all tokens, on several threads: over batch rows and blocks of
// channels, and, where those are too few, over segments of time, with the very result of one pass from the last
// token to the first.
#pragma once

#include "lif_time.h"

namespace spikescale {

constexpr int64_t LIF_BACKWARD_WIDTH = 512;  // channels whose MARK tokens of scratch stay in the nearest cache
constexpr int64_t LIF_BACKWARD_UNIT = 16;    // channels of a block that is not cut further

// The hardware's prefetcher follows ascending addresses; backward passes go the other way.
template <typename T>
inline void prefetch(const T* row, int64_t n) {
    for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// Where the gradients of one stretch of tokens go: of the input, rows `stride` apart (0: one row that nobody reads),
// and of its channels' tau and threshold, to which they are added, or null.
template <typename T>
struct LifGradients {
    T* in;
    int64_t stride;
    double *tau, *threshold;
};

// What one thread needs to go backwards through MARK tokens of `width` channels.
struct LifScratch {
    LifScratch(int64_t width, bool parameters)
        : v(width), h(MARK * width), q(parameters ? MARK * width : 0), tau(width), threshold(width) {}
    Buffer<float> v, h, q, tau, threshold;
};

// Rows h and q of lif_token for `count` tokens from the membrane v on, and a prefetch of what backward reads next.
template <bool SOFT, bool PRODUCT, bool WITH_Q, typename T, typename G>
NOINLINE void lif_membranes(const Neurons& p, int64_t c0, int64_t n, int64_t count, int64_t stride, const float* mark,
                            const uint8_t* reset, const T* in, const G* grad_s, const LifGradients<T>& to,
                            LifScratch& scratch) {
    float* v = scratch.v;
    std::memcpy(v, mark, size_t(n) * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
        if (reset && reset[t]) std::memset(v, 0, size_t(n) * sizeof(float));
        prefetch(grad_s + t * stride, n);
        prefetch(to.in + t * to.stride, n);
        float *h_row = scratch.h + t * n, *q_row = WITH_Q ? scratch.q + t * n : nullptr;
        lif_token<SOFT, PRODUCT>(p, c0, n, in + t * stride, v, [=](int64_t c, float, float h, float q) {
            h_row[c] = h;
            if (WITH_Q) q_row[c] = q;
        });
    }
}

// Tokens count - 1 .. 0, count <= MARK, of n channels from c0 on. `mark` is the membrane before them; rows of
// `in` and `grad_s` are `stride` apart; `reset` is null or a byte a token; gv is the gradient of the membrane
// after them, then of that before. PARAMETERS: tau and threshold get theirs. `first`: there are no tokens before these.
template <bool SOFT, bool DETACH, bool PARAMETERS, typename T, typename G>
NOINLINE void lif_backward_tokens(const Neurons& p, int64_t c0, int64_t n, int64_t count, int64_t stride,
                                  const float* mark, const uint8_t* reset, const T* in, const G* grad_s,
                                  const LifGradients<T>& to, float* gv, bool first, LifScratch& scratch) {
    with_bool(p.product, [&](auto product) {
        lif_membranes<SOFT, decltype(product)::value, PARAMETERS>(p, c0, n, count, stride, mark, reset, in, grad_s,
                                                                  to, scratch);
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
        T* gx = to.in + t * to.stride;
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
            to.tau[c] += double(sum_tau[c]);
            to.threshold[c] += double(sum_threshold[c]);
        }
    }
}

// Blocks and segments of a backward pass.
inline TimePlan lif_backward_plan(const Extent& e, int threads) {
    const int64_t width = block_width(e.batch, e.channels, threads, LIF_BACKWARD_UNIT);
    return TimePlan(e, width < LIF_BACKWARD_WIDTH ? width : LIF_BACKWARD_WIDTH, threads);
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
        const int64_t row = b * e.channels + c0;
        double *tau = grad_tau ? grad_tau + row : nullptr, *threshold = grad_tau ? grad_threshold + row : nullptr;
        chunk(b, m, c0, n, gv, {grad_in + at(b, m, c0), e.channels, tau, threshold}, scratch);
    }

    // All tokens, over batch rows and blocks of channels, or segments of time. grad_v (B, C) or null belongs to the
    // last membrane, grad_v0 to the first.
    void by_blocks(const float* grad_v, float* grad_v0, int threads) const {
        if (!e.elements()) return;
        const TimePlan plan = lif_backward_plan(e, threads);
        if (plan.segments > 1) by_time(plan, grad_v, grad_v0, threads);
        else sequential(plan, grad_v, grad_v0, threads);
    }

  private:
    int64_t at(int64_t b, int64_t m, int64_t c0) const { return (b * e.length + m * MARK) * e.channels + c0; }

    void chunk(int64_t b, int64_t m, int64_t c0, int64_t n, float* gv, const LifGradients<T>& to,
               LifScratch& scratch) const {
        const int64_t t0 = m * MARK, count = e.length - t0 < MARK ? e.length - t0 : MARK, from = at(b, m, c0);
        with_bool(neurons.o.soft_reset, [&](auto soft) {
            with_bool(neurons.o.detach_reset, [&](auto detach) {
                with_bool(to.tau != nullptr, [&](auto parameters) {
                    lif_backward_tokens<decltype(soft)::value, decltype(detach)::value, decltype(parameters)::value>(
                        neurons, c0, n, count, e.channels, marks + (b * marks_per_row() + m) * e.channels + c0,
                        reset ? reset + b * e.length + t0 : nullptr, in + from, grad_s + from, to, gv, m == 0, scratch);
                });
            });
        });
    }

    void sequential(const TimePlan& plan, const float* grad_v, float* grad_v0, int threads) const {
        parallel_for(plan.tasks, threads, e.elements(), [&](int64_t task) {
            const ChannelBlock k(task, plan.width, e);
            LifScratch scratch(k.n, grad_tau != nullptr);
            Buffer<float> gv(k.n);
            if (grad_v) copy_floats(gv, grad_v + k.row(e), k.n);
            for (int64_t m = marks_per_row() - 1; m >= 0; m--) chunk(k.b, m, k.c0, k.n, gv, scratch);
            copy_floats(grad_v0 + k.row(e), gv, k.n);
        });
    }

    // As in NeuronRun::by_time, in the other direction. A segment starts WARM_UP tokens late, from a gradient of 0;
    // where it is, bit for bit, the true one at some mark, the rest was right.
    void by_time(const TimePlan& plan, const float* grad_v, float* grad_v0, int threads) const {
        const int64_t all = marks_per_row(), share = ceil_div(all, plan.segments), segments = ceil_div(all, share);
        const int64_t size = e.batch * all * e.channels;
        Buffer<float> entered(size);  // gradient of the membrane after the tokens of each mark
        Buffer<float> left(plan.tasks * segments * plan.width);  // and before each segment
        // A row for every mark, so that a stretch that is walked again counts once, and the order of the sums is that
        // of one pass.
        Buffer<double> taus(grad_tau ? size : 0), thresholds(grad_tau ? size : 0);
        const auto walk = [&](const ChannelBlock& k, int64_t m, float* gv, LifScratch& scratch) {
            const int64_t row = (k.b * all + m) * e.channels + k.c0;
            LifGradients<T> to{grad_in + at(k.b, m, k.c0), e.channels, nullptr, nullptr};
            if (grad_tau) {
                to.tau = taus + row;
                to.threshold = thresholds + row;
                for (int64_t c = 0; c < k.n; c++) to.tau[c] = to.threshold[c] = 0.0;
            }
            copy_floats(entered + row, gv, k.n);
            chunk(k.b, m, k.c0, k.n, gv, to, scratch);
        };
        parallel_for(plan.tasks * segments, threads, e.elements(), [&](int64_t task) {
            const ChannelBlock k(task / segments, plan.width, e);
            const int64_t first = task % segments * share, end = first + share < all ? first + share : all;
            const int64_t start = end + WARM_UP / MARK < all ? end + WARM_UP / MARK : all;
            LifScratch scratch(k.n, grad_tau != nullptr);
            Buffer<float> gv(k.n);
            Buffer<T> unread(k.n);
            if (start == all && grad_v) copy_floats(gv, grad_v + k.row(e), k.n);
            for (int64_t m = start - 1; m >= end; m--)
                chunk(k.b, m, k.c0, k.n, gv, {unread, 0, nullptr, nullptr}, scratch);
            for (int64_t m = end - 1; m >= first; m--) walk(k, m, gv, scratch);
            copy_floats(left + task * plan.width, gv, k.n);
        });
        parallel_for(plan.tasks, threads, e.elements(), [&](int64_t task) {
            const ChannelBlock k(task, plan.width, e);
            LifScratch scratch(k.n, grad_tau != nullptr);
            Buffer<float> gv(k.n);
            copy_floats(gv, left + (task * segments + segments - 1) * plan.width, k.n);
            for (int64_t s = segments - 2; s >= 0; s--) {
                int64_t m = (s + 1) * share - 1;
                const auto met = [&] { return same_floats(entered + (k.b * all + m) * e.channels + k.c0, gv, k.n); };
                for (; m >= s * share && !met(); m--) walk(k, m, gv, scratch);
                if (m >= s * share) copy_floats(gv, left + (task * segments + s) * plan.width, k.n);
            }
            copy_floats(grad_v0 + k.row(e), gv, k.n);
            for (int64_t m = all - 1; grad_tau && m >= 0; m--) {
                const int64_t row = (k.b * all + m) * e.channels + k.c0, to = k.row(e);
                for (int64_t c = 0; c < k.n; c++) {
                    grad_tau[to + c] += taus[row + c];
                    grad_threshold[to + c] += thresholds[row + c];
                }
            }
        });
    }
};

}  // namespace spikescale
