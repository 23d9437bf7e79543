// LayerNorm of one row, forward and backward, for the kernels that contain it. Sums run in 64 accumulators, element
// c into accumulator c % 64, which are then added in a fixed order: the same bits on every instruction set.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace spikescale {

constexpr int64_t CHUNK_ROWS = 16;       // rows whose weight gradients are summed in float32, then in float64
constexpr int64_t PARTITION_ROWS = 256;  // rows that share one float64 sum; a constant, so that results do not
                                         // depend on the number of threads
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int SUMS = 64 / WIDTH;

typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float))));

inline Floats load_floats(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The n < WIDTH elements at `from`, then `rest`.
inline Floats load_some(const float* from, int64_t n, float rest) {
    Floats x = rest - Floats{};
    for (int64_t j = 0; j < n; j++) x[j] = from[j];
    return x;
}

inline double total(const Floats* sums) {
    alignas(64) float parts[64];
    double wide[16];
    std::memcpy(parts, sums, sizeof parts);
    for (int j = 0; j < 16; j++) wide[j] = double((parts[j] + parts[j + 16]) + (parts[j + 32] + parts[j + 48]));
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++) wide[j] += wide[j + width];
    return wide[0];
}

// Loads a vector of a row at one place: load(row, rest) gives `rest` beyond the row's end.
struct Load {
    int64_t c, left;
    Floats operator()(const float* row, float rest) const {
        return left >= WIDTH ? load_floats(row + c) : load_some(row + c, left, rest);
    }
};
struct LoadWhole {
    int64_t c;
    Floats operator()(const float* row, float) const { return load_floats(row + c); }
};

// The sums over n channels of the N vectors that terms(load, vectors) computes at one place.
template <int N, typename Terms>
inline void sum_row(int64_t n, Terms terms, double* totals) {
    Floats sums[N][SUMS] = {}, vectors[N];
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
#pragma GCC unroll 16
        for (int k = 0; k < SUMS; k++) {
            terms(LoadWhole{c + k * WIDTH}, vectors);
            for (int i = 0; i < N; i++) sums[i][k] += vectors[i];
        }
    }
    for (int k = 0; c < n; c += WIDTH, k++) {
        terms(Load{c, n - c}, vectors);
        for (int i = 0; i < N; i++) sums[i][k] += vectors[i];
    }
    for (int i = 0; i < N; i++) totals[i] = total(sums[i]);
}

struct Moments {
    float mean, rstd;
};

// out = (x - mean) * rstd * weight + bias over n channels. The variance is that of the differences from the mean.
NOINLINE inline Moments norm_row(const float* x, int64_t n, double eps, const float* weight, const float* bias,
                                 float* out) {
    double sum, squares;
    sum_row<1>(n, [=](auto load, Floats* term) { *term = load(x, 0.0f); }, &sum);
    const float mean = float(sum / double(n));
    sum_row<1>(
        n,
        [=](auto load, Floats* term) {
            const Floats d = load(x, mean) - mean;
            *term = d * d;
        },
        &squares);
    const float rstd = float(1.0 / std::sqrt(squares / double(n) + eps));
#pragma omp simd
    for (int64_t c = 0; c < n; c++) out[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
    return {mean, rstd};
}

// The gradient of x, plus `added` if not null. The gradients of weight and bias are added to theirs.
NOINLINE inline void norm_backward_row(const float* x, int64_t n, Moments m, const float* weight, const float* grad,
                                       const float* added, float* grad_x, float* grad_weight, float* grad_bias) {
    double sums[2];
    sum_row<2>(
        n,
        [=](auto load, Floats* term) {
            term[0] = load(grad, 0.0f) * load(weight, 0.0f);
            term[1] = term[0] * ((load(x, m.mean) - m.mean) * m.rstd);
        },
        sums);
    const float mean_g = float(sums[0] / double(n)), mean_gx = float(sums[1] / double(n));
    with_bool(added != nullptr, [&](auto has_added) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            const float x_hat = (x[c] - m.mean) * m.rstd;
            const float g = m.rstd * (grad[c] * weight[c] - mean_g - x_hat * mean_gx);
            grad_weight[c] += grad[c] * x_hat;
            grad_bias[c] += grad[c];
            grad_x[c] = decltype(has_added)::value ? g + added[c] : g;
        }
    });
}

// Gradients of weight and bias: float32 over a few rows, float64 over a partition.
class NormSums {
  public:
    NormSums(int64_t channels, double* weight, double* bias)
        : chunk_weight(channels), chunk_bias(channels), channels_(channels), weight_(weight), bias_(bias) {}

    // To be called after every CHUNK_ROWS rows.
    void flush() {
        for (int64_t c = 0; c < channels_; c++) {
            weight_[c] += double(chunk_weight[c]);
            bias_[c] += double(chunk_bias[c]);
            chunk_weight[c] = chunk_bias[c] = 0.0f;
        }
    }

    Buffer<float> chunk_weight, chunk_bias;

  private:
    int64_t channels_;
    double *weight_, *bias_;
};

}  // namespace spikescale
