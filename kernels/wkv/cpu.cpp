// WKV, forward and backward, on CPU. The maths is in README.md.
//
// Tensors are contiguous: k, v, y and their gradients are (B, T, C); state and its gradients are
// (B, 3, C) float32 rows a, b, m; w and u are (C); reset is (B, T) bytes or null; marks, what forward
// leaves for backward, is (B, ceil(T / CHUNK), 4, C) float32.
//
// A sum over tokens is carried as (mantissa, base, age) standing for mantissa * e^(base + age w): base
// is the exponent of the term that was largest when it came, age the tokens since. Adding w to a
// running exponent every token instead would lose its low bits when keys are far from 0.

#include "simd.h"

using namespace spikescale;

namespace {

constexpr float EMPTY = -1e38f;
constexpr int CHUNK = 16;  // tokens between two marks, recomputed together in backward

// A key of +inf has no defined weight; as a NaN it cannot pass unseen. One of -inf has the weight 0.
inline float checked_key(float k) {
    k = k < -FLT_MAX ? -FLT_MAX : k;
    return k > FLT_MAX ? std::numeric_limits<float>::quiet_NaN() : k;
}

// What a - b loses to rounding (Knuth's two-sum).
inline float lost(float a, float b, float difference) {
    const float back = difference - a;
    return (a - (difference - back)) - (b + back);
}

// The past of one block of channels: b, the sum of the weights, and the mean of the values under them.
struct Past {
    float mean[LANES], b[LANES], base[LANES], age[LANES];

