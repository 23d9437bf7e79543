// LayerNorm over rows of contiguous float32 channels, forward and backward. The maths is in README.md.

#include "norm.h"

using namespace spikescale;

extern "C" {

// x and y are (rows, C); weight and bias (C,); mean and rstd (rows,).
void layer_norm_forward(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd,
                        int64_t rows, int64_t channels, double eps, int32_t threads) {
    parallel_for(ceil_div(rows, CHUNK_ROWS), threads, rows * channels, [=](int64_t chunk) {
        const int64_t end = (chunk + 1) * CHUNK_ROWS < rows ? (chunk + 1) * CHUNK_ROWS : rows;
        for (int64_t r = chunk * CHUNK_ROWS; r < end; r++) {
            const Moments m = norm_row(x + r * channels, channels, eps, weight, bias, y + r * channels);
            mean[r] = m.mean;
            rstd[r] = m.rstd;
        }
    });
}

void layer_norm_backward(const float* x, const float* weight, const float* mean, const float* rstd, const float* grad_y,
                         float* grad_x, float* grad_weight, float* grad_bias, int64_t rows, int64_t channels,
                         int32_t threads) {
    const int64_t partitions = ceil_div(rows, PARTITION_ROWS);
    Buffer<double> sum_weight(partitions * channels), sum_bias(partitions * channels);
    parallel_for(partitions, threads, rows * channels, [&](int64_t partition) {
        NormSums sums(channels, sum_weight + partition * channels, sum_bias + partition * channels);
        const int64_t end = (partition + 1) * PARTITION_ROWS < rows ? (partition + 1) * PARTITION_ROWS : rows;
        for (int64_t r = partition * PARTITION_ROWS; r < end; r++) {
            const int64_t at = r * channels;
            norm_backward_row(x + at, channels, {mean[r], rstd[r]}, weight, grad_y + at, nullptr, grad_x + at,
                              sums.chunk_weight, sums.chunk_bias);
            if ((r + 1) % CHUNK_ROWS == 0 || r + 1 == end) sums.flush();
        }
    });
    add_rows(sum_weight, partitions, channels, channels, grad_weight);
    add_rows(sum_bias, partitions, channels, channels, grad_bias);
}
}
