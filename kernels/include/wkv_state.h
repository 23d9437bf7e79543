// What the WKV kernels carry through time for one column, that is for the WIDTH channels of one register:
// forward the past, backward the future. The maths is in wkv/README.md.
//
// A sum over tokens is a mantissa times e^exponent, and the exponent is kept as (base, age) standing for
// base + age w, or as (high, low, age): adding w to a running exponent every token instead would lose its
// low bits when keys are far from 0.
#pragma once

#include <initializer_list>

#include "wkv_vector.h"

namespace spikescale {
namespace wkv {

constexpr float EMPTY = -1e38f;
constexpr int CHUNK = 16;  // tokens between two marks, recomputed together in backward

// Where the past's scale stays as it is: see "A scale that rests" in README.md.
constexpr float KEY_ABOVE = 20.0f;     // how far a key may lie above it
constexpr float KEY_BELOW = 80.0f;     // and below, before its exponential must be guarded
constexpr float FAINT_PAST = 1e-13f;   // about e^-30: a past lighter than this has the scale lowered
constexpr float STEP_DOWN = 30.0f;     // by this much
constexpr float BONUS_LIMIT = 20.0f;   // of |u|
constexpr float DECAY_LIMIT = 25.0f;   // of |w|: below STEP_DOWN, so that the scale can follow the past

struct Column {
    vec w, u;
    vec decay, decay_rest, bonus;  // e^w in two parts, rounded and what that lost; e^u
    bool moderate;                 // whether w and u allow a scale that rests
};

// The tokens of one chunk in one column. Rows are `stride` apart and hold `lanes` channels of it.
template <typename T>
struct Tokens {
    const T *k, *v, *gate;  // gate: null for none
    const uint8_t* reset;   // null for none
    int64_t stride;
    int count, lanes;
    int ahead;  // from these tokens to those whose turn is next: CHUNK, -CHUNK, or 0 at the end

    bool empties(int i) const { return reset && reset[i]; }

    // Asks for the row of the token whose turn is next where token i is now, of a tensor whose rows of these tokens
    // start at `rows` or null. The hardware does not see where the next row is, one row of all channels away. A row at
    // a time, between the arithmetic: a burst would fill the queue of misses, and wait. Not into the smallest cache,
    // where rows a power of two apart fall on one another.
    void prefetch(const T* rows, int i) const {
        if (!rows || !ahead) return;
        __builtin_prefetch((const void*)(uintptr_t(rows) + (i + ahead) * stride * int64_t(sizeof(T))), 0, 2);
    }
};

// The past: the sum of the weights, b e^(base + age w), and the mean of the values under them. In a moderate column
// the age is 0.
struct Past {
    vec mean, b, base, age;

    void empty() {
        mean = b = age = vec{};
        base = splat(EMPTY);
    }
};

// What the tokens after t say about token t: the sums S, D and their first moments S1, D1, all times
// e^-(high + low - age w).
struct Future {
    vec s, d, s1, d1, high, low, age;

