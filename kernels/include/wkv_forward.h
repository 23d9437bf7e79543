// WKV forward over one chunk of one column: y, and the past after it.
//
// Where w and u of all channels of a register are moderate, the past's scale rests as long as keys and past stay near
// it (`weigh`: one exponential a token); elsewhere it follows the running maximum (`advance`: two). What comes later,
// and the keys and values of other channels, change no bit of what a channel computes at a token. The w and u of its
// neighbours in the register do: they choose between the two ways, which differ by rounding.
#pragma once

#include "wkv_state.h"

namespace spikescale {
namespace wkv {

// What backward needs of one token. Shares are of the current token in the output (with its bonus) and in
// the past once it has been absorbed (without); each has its complement, which 1 - share would not give
// accurately. The output's denominator is e^(high + low) / inverse, high being a key exactly.
struct Token {
    vec key, news;  // news: the value less the mean of the past
    vec out_share, out_rest, past_share, past_rest;
    vec inverse, high, low;
};

// One token: its output, and the past with it absorbed.
template <bool KEEP>
inline vec advance(const Column& c, Past& p, vec k, vec v, Token* token) {
    const vec one = splat(1.0f), key = checked_key(k);
    const vec above = key - p.base, low_bits = lost(key, p.base, above);
    const vec news = v - p.mean;
    // Output: the past against the current token with its bonus.
    const vec out_lead = multiply_add(-p.age, c.w, above) + (c.u + low_bits);
    const vec out_lower = exp_any(-absolute(out_lead));
    const mask out_taller = greater(out_lead, vec{});
    const vec out_now = choose(out_taller, one, out_lower);
    const vec out_past = choose(out_taller, out_lower, one) * p.b;
    const vec inverse = 1.0f / (out_past + out_now);
    const vec out_share = out_now * inverse;
    const vec y = multiply_add(out_share, news, p.mean);
    // Update: the past, one token older, against the current token without the bonus.
    const vec older = p.age + 1.0f;
    const vec lead = multiply_add(-older, c.w, above) + low_bits;
    const vec lower = exp_any(-absolute(lead));
    const mask taller = greater(lead, vec{});
    const vec now = choose(taller, one, lower);
    const vec past = choose(taller, lower, one) * p.b;
    const vec sum = past + now;
    const vec past_share = now / sum;
    if (KEEP) {
        token->key = key;
        token->news = news;
        token->out_share = out_share;
        token->out_rest = out_past * inverse;
        token->past_share = past_share;
        token->past_rest = past / sum;
        token->inverse = inverse;
        token->high = choose(out_taller, key, p.base);
        token->low = choose(out_taller, c.u, p.age * c.w);
    }
    p.mean = multiply_add(past_share, news, p.mean);
    p.b = sum;
    p.base = choose(taller, key, p.base);
    p.age = choose(taller, vec{}, older);
    return y;
}

// The scale of a moderate column fitted to the key: e^(key - scale) is returned, and `moved` is what one unit of
// the old scale weighs on the new one, where any has moved.
inline vec weigh(Past& p, vec k, bool& any_moved, vec& moved) {
    vec above = k - p.base;
    const mask near = both(at_least(splat(KEY_ABOVE), above), at_least(above, splat(-KEY_BELOW)));
    any_moved = !all(both(near, at_least(p.b, splat(FAINT_PAST))));
    if (__builtin_expect(!any_moved, 1)) return exp_moderate(above);
    const vec key = checked_key(k);
    above = key - p.base;
    const mask rises = greater(above, splat(KEY_ABOVE)), sinks = both(greater(p.b, vec{}), greater(splat(FAINT_PAST), p.b));
    const vec base = choose(rises, key, choose(sinks, p.base - STEP_DOWN, p.base));
    moved = exp_any(p.base - base);
    p.b *= moved;
    p.base = base;
    return exp_any(key - base);
}

template <bool FULL, typename T>
inline void forward_moderate(const Column& c, Past& past, const Tokens<T>& in, T* y) {
    for (int i = 0; i < in.count; i++) {
        in.prefetch(in.k, i);
        in.prefetch(in.v, i);
        in.prefetch(in.gate, i);
        in.prefetch(y, i);
        if (in.empties(i)) past.empty();
        bool any_moved;
        vec moved;
        const vec now = weigh(past, load<FULL>(in.k + i * in.stride, in.lanes), any_moved, moved);
        const vec news = load<FULL>(in.v + i * in.stride, in.lanes) - past.mean;
        if (y) {
            const vec out_now = c.bonus * now;
            vec out = multiply_add(out_now * reciprocal(past.b + out_now), news, past.mean);
            if (in.gate) out *= sigmoid(load<FULL>(in.gate + i * in.stride, in.lanes)).value;
            store<FULL>(out, y + i * in.stride, in.lanes);
        }
        past.b = multiply_add(c.decay, past.b, multiply_add(c.decay_rest, past.b, now));
        past.mean = multiply_add(now * reciprocal(past.b), news, past.mean);
    }
}

// y may be null: then only the past moves on.
template <bool FULL, typename T>
inline void forward_chunk(const Column& c, Past& past, const Tokens<T>& in, T* y) {
    if (c.moderate) return forward_moderate<FULL>(c, past, in, y);
    for (int i = 0; i < in.count; i++) {
        if (in.empties(i)) past.empty();
        const vec k = load<FULL>(in.k + i * in.stride, in.lanes), v = load<FULL>(in.v + i * in.stride, in.lanes);
        vec out = advance<false>(c, past, k, v, nullptr);
        if (!y) continue;
        if (in.gate) out *= sigmoid(load<FULL>(in.gate + i * in.stride, in.lanes)).value;
        store<FULL>(out, y + i * in.stride, in.lanes);
    }
}

}  // namespace wkv
}  // namespace spikescale
