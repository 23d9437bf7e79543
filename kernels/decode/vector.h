// A register of floats for the matrix products, by instruction set. Unlike the loops that the compiler
// vectorises by itself, a product needs its accumulators to stay in registers, and fused multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spikescale {
namespace decode {
namespace {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int WIDTH = 16, ACCUMULATORS = 24;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }

// WIDTH pairs of bfloat16 as two registers: the first and the second of each pair.
inline void load_pairs(const uint16_t* from, Vec& first, Vec& second) {
    const __m512i pairs = _mm512_loadu_si512(from);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000u))));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int WIDTH = 8, ACCUMULATORS = 12;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
inline Vec broadcast(const float* from) { return _mm256_broadcast_ss(from); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }

inline void load_pairs(const uint16_t* from, Vec& first, Vec& second) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000u))));
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int WIDTH = 4, ACCUMULATORS = 12;

inline Vec zero() { return Vec{}; }
inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline Vec broadcast(const float* from) { return Vec{*from, *from, *from, *from}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec add(Vec a, Vec b) { return a + b; }

inline void load_pairs(const uint16_t* from, Vec& first, Vec& second) {
    Bits pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    first = Vec(pairs << 16);
    second = Vec(pairs & 0xFFFF0000u);
}

#endif

}  // namespace
}  // namespace decode
}  // namespace spikescale
