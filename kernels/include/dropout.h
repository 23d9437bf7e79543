// Dropout by a hash of the place: `dropout_keep` of kernels/lif_norm/reference.py, the same bits.
#pragma once

#include <cstdint>

namespace spikescale {

inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

class Dropout {
  public:
    // `threshold` is the share of dropped elements times 2^32.
    Dropout(uint64_t seed, uint32_t threshold, float scale)
        : low_(mixed(uint32_t(seed))),
          high_(mixed(uint32_t(seed >> 32) ^ 0x9E3779B9u)),
          threshold_(threshold),
          scale_(scale) {}

    // What element first + c of the tensor is multiplied by: 0 or the scale.
    float factor(uint64_t first, uint32_t c) const {
        const uint32_t low = uint32_t(first) + c;
        const uint32_t high = uint32_t(first >> 32) + (low < c ? 1u : 0u);
        const uint32_t bits = mixed(mixed(low ^ low_) ^ high ^ high_);
        return bits >= threshold_ ? scale_ : 0.0f;
    }

  private:
    uint32_t low_, high_, threshold_;
    float scale_;
};

}  // namespace spikescale
