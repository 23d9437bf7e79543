// relu(x)^2 and sigmoid(gate) * x, forward and backward, on CPU: any contiguous tensors of n elements.

#include "parallel.h"
#include "simd.h"

using namespace spikescale;

namespace {

constexpr int64_t BLOCK = 8192;

// Calls body(first, end) for blocks of elements.
template <typename Body>
inline void for_each_range(int64_t n, int threads, Body body) {
    parallel_for(ceil_div(n, BLOCK), threads, n, [&](int64_t block) {
        const int64_t first = block * BLOCK;
        body(first, first + BLOCK < n ? first + BLOCK : n);
    });
}

template <typename T>
void squared_relu(const T* x, T* y, int64_t n, int threads) {
    for_each_range(n, threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; i++) {
            const float in = to_float(x[i]);
            const float r = in <= 0.0f ? 0.0f : in;  // a NaN stays
            y[i] = from_float<T>(r * r);
        }
    });
}

template <typename T>
void squared_relu_grad(const T* x, const T* g, T* gx, int64_t n, int threads) {
    for_each_range(n, threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; i++) {
            const float in = to_float(x[i]);
            const float r = in <= 0.0f ? 0.0f : in;
            gx[i] = from_float<T>(to_float(g[i]) * (2.0f * r));
        }
    });
}

// sigmoid(x) and 1 - sigmoid(x), both accurate: no exponential of a positive number, no subtraction.
inline void sigmoid(float x, float& share, float& rest) {
    const float e = exp_f(-std::fabs(x));
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    share = x < 0.0f ? smaller : larger;
    rest = x < 0.0f ? larger : smaller;
}

template <typename T>
void sigmoid_gate(const T* gate, const T* x, T* y, int64_t n, int threads) {
    for_each_range(n, threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; i++) {
            float share, rest;
            sigmoid(to_float(gate[i]), share, rest);
            y[i] = from_float<T>(share * to_float(x[i]));
        }
    });
}

template <typename T>
void sigmoid_gate_grad(const T* gate, const T* x, const T* g, T* g_gate, T* gx, int64_t n, int threads) {
    for_each_range(n, threads, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; i++) {
            float share, rest;
            sigmoid(to_float(gate[i]), share, rest);
            const float through = to_float(g[i]) * share;
            gx[i] = from_float<T>(through);
            g_gate[i] = from_float<T>(through * rest * to_float(x[i]));
        }
    });
}

}  // namespace

extern "C" {

void squared_relu_f32(const float* x, float* y, int64_t n, int32_t threads) { squared_relu(x, y, n, threads); }

void squared_relu_bf16(const bf16* x, bf16* y, int64_t n, int32_t threads) { squared_relu(x, y, n, threads); }

void squared_relu_grad_f32(const float* x, const float* g, float* gx, int64_t n, int32_t threads) {
    squared_relu_grad(x, g, gx, n, threads);
}

void squared_relu_grad_bf16(const bf16* x, const bf16* g, bf16* gx, int64_t n, int32_t threads) {
    squared_relu_grad(x, g, gx, n, threads);
}

void sigmoid_gate_f32(const float* gate, const float* x, float* y, int64_t n, int32_t threads) {
    sigmoid_gate(gate, x, y, n, threads);
}

void sigmoid_gate_bf16(const bf16* gate, const bf16* x, bf16* y, int64_t n, int32_t threads) {
    sigmoid_gate(gate, x, y, n, threads);
}

void sigmoid_gate_grad_f32(const float* gate, const float* x, const float* g, float* g_gate, float* gx, int64_t n,
                           int32_t threads) {
    sigmoid_gate_grad(gate, x, g, g_gate, gx, n, threads);
}

void sigmoid_gate_grad_bf16(const bf16* gate, const bf16* x, const bf16* g, bf16* g_gate, bf16* gx, int64_t n,
                            int32_t threads) {
    sigmoid_gate_grad(gate, x, g, g_gate, gx, n, threads);
}
}
