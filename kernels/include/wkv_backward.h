// WKV backward over one chunk of one column: the gradients of its tokens, and the future before it.
//
// The chunk is recomputed from its mark, then scanned from its last token to its first; on the past's scale
// (`backward_moderate`) or by running maxima (`backward_general`), as in forward.
#pragma once

#include "wkv_forward.h"

namespace spikescale {
namespace wkv {

// The chunk's outputs and their gradients, at its first token. k null: only the future moves on.
template <typename T>
struct Gradients {
    const T* y;
    T *k, *v, *gate;
};

// Sums over the tokens of one chunk; shift is how far the mean of the past moves, where nothing is emptied.
struct Totals {
    vec w, u, shift;
};

// The gradient of y before the gate; that of the gate is stored.
template <bool FULL, typename T>
inline vec through_gate(const Tokens<T>& in, const Gradients<T>& grad, int i, vec y) {
    const vec g = load<FULL>(grad.y + i * in.stride, in.lanes);
    if (!in.gate) return g;
    const Sigmoid gate = sigmoid(load<FULL>(in.gate + i * in.stride, in.lanes));
    const vec before = g * gate.value;
    if (grad.k) store<FULL>(before * y * gate.rest, grad.gate + i * in.stride, in.lanes);
    return before;
}

// A sum one token further away.
inline vec further(const Column& c, vec sum) { return multiply_add(c.decay, sum, c.decay_rest * sum); }

template <bool FULL, typename T>
inline void backward_moderate(const Column& c, Past past, Future& future, const Tokens<T>& in,
                              const Gradients<T>& grad, Totals& totals) {
    struct {
        vec weight, over, pull, direct, apart, step, moved;
    } tokens[CHUNK];
    uint32_t moves = 0;  // bit i: the scale moved before token i
    const vec start = past.base;
    vec gu{}, shift{};
    for (int i = 0; i < in.count; i++) {
        in.prefetch(in.k, i);
        in.prefetch(in.v, i);
        in.prefetch(in.gate, i);
        in.prefetch(grad.y, i);
        in.prefetch(grad.gate, i);
        if (in.empties(i)) past.empty();
        auto& token = tokens[i];
        bool any_moved;
        const vec now = weigh(past, load<FULL>(in.k + i * in.stride, in.lanes), any_moved, token.moved);
        moves |= uint32_t(any_moved) << i;
        const vec out_now = c.bonus * now;
        const vec news = load<FULL>(in.v + i * in.stride, in.lanes) - past.mean;
        const vec inverse = reciprocal(past.b + out_now), news_over = news * inverse;
        token.weight = now;
        token.over = through_gate<FULL>(in, grad, i, multiply_add(out_now, news_over, past.mean)) * inverse;
        token.pull = token.over * out_now * news_over;
        token.direct = token.pull * past.b;
        gu += token.direct;
        const vec before = further(c, past.b);
        past.b = before + now;
        const vec news_later = reciprocal(past.b) * news;
        token.apart = before * news_later;
        token.step = now * news_later;
        past.mean += token.step;
        shift += token.step;
    }
    const vec rescale = exp_any(smaller(splat(80.0f), exponent(future, c, past.base)));
    vec s = rescale * future.s, d = rescale * future.d, s1 = rescale * future.s1, d1 = rescale * future.d1, gw{};
    for (int i = in.count - 1; i >= 0; i--) {
        const auto& token = tokens[i];
        in.prefetch(grad.k, i);
        in.prefetch(grad.v, i);
        if (grad.k) {
            const vec gk = multiply_add(token.weight, multiply_add(token.apart, s, -d), token.direct);
            store<FULL>(gk, grad.k + i * in.stride, in.lanes);
            store<FULL>(token.weight * multiply_add(c.bonus, token.over, s), grad.v + i * in.stride, in.lanes);
            gw = multiply_add(token.weight, multiply_add(token.apart, s1, -d1), gw);
        }
        // One token further away, with this token's output added; the centre moves to the mean before it.
        d = multiply_add(token.step, s, d);
        d1 = multiply_add(token.step, s1, d1);
        s1 = further(c, s1 + s);
        d1 = further(c, d1 + d);
        s = further(c, s) + token.over;
        d = further(c, d) + token.pull;
        if (moves >> i & 1) {
            s *= token.moved;
            d *= token.moved;
            s1 *= token.moved;
            d1 *= token.moved;
        }
        if (in.empties(i)) s = d = s1 = d1 = vec{};
    }
    future.s = s;
    future.d = d;
    future.s1 = s1;
    future.d1 = d1;
    future.high = start;
    future.low = future.age = vec{};
    totals.w += gw;
    totals.u += gu;
    totals.shift += shift;
}

// The future of the token before: one token further away, and with this one's output, of gradient g, in it.
inline void absorb(const Column& c, Future& f, vec g, const Token& token) {
    const vec one = splat(1.0f), older = f.age + 1.0f;
    const vec lead = multiply_add(-older, c.w, (f.high - token.high) + (f.low - token.low));
    const vec lower = exp_any(-absolute(lead));
    const mask taller = greater(lead, vec{});
    const vec far = choose(taller, lower, one);
    const vec near = choose(taller, one, lower) * (g * token.inverse);
    // The centre of D and D1 moves to the mean before this token.
    const vec out_step = token.out_share * token.news, step = token.past_share * token.news;
    const vec d = multiply_add(step, f.s, f.d);
    const vec d1 = multiply_add(step, f.s1, f.d1);
    f.s1 = far * (f.s1 + f.s);
    f.d1 = far * (d1 + d);
    f.s = multiply_add(far, f.s, near);
    f.d = multiply_add(far, d, near * out_step);
    f.high = choose(taller, token.high, f.high);
    f.low = choose(taller, token.low, f.low);
    f.age = choose(taller, vec{}, older);
}

template <bool FULL, typename T>
inline void backward_general(const Column& c, Past past, Future& future, const Tokens<T>& in,
                             const Gradients<T>& grad, Totals& totals) {
    Token tokens[CHUNK];
    vec g[CHUNK], gw{}, gu{};
    for (int i = 0; i < in.count; i++) {
        if (in.empties(i)) past.empty();
        const vec k = load<FULL>(in.k + i * in.stride, in.lanes), v = load<FULL>(in.v + i * in.stride, in.lanes);
        const vec y = advance<true>(c, past, k, v, &tokens[i]);
        g[i] = through_gate<FULL>(in, grad, i, y);
    }
    for (int i = in.count - 1; i >= 0; i--) {
        const Token& token = tokens[i];
        if (grad.k) {
            const vec own = token.out_share * g[i];
            // e^key times the future: never above 1 but for rounding, as the key is part of every later denominator.
            const vec later = exp_any(exponent(future, c, token.key));
            const vec direct = own * (token.out_rest * token.news);
            const vec apart = token.past_rest * token.news;
            const vec gk = multiply_add(later, multiply_add(apart, future.s, -future.d), direct);
            store<FULL>(gk, grad.k + i * in.stride, in.lanes);
            store<FULL>(multiply_add(later, future.s, own), grad.v + i * in.stride, in.lanes);
            gu += direct;
            gw = multiply_add(later, multiply_add(apart, future.s1, -future.d1), gw);
        }
        absorb(c, future, g[i], token);
        totals.shift = multiply_add(token.past_share, token.news, totals.shift);
        if (in.empties(i)) future.empty();
    }
    totals.w += gw;
    totals.u += gu;
}

template <bool FULL, typename T>
inline void backward_chunk(const Column& c, const Past& past, Future& future, const Tokens<T>& in,
                           const Gradients<T>& grad, Totals& totals) {
    if (c.moderate)
        backward_moderate<FULL>(c, past, future, in, grad, totals);
    else
        backward_general<FULL>(c, past, future, in, grad, totals);
}

}  // namespace wkv
}  // namespace spikescale
