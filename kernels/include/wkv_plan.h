// How WKV's work is cut up for threads: by sequence and block of channels, and where those are fewer than the
// threads, in time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "wkv_state.h"

namespace spikescale {
namespace wkv {

// Channels a thread carries through time together, at most: the wider, the longer the stretches of memory.
constexpr int BLOCK = 256;
constexpr int NARROW = 16;              // channels in a block that is not cut further: a line of the cache
constexpr int COLUMNS = BLOCK / WIDTH;  // registers of channels in a block, at most
constexpr int64_t SEGMENT_CHUNKS = 4;   // chunks a segment must have

struct Sizes {
    int64_t batch, length, channels;

    int64_t chunks() const { return ceil_div(length, CHUNK); }
};

// Channels c0 .. c0 + n of sequence b.
struct Block {
    int64_t b, c0;
    int n;

    // Calls body(column, its channels' offset, how many they are, whether that fills a register: a constant).
    template <typename Body>
    void each_column(Body body) const {
        for (int column = 0; column * WIDTH < n; column++) {
            const int lanes = std::min(WIDTH, n - column * WIDTH);
            if (lanes == WIDTH)
                body(column, c0 + column * WIDTH, lanes, std::true_type{});
            else
                body(column, c0 + column * WIDTH, lanes, std::false_type{});
        }
    }
};

// Segments are cut between chunks. Of more than one, all but one are first gone through for what they hand on,
// then all but one for their results: with one segment more than threads, both rounds keep every thread busy.
struct Plan {
    std::vector<Block> blocks;
    std::vector<int64_t> starts;  // chunk at which each segment starts, and the end
    int threads = 1;

    Plan(const Sizes& sizes, int limit) {
        const int64_t elements = sizes.batch * sizes.length * sizes.channels;
        const int64_t available = elements < FEW_ELEMENTS ? 1 : std::max(limit, 1);
        int64_t width = BLOCK;
        // Of an empty tensor there is no block, but one to count with.
        const auto count = [&] { return std::max<int64_t>(sizes.batch * ceil_div(sizes.channels, width), 1); };
        // Narrower where threads would be idle: for good, or while the last tasks finish.
        while (width > NARROW && (count() < available || (count() < 4 * available && count() % available))) width /= 2;
        for (int64_t b = 0; b < sizes.batch; b++)
            for (int64_t c0 = 0; c0 < sizes.channels; c0 += width)
                blocks.push_back({b, c0, int(std::min(width, sizes.channels - c0))});
        const int64_t parts = std::min(available / count(), sizes.chunks() / SEGMENT_CHUNKS - 1);
        const int64_t segments = parts < 2 ? 1 : parts + 1;
        for (int64_t i = 0; i <= segments; i++) starts.push_back(sizes.chunks() * i / segments);
        threads = int(std::min(available, count() * std::max<int64_t>(segments - 1, 1)));
    }

    int segments() const { return int(starts.size()) - 1; }

    // body(index of the block, segment) for every block and the segments first..last, over the threads.
    template <typename Body>
    void run(int first, int last, Body body) const {
        const int64_t each = last - first + 1, count = int64_t(blocks.size()) * each;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t i = 0; i < count; i++) body(i / each, first + int(i % each));
    }
};

// Whether a sequence is emptied before one of the tokens of chunks first..end.
inline bool empties_within(const uint8_t* reset, const Sizes& sizes, int64_t b, int64_t first, int64_t end) {
    if (!reset) return false;
    const uint8_t* row = reset + b * sizes.length;
    return std::any_of(row + first * CHUNK, row + std::min(end * CHUNK, sizes.length), [](uint8_t x) { return x; });
}

template <typename T>
T* offset(T* pointer, int64_t by) {
    return pointer ? pointer + by : nullptr;
}

}  // namespace wkv
}  // namespace spikescale
