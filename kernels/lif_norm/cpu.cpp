// x' = dropout(x + LIF(current)) and LayerNorm(x'), forward and backward, in one pass over memory. README.md says how.
//
// Tensors are contiguous: x, current, x', normed and their gradients are (B, T, C); v is (B, C); mean and rstd are
// (B, T); weight, bias, tau and threshold (C,); reset (B, T) bytes; marks (B, ceil(T / MARK), C).

#include "dropout.h"
#include "lif_backward.h"
#include "norm.h"

using namespace spikescale;

// What both passes need beside their tensors; as in cpu.py.
struct LifNormOptions {
    LifOptions lif;
    float scale;  // of what dropout keeps
    uint32_t threshold;
    uint64_t seed;
    double eps;
};

namespace {

static_assert(CHUNK_ROWS == MARK && PARTITION_ROWS % MARK == 0, "a chunk of rows is a chunk of tokens");

// Whether whole batch rows keep the threads busy, so that a token can be finished in one go.
bool rows_suffice(const Extent& e, int threads) {
    const int64_t rounds = ceil_div(e.batch, threads);
    return 4 * e.batch >= 3 * rounds * threads || e.elements() < FEW_ELEMENTS;
}

template <typename T>
struct Forward {
    const float* x;
    const T* current;
    const float *weight, *bias;  // null: no LayerNorm
    const uint8_t* reset;
    float *x_out, *normed, *mean, *rstd;
    const Extent& e;
    const LifNormOptions& o;
    const Neurons& neurons;

    void norm(int64_t row) const {
        const int64_t at = row * e.channels;
        const Moments m = norm_row(x_out + at, e.channels, o.eps, weight, bias, normed + at);
        mean[row] = m.mean;
        rstd[row] = m.rstd;
    }

    template <bool SOFT, bool PRODUCT, bool DROPOUT>
    void tokens(int64_t b, int64_t c0, int64_t n, int64_t t0, int64_t t1, float* v, bool emit, bool with_norm) const {
        const Dropout dropout(o.seed, o.threshold, o.scale);
        Buffer<float> unread(emit ? 0 : n);
        for (int64_t t = t0; t < t1; t++) {
            const int64_t row = b * e.length + t, at = row * e.channels + c0;
            if (reset && reset[row]) std::memset(v, 0, size_t(n) * sizeof(float));
            const float* in = x + at;
            float* out = emit ? x_out + at : static_cast<float*>(unread);
            lif_token<SOFT, PRODUCT>(neurons, c0, n, current + at, v, [=](int64_t c, float s, float, float) {
                const float sum = in[c] + s;
                out[c] = DROPOUT ? sum * dropout.factor(uint64_t(at), uint32_t(c)) : sum;
            });
            if (with_norm) norm(row);
        }
    }

    void run(const float* v0, float* v_out, float* marks, int threads) const {
        const bool by_rows = rows_suffice(e, threads), with_norm = weight && by_rows;
        auto neurons_of = [&](auto soft, auto product, auto dropout) {
            const Tokens body = [&](int64_t b, int64_t c0, int64_t n, int64_t t0, int64_t t1, float* v, bool emit) {
                tokens<decltype(soft)::value, decltype(product)::value, decltype(dropout)::value>(b, c0, n, t0, t1, v,
                                                                                                 emit, with_norm);
            };
            NeuronRun neuron_run(e, v0, v_out, marks, body);
            if (by_rows) neuron_run.by_rows(threads);
            else neuron_run.by_blocks(threads);
        };
        with_bool(neurons.o.soft_reset, [&](auto soft) {
            with_bool(neurons.product, [&](auto product) {
                with_bool(o.threshold != 0, [&](auto dropout) { neurons_of(soft, product, dropout); });
            });
        });
        if (weight && !by_rows) {
            parallel_for(ceil_div(e.batch * e.length, CHUNK_ROWS), threads, e.elements(), [&](int64_t chunk) {
                const int64_t end = (chunk + 1) * CHUNK_ROWS, rows = e.batch * e.length;
                for (int64_t row = chunk * CHUNK_ROWS; row < end && row < rows; row++) norm(row);
            });
        }
    }
};

template <typename T>
struct Backward {
    const float *x_out, *weight, *mean, *rstd;
    const float *grad_out, *grad_normed;  // either may be null
    float* grad_x;
    const LifNormOptions& o;
    const LifBackward<T, float>& neurons;

