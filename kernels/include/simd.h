// Small pieces shared by the CPU kernels, all written so that the compiler turns a loop over LANES
// channels into vector code: bfloat16 conversion, exp, loads and stores of a block of channels.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace spikescale {

constexpr int LANES = 64;  // channels a thread carries through time together

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


// A row of n <= LANES channels as float32. FULL says n == LANES, so that the loop has a fixed length.
template <bool FULL, typename T>
inline void load(const T* from, int n, float* to) {
    const int count = FULL ? LANES : n;
    for (int j = 0; j < count; j++) to[j] = to_float(from[j]);
}

template <bool FULL, typename T>
inline void store(const float* from, int n, T* to) {
    const int count = FULL ? LANES : n;
    for (int j = 0; j < count; j++) to[j] = from_float<T>(from[j]);
}

inline void fill(float* to, float value) {
    for (int j = 0; j < LANES; j++) to[j] = value;
}

// Calls body(b, c0, n, full) for every batch row b and block of n <= LANES channels from c0 on, spread
// over at most `threads` threads; few elements are not worth waking threads for.
template <typename Body>
inline void for_each_block(int64_t batch, int64_t length, int64_t channels, int threads, Body body) {
    const int64_t blocks = (channels + LANES - 1) / LANES;
    const int64_t tasks = batch * blocks;
    int64_t team = threads < tasks ? threads : tasks;
    if (batch * length * channels < 16384 || team < 1) team = 1;
#pragma omp parallel for num_threads(int(team)) schedule(static) if (team > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t c0 = (task % blocks) * LANES;
        const int64_t left = channels - c0;
        body(task / blocks, c0, int(left < LANES ? left : LANES));
    }
}

}  // namespace spikescale