    void empty() {
        for (float* row : {mean, b, age}) fill(row, 0.0f);
        fill(base, EMPTY);
    }
};

// What backward needs of one token. Shares are of the current token in the output (with its bonus) and in
// the past once it has been absorbed (without); each has its complement, which 1 - share would not give
// accurately. The output's denominator is e^(high + low) / inverse, high being a key exactly.
struct Token {
    float key[LANES], news[LANES];  // news: the value less the mean of the past
    float out_share[LANES], out_rest[LANES], past_share[LANES], past_rest[LANES];
    float inverse[LANES], high[LANES], low[LANES];
};

// One token: its output y, and the past with it absorbed.
template <bool KEEP>
inline void advance(Past& p, const float* w, const float* u, const float* k, const float* v, float* y, Token* token) {
    for (int j = 0; j < LANES; j++) {
        const float key = checked_key(k[j]);
        const float above = key - p.base[j], low_bits = lost(key, p.base[j], above);
        const float news = v[j] - p.mean[j];
        // Output: the past against the current token with its bonus.
        const float out_lead = multiply_add(-p.age[j], w[j], above) + (u[j] + low_bits);
        const float out_smaller = exp_f(-std::fabs(out_lead));
        const bool out_taller = out_lead > 0.0f;
        const float out_now = out_taller ? 1.0f : out_smaller;
        const float out_past = (out_taller ? out_smaller : 1.0f) * p.b[j];
        const float inverse = 1.0f / (out_past + out_now);
        const float out_share = out_now * inverse;
        y[j] = multiply_add(out_share, news, p.mean[j]);
        // Update: the past, one token older, against the current token without the bonus.
        const float older = p.age[j] + 1.0f;
        const float lead = multiply_add(-older, w[j], above) + low_bits;
        const float smaller = exp_f(-std::fabs(lead));
        const bool taller = lead > 0.0f;
        const float now = taller ? 1.0f : smaller;
        const float past = (taller ? smaller : 1.0f) * p.b[j];
        const float sum = past + now;
        const float past_share = now / sum;
        if (KEEP) {
            token->key[j] = key;
            token->news[j] = news;
            token->out_share[j] = out_share;
            token->out_rest[j] = out_past * inverse;
            token->past_share[j] = past_share;
            token->past_rest[j] = past / sum;
            token->inverse[j] = inverse;
            token->high[j] = out_taller ? key : p.base[j];
            token->low[j] = out_taller ? u[j] : p.age[j] * w[j];
        }
        p.mean[j] = multiply_add(past_share, news, p.mean[j]);
        p.b[j] = sum;
        p.base[j] = taller ? key : p.base[j];
        p.age[j] = taller ? 0.0f : older;
    }
}

template <bool FULL, typename T>
void forward_block(const float* w_in, const float* u_in, const T* k_in, const T* v_in, const float* state,
                   const uint8_t* reset, T* y_out, float* state_out, float* marks, int64_t length, int64_t channels,
                   int n) {
    float w[LANES], u[LANES], k[LANES], v[LANES], y[LANES];
    Past past;
    for (float* row : {w, u, k, v}) fill(row, 0.0f);
    past.empty();
    load<FULL>(w_in, n, w);
    load<FULL>(u_in, n, u);
    load<FULL>(state + channels, n, past.b);
    load<FULL>(state + 2 * channels, n, past.base);
    for (int j = 0; j < n; j++) past.mean[j] = past.b[j] == 0.0f ? 0.0f : state[j] / past.b[j];
    for (int64_t t = 0; t < length; t++) {
        if (marks && t % CHUNK == 0) {
            float* mark = marks + t / CHUNK * 4 * channels;
            for (const float* row : {past.mean, past.b, past.base, past.age}) {
                store<FULL>(row, n, mark);
                mark += channels;
            }
        }
        if (reset && reset[t]) past.empty();
        load<FULL>(k_in + t * channels, n, k);
        load<FULL>(v_in + t * channels, n, v);
        advance<false>(past, w, u, k, v, y, nullptr);
        store<FULL>(y, n, y_out + t * channels);
    }
    for (int j = 0; j < n; j++) {
        // m = base + age w is rounded once, here, and the rounding made good in a and b.
        const bool empty = past.base[j] <= EMPTY / 2;
        const double exact = double(past.base[j]) + double(past.age[j]) * double(w[j]);
        const float m = empty ? EMPTY : float(exact);
        const double scale = empty ? 1.0 : std::exp(exact - double(m));
        state_out[j] = float(past.mean[j] * (past.b[j] * scale));
        state_out[channels + j] = float(past.b[j] * scale);
        state_out[2 * channels + j] = m;
    }
}

// What the tokens after t say about token t: the sums S, D and their first moments S1, D1 of README.md, all
// times e^-(high + low - age w).
struct Future {
    float s[LANES], d[LANES], s1[LANES], d1[LANES], high[LANES], low[LANES], age[LANES];