    // The gradient of x + spikes for the tokens from mark m of batch row b on.
    void norm_chunk(int64_t b, int64_t m, NormSums& sums) const {
        const Extent& e = neurons.e;
        const Dropout dropout(o.seed, o.threshold, o.scale);
        const int64_t n = e.channels, end = (m + 1) * MARK < e.length ? (m + 1) * MARK : e.length;
        for (int64_t t = m * MARK; t < end; t++) {
            const int64_t row = b * e.length + t, at = row * n;
            float* g = grad_x + at;
            const float* added = grad_out ? grad_out + at : nullptr;
            if (grad_normed) {
                norm_backward_row(x_out + at, n, {mean[row], rstd[row]}, weight, grad_normed + at, added, g,
                                  sums.chunk_weight, sums.chunk_bias);
            } else if (added) {
                std::memcpy(g, added, size_t(n) * sizeof(float));
            } else {
                std::memset(g, 0, size_t(n) * sizeof(float));
            }
            if (o.threshold) {
#pragma omp simd
                for (int64_t c = 0; c < n; c++) g[c] *= dropout.factor(uint64_t(at), uint32_t(c));
            }
        }
        if (grad_normed) sums.flush();
    }

    void run(const float* grad_v, float* grad_v0, float* grad_weight, float* grad_bias, int threads) const {
        const Extent& e = neurons.e;
        const int64_t marks = neurons.marks_per_row(), partition = PARTITION_ROWS / MARK;
        const int64_t partitions = ceil_div(marks, partition), sum_channels = grad_weight ? e.channels : 0;
        const int64_t size = e.batch * partitions * sum_channels;
        Buffer<double> sum_weight(size), sum_bias(size);
        // Partition p of batch row b, from its last chunk to its first; after_chunk(m) follows each.
        auto run_partition = [&](int64_t b, int64_t p, auto after_chunk) {
            const int64_t at = (b * partitions + p) * sum_channels;
            NormSums sums(sum_channels, sum_weight + at, sum_bias + at);
            const int64_t last = (p + 1) * partition < marks ? (p + 1) * partition : marks;
            for (int64_t m = last - 1; m >= p * partition; m--) {
                norm_chunk(b, m, sums);
                after_chunk(m);
            }
        };
        if (rows_suffice(e, threads)) {
            parallel_for(e.batch, threads, e.elements(), [&](int64_t b) {
                const int64_t width = e.channels < LIF_BACKWARD_WIDTH ? e.channels : LIF_BACKWARD_WIDTH;
                LifScratch scratch(width, neurons.grad_tau != nullptr);
                Buffer<float> gv(e.channels);
                const size_t bytes = size_t(e.channels) * sizeof(float);
                if (grad_v) std::memcpy(gv, grad_v + b * e.channels, bytes);
                for (int64_t p = partitions - 1; p >= 0; p--) {
                    run_partition(b, p, [&](int64_t m) {
                        for (int64_t c0 = 0; c0 < e.channels; c0 += width) {
                            const int64_t n = e.channels - c0 < width ? e.channels - c0 : width;
                            neurons.chunk(b, m, c0, n, gv + c0, scratch);
                        }
                    });
                }
                std::memcpy(grad_v0 + b * e.channels, gv, bytes);
            });
        } else {
            parallel_for(e.batch * partitions, threads, e.elements(), [&](int64_t task) {
                run_partition(task / partitions, task % partitions, [](int64_t) {});
            });
            neurons.by_blocks(grad_v, grad_v0, threads);
        }
        // Not for a gradient of normed: that of an empty batch has no address, and the weights have a gradient of 0.
        if (grad_weight) {
            add_rows(sum_weight, e.batch * partitions, e.channels, e.channels, grad_weight);
            add_rows(sum_bias, e.batch * partitions, e.channels, e.channels, grad_bias);
        }
    }
};

template <typename T>
void forward(const float* x, const T* current, const float* v, const float* weight, const float* bias,
             const uint8_t* reset, const float* taus, const float* thresholds, float* x_out, float* normed,
             float* v_out, float* marks, float* mean, float* rstd, const Extent& e, const LifNormOptions& o, int threads) {
    const Neurons neurons(o.lif, taus, thresholds, e.channels);
    const Forward<T> pass{x, current, weight, bias, reset, x_out, normed, mean, rstd, e, o, neurons};
    pass.run(v, v_out, marks, threads);
}

template <typename T>
void backward(const T* current, const float* x_out, const float* weight, const uint8_t* reset, const float* taus,
              const float* thresholds, const float* marks, const float* mean, const float* rstd, const float* grad_out,
              const float* grad_normed, const float* grad_v, float* grad_x, T* grad_current, float* grad_v0,
              float* grad_weight, float* grad_bias, float* grad_tau, float* grad_threshold, const Extent& e,
              const LifNormOptions& o, int threads) {
    const Neurons neurons(o.lif, taus, thresholds, e.channels);
    const int64_t sums = grad_tau ? e.batch * e.channels : 0;
    Buffer<double> sum_tau(sums), sum_threshold(sums);
    const LifBackward<T, float> lif{neurons, e, marks, reset, current, grad_x, grad_current, sum_tau, sum_threshold};
    const Backward<T> pass{x_out, weight, mean, rstd, grad_out, grad_normed, grad_x, o, lif};
    pass.run(grad_v, grad_v0, grad_weight, grad_bias, threads);
    if (grad_tau) {
        add_rows(sum_tau, e.batch, e.channels, e.channels, grad_tau);
        add_rows(sum_threshold, e.batch, e.channels, e.channels, grad_threshold);
    }
}

}  // namespace

