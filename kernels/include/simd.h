// Small pieces shared by the CPU kernels, written so that the compiler makes vector code of a loop over channels
// that calls them: bfloat16 conversion, a product with a sum, and exp.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace spikescale {

struct bf16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

template <typename T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

// Round to nearest, ties to even; a NaN stays a NaN (rounding could carry it into infinity).
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return bf16{uint16_t(x != x ? 0x7FC0u : rounded)};
}

inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within 2 ulp up to x = 88, infinity above (the kernels ask for x <= 0). Results below the smallest normal
// number are flushed to 0; -inf gives 0, NaN gives NaN.
inline float exp_f(float x) {
    const float low = -87.33654f, high = 88.0f;
    float c = x < low ? low : x;
    c = c > high ? high : c;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, which then sits in the low bits.
    const float magic = 12582912.0f;
    const float shifted = multiply_add(c, 1.44269504088896341f, magic);
    const float n = shifted - magic;
    float r = multiply_add(n, -0.693145751953125f, c);
    r = multiply_add(n, -1.42860682030941723212e-6f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    const uint32_t power = (bits_of(shifted) - bits_of(magic) + 127u) << 23;  // of 2^n
    float result = p * float_of(power);
    result = x < low ? 0.0f : result;
    return x > high ? std::numeric_limits<float>::infinity() : result;
}

}  // namespace spikescale