    void empty() {
        s = d = s1 = d1 = low = age = vec{};
        high = splat(-EMPTY);
    }
};

// What a - b loses to rounding (Knuth's two-sum).
inline vec lost(vec a, vec b, vec difference) {
    const vec back = difference - a;
    return (a - (difference - back)) - (b + back);
}

// A key of +inf has no defined weight; as a NaN it cannot pass unseen. One of -inf has the weight 0.
inline vec checked_key(vec k) {
    const vec finite = larger(splat(-FLT_MAX), k);
    return choose(greater(finite, splat(FLT_MAX)), splat(std::numeric_limits<float>::quiet_NaN()), finite);
}

// The exponent of e^exponent as a multiple of the future's sums.
inline vec exponent(const Future& f, const Column& c, vec key) {
    return multiply_add(f.age, c.w, (key - f.high) - f.low);
}

// The relative error of e^w in float32 is the same at every token and would grow with their number: hence two parts.
inline void set_decay(Column& c) {
    for (int j = 0; j < WIDTH; j++) {
        // e^w in double: 2^n e^r, |r| <= ln(2) / 2, with its Taylor polynomial to 2e-16.
        double x = double(c.w[j]);
        x = x > -700.0 ? x : -700.0;
        const double magic = 6755399441055744.0;  // 1.5 * 2^52
        const double shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
        const double r = (x - n * 0.693147180369123816) - n * 1.90821492927058770e-10;
        double p = 1.0 / 479001600;
        for (double inverse : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                               1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
            p = p * r + inverse;
        uint64_t power, bits;
        std::memcpy(&power, &shifted, sizeof power);
        std::memcpy(&bits, &p, sizeof bits);
        bits += power << 52;
        double exact;
        std::memcpy(&exact, &bits, sizeof exact);
        c.decay[j] = float(exact);
        c.decay_rest[j] = float(exact - double(c.decay[j]));
    }
}

// The column of channels that starts at w[0] and u[0].
template <bool FULL>
inline Column make_column(const float* w, const float* u, int lanes) {
    Column c{};
    c.w = load<FULL>(w, lanes);
    c.u = load<FULL>(u, lanes);
    const mask decays = both(at_least(splat(0.0f), c.w), at_least(c.w, splat(-DECAY_LIMIT)));
    c.moderate = all(both(decays, at_least(splat(BONUS_LIMIT), absolute(c.u))));
    if (c.moderate) {
        set_decay(c);
        c.bonus = exp_moderate(c.u);
    }
    return c;
}

// Folds the age of a moderate column's past into its base; what the base loses to rounding is made good in b.
inline void settle(const Column& c, Past& p) {
    if (!c.moderate) return;
    for (int j = 0; j < WIDTH; j++) {
        if (p.base[j] <= EMPTY / 2) continue;
        const double exact = double(p.base[j]) + double(p.age[j]) * double(c.w[j]);
        p.base[j] = float(exact);
        p.b[j] = float(p.b[j] * std::exp(exact - double(p.base[j])));
    }
    p.age = vec{};
}

// The past after `later`, a past of its own that began empty where `p` ended, `length` tokens ago.
inline void append(const Column& c, Past& p, const Past& later, float length) {
    p.age += length;
    const vec lead = multiply_add(later.age - p.age, c.w, later.base - p.base);
    const vec lower = exp_any(-absolute(lead));
    const mask taller = greater(lead, vec{});
    const vec before = choose(taller, lower, splat(1.0f)) * p.b;
    const vec after = choose(taller, splat(1.0f), lower) * later.b;
    const vec sum = before + after;
    p.mean = multiply_add(after / sum, later.mean - p.mean, p.mean);
    p.b = sum;
    p.base = choose(taller, later.base, p.base);
    p.age = choose(taller, later.age, p.age);
}

// The future before `earlier`, a future of its own that began empty where `f` is seen from, `length` tokens
// later; the mean of the past moved by `shift` over them.
inline void prepend(const Column& c, Future& f, const Future& earlier, float length, vec shift) {
    const vec d = multiply_add(shift, f.s, f.d);
    const vec d1 = multiply_add(splat(length), d, multiply_add(shift, f.s1, f.d1));
    const vec s1 = multiply_add(splat(length), f.s, f.s1);
    const vec age = f.age + length;
    const vec lead = multiply_add(earlier.age - age, c.w, (f.high - earlier.high) + (f.low - earlier.low));
    const vec lower = exp_any(-absolute(lead));
    const mask taller = greater(lead, vec{});
    const vec far = choose(taller, lower, splat(1.0f)), near = choose(taller, splat(1.0f), lower);
    f.s = multiply_add(far, f.s, near * earlier.s);
    f.d = multiply_add(far, d, near * earlier.d);
    f.s1 = multiply_add(far, s1, near * earlier.s1);
    f.d1 = multiply_add(far, d1, near * earlier.d1);
    f.high = choose(taller, earlier.high, f.high);
    f.low = choose(taller, earlier.low, f.low);
    f.age = choose(taller, earlier.age, age);
}

}  // namespace wkv
}  // namespace spikescale