    void empty() {
        for (float* row : {s, d, s1, d1, low, age}) fill(row, 0.0f);
        fill(high, -EMPTY);
    }
};

// e^key times a sum of Future: never above 1 but for rounding, as the key is part of every later denominator.
inline float weight(const Future& f, const float* w, float key, int j) {
    return exp_f(multiply_add(f.age[j], w[j], (key - f.high[j]) - f.low[j]));
}

// The future of the token before: one token further away, and with this one's output, of gradient g, in it.
inline void absorb(Future& f, const float* w, const float* g, const Token& token) {
    for (int j = 0; j < LANES; j++) {
        const float older = f.age[j] + 1.0f;
        const float lead = multiply_add(-older, w[j], (f.high[j] - token.high[j]) + (f.low[j] - token.low[j]));
        const float smaller = exp_f(-std::fabs(lead));
        const bool taller = lead > 0.0f;
        const float far = taller ? smaller : 1.0f;
        const float near = (taller ? 1.0f : smaller) * (g[j] * token.inverse[j]);
        // The centre of D and D1 moves to the mean before this token.
        const float out_step = token.out_share[j] * token.news[j], past_step = token.past_share[j] * token.news[j];
        const float d = multiply_add(past_step, f.s[j], f.d[j]);
        const float d1 = multiply_add(past_step, f.s1[j], f.d1[j]);
        f.s1[j] = far * (f.s1[j] + f.s[j]);
        f.d1[j] = far * (d1 + d);
        f.s[j] = multiply_add(far, f.s[j], near);
        f.d[j] = multiply_add(far, d, near * out_step);
        f.high[j] = taller ? token.high[j] : f.high[j];
        f.low[j] = taller ? token.low[j] : f.low[j];
        f.age[j] = taller ? 0.0f : older;
    }
}

template <bool FULL, typename T>
void backward_block(const float* w_in, const float* u_in, const T* k_in, const T* v_in, const uint8_t* reset,
                    const float* marks, const float* state_out, const T* g_in, const float* grad_state_out,
                    double* grad_w, double* grad_u, T* grad_k, T* grad_v, float* grad_state, int64_t length,
                    int64_t channels, int n) {
    float w[LANES], u[LANES], k[LANES], v[LANES], y[LANES], g[LANES], gk[LANES], gv[LANES], gw[LANES], gu[LANES];
    double gw_total[LANES] = {}, gu_total[LANES] = {};
    Past past;
    Token tokens[CHUNK];
    Future future;
    for (float* row : {w, u, k, v, g}) fill(row, 0.0f);
    past.empty();
    future.empty();
    load<FULL>(w_in, n, w);
    load<FULL>(u_in, n, u);
    const int64_t last_chunk = (length - 1) / CHUNK;
    for (int64_t chunk = last_chunk; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK;
        const int count = int(length - first < CHUNK ? length - first : CHUNK);
        const float* mark = marks + chunk * 4 * channels;
        for (float* row : {past.mean, past.b, past.base, past.age}) {
            load<FULL>(mark, n, row);
            mark += channels;
        }
        for (int i = 0; i < count; i++) {
            if (reset && reset[first + i]) past.empty();
            load<FULL>(k_in + (first + i) * channels, n, k);
            load<FULL>(v_in + (first + i) * channels, n, v);
            advance<true>(past, w, u, k, v, y, &tokens[i]);
        }
        if (chunk == last_chunk && grad_state_out) {
            // The final sums are the output of one more token, of exponent m, linear in a and b.
            for (int j = 0; j < n; j++) {
                future.s[j] = grad_state_out[j];
                future.d[j] = -grad_state_out[channels + j] - past.mean[j] * grad_state_out[j];
                future.high[j] = state_out[2 * channels + j];
            }
        }
        fill(gw, 0.0f);
        fill(gu, 0.0f);
        for (int i = count - 1; i >= 0; i--) {
            const int64_t at = (first + i) * channels;
            const Token& token = tokens[i];
            load<FULL>(g_in + at, n, g);
            for (int j = 0; j < LANES; j++) {
                const float own = token.out_share[j] * g[j];
                const float later = weight(future, w, token.key[j], j);
                const float direct = own * (token.out_rest[j] * token.news[j]);
                const float apart = token.past_rest[j] * token.news[j];
                gv[j] = multiply_add(later, future.s[j], own);
                gk[j] = multiply_add(later, multiply_add(apart, future.s[j], -future.d[j]), direct);
                gu[j] += direct;
                gw[j] += later * multiply_add(apart, future.s1[j], -future.d1[j]);
            }
            store<FULL>(gk, n, grad_k + at);
            store<FULL>(gv, n, grad_v + at);
            absorb(future, w, g, token);
            if (reset && reset[first + i]) future.empty();
        }
        for (int j = 0; j < LANES; j++) {
            gw_total[j] += gw[j];
            gu_total[j] += gu[j];
        }
    }
    for (int j = 0; j < n; j++) {
        // The initial sums are one more token before the first, of exponent m.
        const float mean = marks[j], b = marks[channels + j], m = marks[2 * channels + j];
        const float scale = weight(future, w, m, j);
        grad_state[j] = scale * future.s[j];
        grad_state[channels + j] = -scale * multiply_add(mean, future.s[j], future.d[j]);
        grad_state[2 * channels + j] = 0.0f;
        grad_w[j] = gw_total[j] - double(scale * b * future.d1[j]);
        grad_u[j] = gu_total[j];
    }
}

template <typename T>
void forward(const float* w, const float* u, const T* k, const T* v, const float* state, const uint8_t* reset, T* y,
             float* state_out, float* marks, int64_t B, int64_t L, int64_t C, int threads) {
    const int64_t size = (L + CHUNK - 1) / CHUNK * 4 * C;
    for_each_block(B, L, C, threads, [&](int64_t b, int64_t c0, int n) {
        const int64_t at = b * L * C + c0, at_state = b * 3 * C + c0;
        auto block = n == LANES ? forward_block<true, T> : forward_block<false, T>;
        block(w + c0, u + c0, k + at, v + at, state + at_state, reset ? reset + b * L : nullptr, y + at,
              state_out + at_state, marks ? marks + b * size + c0 : nullptr, L, C, n);
    });
}

template <typename T>
void backward(const float* w, const float* u, const T* k, const T* v, const uint8_t* reset, const float* marks,
              const float* state_out, const T* g, const float* grad_state_out, double* grad_w, double* grad_u,
              T* grad_k, T* grad_v, float* grad_state, int64_t B, int64_t L, int64_t C, int threads) {
    const int64_t size = (L + CHUNK - 1) / CHUNK * 4 * C;
    for_each_block(B, L, C, threads, [&](int64_t b, int64_t c0, int n) {
        const int64_t at = b * L * C + c0, at_state = b * 3 * C + c0, at_sum = b * C + c0;
        auto block = n == LANES ? backward_block<true, T> : backward_block<false, T>;
        block(w + c0, u + c0, k + at, v + at, reset ? reset + b * L : nullptr, marks + b * size + c0,
              state_out + at_state, g + at, grad_state_out ? grad_state_out + at_state : nullptr, grad_w + at_sum,
              grad_u + at_sum, grad_k + at, grad_v + at, grad_state + at_state, L, C, n);
    });
}

}  // namespace