#define LIF_NORM(SUFFIX, T)                                                                                           \
    void lif_norm_forward_##SUFFIX(const float* x, const T* current, const float* v, const float* weight,             \
                                   const float* bias, const uint8_t* reset, const float* taus,                        \
                                   const float* thresholds, float* x_out, float* normed, float* v_out, float* marks,  \
                                   float* mean, float* rstd, int64_t B, int64_t L, int64_t C, LifNormOptions o,       \
                                   int32_t threads) {                                                                 \
        forward(x, current, v, weight, bias, reset, taus, thresholds, x_out, normed, v_out, marks, mean, rstd,        \
                {B, L, C}, o, threads);                                                                               \
    }                                                                                                                 \
    void lif_norm_backward_##SUFFIX(                                                                                  \
        const T* current, const float* x_out, const float* weight, const uint8_t* reset, const float* taus,           \
        const float* thresholds, const float* marks, const float* mean, const float* rstd, const float* grad_out,     \
        const float* grad_normed, const float* grad_v, float* grad_x, T* grad_current, float* grad_v0,                \
        float* grad_weight, float* grad_bias, float* grad_tau, float* grad_threshold, int64_t B, int64_t L,           \
        int64_t C, LifNormOptions o, int32_t threads) {                                                               \
        backward(current, x_out, weight, reset, taus, thresholds, marks, mean, rstd, grad_out, grad_normed, grad_v,   \
                 grad_x, grad_current, grad_v0, grad_weight, grad_bias, grad_tau, grad_threshold, {B, L, C}, o,       \
                 threads);                                                                                            \
    }

extern "C" {
LIF_NORM(f32, float)
LIF_NORM(bf16, bf16)
}
