// One SIMD register of channels, and the few operations on it that the WKV kernels need: the widest that
// the compiler may use, chosen here and nowhere else.
#pragma once

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spikescale {
namespace wkv {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

inline vec splat(float x) { return vec{} + x; }

// Comparisons are false for NaN.
#if defined(__AVX512F__)
typedef __mmask16 mask;
inline mask greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline mask at_least(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline mask both(mask a, mask b) { return a & b; }
inline bool all(mask m) { return m == 0xFFFF; }
inline vec choose(mask m, vec yes, vec no) { return _mm512_mask_blend_ps(m, no, yes); }
#else
typedef ints mask;
inline mask greater(vec a, vec b) { return a > b; }
inline mask at_least(vec a, vec b) { return a >= b; }
inline mask both(mask a, mask b) { return a & b; }
inline vec choose(mask m, vec yes, vec no) { return m ? yes : no; }
inline bool all(mask m) {
#if defined(__AVX2__) && defined(__FMA__)
    return _mm256_movemask_ps((__m256)m) == 0xFF;
#else
    int32_t every = -1;
    for (int j = 0; j < WIDTH; j++) every &= m[j];
    return every != 0;
#endif
}
#endif

// a b + c, rounded once where the processor can.
inline vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The larger; b where either is NaN.
inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_max_ps(a, b);
#else
    return choose(greater(a, b), a, b);
#endif
}

inline vec smaller(vec a, vec b) { return -larger(-a, -b); }

inline vec absolute(vec x) { return (vec)((uints)x & 0x7FFFFFFFu); }

// 1 / x within 1 ulp for x between e^-80 and e^80. Division holds the pipeline for as long as ten multiplications
// do; an estimate of 14 bits and one Newton step for five.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
    const vec estimate = _mm512_rcp14_ps(x);
    return multiply_add(estimate, multiply_add(-x, estimate, splat(1.0f)), estimate);
#else
    return 1.0f / x;
#endif
}

// e^x within 2 ulp for |x| <= 80; of anything else (NaN too) an arbitrary number.
//
// 2^n 2^f with n the integer nearest to x log2(e). The coefficients are the best of degree 6 for 2^f, |f| <= 1/2
// (relative error 2e-9, found by reweighted least squares).
inline vec exp_moderate(vec x) {
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
    const vec shifted = multiply_add(x, splat(1.44269504088896341f), splat(magic));
    const vec n = shifted - magic;
#if defined(__FMA__)
    vec f = multiply_add(x, splat(1.44269504088896341f), -n);
    f = multiply_add(x, splat(1.92596303087032e-8f), f);
#else
    // Without a fused product, x log2(e) would lose the low bits of f: reduce by n ln(2) in two exact steps.
    const vec f = ((x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f) * 1.44269504088896341f;
#endif
    vec p = splat(1.5353361960e-4f);
    p = multiply_add(p, f, splat(1.3398875017e-3f));
    p = multiply_add(p, f, splat(9.6184369177e-3f));
    p = multiply_add(p, f, splat(5.5503323674e-2f));
    p = multiply_add(p, f, splat(2.4022647738e-1f));
    p = multiply_add(p, f, splat(6.9314718246e-1f));
    p = multiply_add(p, f, splat(1.0f));
    return (vec)((uints)p + ((uints)shifted << 23));
}

// e^x within 2 ulp: 0 below the smallest normal number, infinity above 88, NaN for NaN.
inline vec exp_any(vec x) {
    const vec low = splat(-87.33654f), high = splat(88.0f);
    vec result = exp_moderate(larger(low, smaller(high, x)));
    result = choose(at_least(x, low), result, splat(0.0f));
    result = choose(greater(x, high), splat(std::numeric_limits<float>::infinity()), result);
    return choose(at_least(x, x), result, x);
}

struct Sigmoid {
    vec value, rest;  // rest: 1 - value, accurate however small
};

inline Sigmoid sigmoid(vec x) {
    // |x| rounds nowhere and its exponential never overflows; below e^-80 the smaller of the two is e^-80.
    const vec small = exp_moderate(larger(splat(-80.0f), -absolute(x)));
    const vec large_share = reciprocal(small + 1.0f), small_share = small * large_share;
    const mask positive = greater(x, splat(0.0f)), number = at_least(x, x);
    return {choose(number, choose(positive, large_share, small_share), x),
            choose(number, choose(positive, small_share, large_share), x)};
}

// The first n channels from `from`, or all WIDTH where FULL; the rest are 0.
template <bool FULL>
inline vec load(const float* from, int n) {
    vec x{};
    std::memcpy(&x, from, FULL ? sizeof x : n * sizeof(float));
    return x;
}

template <bool FULL>
inline vec load(const bf16* from, int n) {
    halves x{};
    std::memcpy(&x, from, FULL ? sizeof x : n * sizeof(bf16));
    return (vec)(__builtin_convertvector(x, uints) << 16);
}

template <bool FULL>
inline void store(vec x, float* to, int n) {
    std::memcpy(to, &x, FULL ? sizeof x : n * sizeof(float));
}

// Round to nearest, ties to even; a NaN stays a NaN (rounding could carry it into infinity).
template <bool FULL>
inline void store(vec x, bf16* to, int n) {
    const uints bits = (uints)x;
    const vec rounded = (vec)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    const vec quiet_nan = (vec)(uints{} + 0x7FC0u);
    const halves result = __builtin_convertvector((uints)choose(at_least(x, x), rounded, quiet_nan), halves);
    std::memcpy(to, &result, FULL ? sizeof result : n * sizeof(bf16));
}

}  // namespace wkv
}  // namespace spikescale