extern "C" {

int32_t wkv_chunk() { return CHUNK; }

void wkv_forward_f32(const float* w, const float* u, const float* k, const float* v, const float* state,
                     const uint8_t* reset, float* y, float* state_out, float* marks, int64_t B, int64_t L, int64_t C,
                     int32_t threads) {
    forward(w, u, k, v, state, reset, y, state_out, marks, B, L, C, threads);
}

void wkv_backward_f32(const float* w, const float* u, const float* k, const float* v, const uint8_t* reset,
                      const float* marks, const float* state_out, const float* g, const float* grad_state_out,
                      double* grad_w, double* grad_u, float* grad_k, float* grad_v, float* grad_state, int64_t B,
                      int64_t L, int64_t C, int32_t threads) {
    backward(w, u, k, v, reset, marks, state_out, g, grad_state_out, grad_w, grad_u, grad_k, grad_v, grad_state, B, L,
             C, threads);
}

void wkv_forward_bf16(const float* w, const float* u, const bf16* k, const bf16* v, const float* state,
                     const uint8_t* reset, bf16* y, float* state_out, float* marks, int64_t B, int64_t L, int64_t C,
                     int32_t threads) {
    forward(w, u, k, v, state, reset, y, state_out, marks, B, L, C, threads);
}

void wkv_backward_bf16(const float* w, const float* u, const bf16* k, const bf16* v, const uint8_t* reset,
                      const float* marks, const float* state_out, const bf16* g, const float* grad_state_out,
                      double* grad_w, double* grad_u, bf16* grad_k, bf16* grad_v, float* grad_state, int64_t B,
                      int64_t L, int64_t C, int32_t threads) {
    backward(w, u, k, v, reset, marks, state_out, g, grad_state_out, grad_w, grad_u, grad_k, grad_v, grad_state, B, L,
             C, threads);
}
}
