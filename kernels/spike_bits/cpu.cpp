// Spikes packed into bits and unpacked, on CPU.

#include <atomic>

#include "parallel.h"
#include "simd.h"

using namespace spikescale;

namespace {

constexpr int64_t BLOCK = 1 << 16;  // elements a thread takes at a time, a multiple of 8

template <typename T>
int32_t pack(const T* spikes, uint8_t* bits, int64_t n, int threads) {
    std::atomic<int32_t> others{0};
    parallel_for(ceil_div(n, BLOCK), threads, n, [&](int64_t block) {
        const int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        int64_t i = block * BLOCK;
        int32_t strange = 0;
        for (; i + 64 <= end; i += 64) {
            uint8_t fired[64];
            for (int j = 0; j < 64; j++) {
                const float s = to_float(spikes[i + j]);
                fired[j] = s == 1.0f;
                strange |= !(s == 1.0f) & !(s == 0.0f);
            }
            for (int byte = 0; byte < 8; byte++) {
                uint64_t eight;
                std::memcpy(&eight, fired + 8 * byte, 8);
                // Gathers the lowest bits of the eight bytes into one.
                bits[i / 8 + byte] = uint8_t((eight * 0x0102040810204080ull) >> 56);
            }
        }
        for (; i < end; i += 8) {
            uint8_t byte = 0;
            for (int64_t j = i; j < i + 8 && j < end; j++) {
                const float s = to_float(spikes[j]);
                byte |= uint8_t(s == 1.0f) << (j - i);
                strange |= !(s == 1.0f) & !(s == 0.0f);
            }
            bits[i / 8] = byte;
        }
        if (strange) others.store(1, std::memory_order_relaxed);
    });
    return others;
}

template <typename T>
void unpack(const uint8_t* bits, T* spikes, int64_t n, int threads) {
    const T one = from_float<T>(1.0f), zero = from_float<T>(0.0f);
    parallel_for(ceil_div(n, BLOCK), threads, n, [&](int64_t block) {
        const int64_t end = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n;
        int64_t i = block * BLOCK;
        for (; i + 8 <= end; i += 8) {
            const uint8_t byte = bits[i / 8];
            for (int j = 0; j < 8; j++) spikes[i + j] = (byte >> j) & 1 ? one : zero;
        }
        for (; i < end; i++) spikes[i] = (bits[i / 8] >> (i % 8)) & 1 ? one : zero;
    });
}

}  // namespace

extern "C" {

// Not 0 if an element is neither 0 nor 1.
int32_t pack_spikes_f32(const float* spikes, uint8_t* bits, int64_t n, int32_t threads) {
    return pack(spikes, bits, n, threads);
}

int32_t pack_spikes_bf16(const bf16* spikes, uint8_t* bits, int64_t n, int32_t threads) {
    return pack(spikes, bits, n, threads);
}

void unpack_spikes_f32(const uint8_t* bits, float* spikes, int64_t n, int32_t threads) {
    unpack(bits, spikes, n, threads);
}

void unpack_spikes_bf16(const uint8_t* bits, bf16* spikes, int64_t n, int32_t threads) {
    unpack(bits, spikes, n, threads);
}
}
