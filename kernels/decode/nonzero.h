// Products with one row of activations, most of which are zero: after relu^2, and where neurons fire. A panel keeps
// the weights of an input side by side, so that those of a zero need not be read at all.
#pragma once

#include <vector>

#include "matmul.h"

namespace spikescale {
namespace decode {
namespace {

constexpr double SKIPPING_PAYS = 0.3;  // largest share of weights to read in leaps; above, reading all in order is faster
constexpr size_t LEAPS_AHEAD = 32;     // inputs fetched in advance: the prefetcher does not follow leaps

// The inputs of a row that are not zero: where their weights begin in a panel, in bytes, and their values. For
// bfloat16 weights two inputs are one entry, and have two values.
struct Nonzero {
    std::vector<int64_t> places;
    std::vector<float> values;
    bool pays = false;

    // Row 0 of x, which is float32.
    void find(const Activations& x, Arithmetic arithmetic) {
        const int64_t together = arithmetic == FLOAT32 ? 1 : 2;
        const int64_t bytes = PANEL * (arithmetic == FLOAT32 ? 4 : 2);
        places.resize(size_t(x.inputs));
        values.resize(size_t(2 * x.inputs));
        const float* data = static_cast<const float*>(x.data);
        size_t count = 0;
        for (int64_t k = 0; k < x.inputs; k += together) {
            const float* value = data + x.at(0, k);  // an odd last input is followed by a zero
            places[count] = k * bytes;
            for (int64_t i = 0; i < together; i++) values[count * size_t(together) + size_t(i)] = value[i];
            count += value[0] != 0.0f || (together == 2 && value[1] != 0.0f);
        }
        pays = double(count) * double(together) < SKIPPING_PAYS * double(x.inputs);
        places.resize(count);
    }
};

// As `multiply`, for the one row whose nonzero activations are given.
inline void multiply_nonzero(Arithmetic arithmetic, const char* w, const Nonzero& x, float* y, const char* next) {
    constexpr int N = vectors(1), CHAINS = chains(1);
    const size_t count = x.places.size();
    Vec sums[CHAINS][1][N];
    begin<1, N, CHAINS>(sums, y, true);
    for (size_t i = 0; i < count; i++) {
        size_t later = i + LEAPS_AHEAD;
        const char* panel = later < count ? w : next;
        later = later < count ? later : later - count;
        if (later < count) {
            const char* ahead = panel + x.places[later];
            fetch(ahead, 2);
        }
        const char* from = w + x.places[i];
        if (arithmetic == FLOAT32) {
            step_f32<1, N>(reinterpret_cast<const float*>(from), &x.values[i], sums[i % CHAINS]);
        } else {
            step_widened<1, N>(reinterpret_cast<const uint16_t*>(from), &x.values[2 * i], sums[i % CHAINS],
                               sums[(i + 1) % CHAINS]);
        }
    }
    finish<1, N, CHAINS>(sums, y);
}

}  // namespace
}  // namespace decode
}  // namespace spikescale
