// Running neurons over all tokens on several threads: over batch rows and blocks of channels, and, where
// those are too few, over segments of time, with the very result of one pass from the first token to the last.
#pragma once

#include <functional>

#include "lif.h"

namespace spikescale {

constexpr int64_t WARM_UP = 64;          // tokens that a segment starts early, from a membrane of 0
constexpr int64_t SHORTEST_SEGMENT = 128;  // below, the warm-up would be most of the work

// tokens(b, c0, n, t0, t1, v, emit) runs channels c0 .. c0 + n of batch row b over tokens t0 .. t1, updating
// their membrane v, and writes their output if `emit`. Called for several tokens at once, it need not be inlined.
using Tokens = std::function<void(int64_t, int64_t, int64_t, int64_t, int64_t, float*, bool)>;

// The neurons of one call. `marks` (B, ceil(T / MARK), C) receives the membrane before every MARK-th token, or is null.
class NeuronRun {
  public:
    NeuronRun(const Extent& extent, const float* v0, float* v_out, float* marks, const Tokens& tokens)
        : e_(extent), v0_(v0), v_out_(v_out), marks_(marks), tokens_(tokens) {}

    // A thread takes whole batch rows; tokens are called one MARK at a time.
    void by_rows(int threads) {
        if (e_.elements()) sequential(e_.channels, threads);
    }

    // A thread takes blocks of channels, or segments of time.
    void by_blocks(int threads) {
        if (!e_.elements()) return;
        const int64_t width = block_width(e_.batch, e_.channels, threads, LANES);
        const int64_t tasks = e_.batch * ceil_div(e_.channels, width);
        int64_t segments = threads / tasks;
        if (segments > e_.length / SHORTEST_SEGMENT) segments = e_.length / SHORTEST_SEGMENT;
        if (segments < 2 || e_.elements() < FEW_ELEMENTS) sequential(width, threads);
        else by_time(width, segments, threads);
    }

  private:
    struct Block {
        int64_t b, c0, n;
    };

    Block block(int64_t task, int64_t width) const {
        const int64_t blocks = ceil_div(e_.channels, width), c0 = task % blocks * width;
        return {task / blocks, c0, e_.channels - c0 < width ? e_.channels - c0 : width};
    }

    static void copy(float* to, const float* from, int64_t n) { std::memcpy(to, from, size_t(n) * sizeof(float)); }

    static float* mark(float* marks, const Extent& e, const Block& k, int64_t t) {
        return marks + (k.b * ceil_div(e.length, MARK) + t / MARK) * e.channels + k.c0;
    }

    void advance(const Block& k, int64_t t0, int64_t t1, float* v, float* marks) {
        for (int64_t t = t0; t < t1; t += MARK) {
            if (marks) copy(mark(marks, e_, k, t), v, k.n);
            tokens_(k.b, k.c0, k.n, t, t1 - t < MARK ? t1 : t + MARK, v, true);
        }
    }

    void sequential(int64_t width, int threads) {
        const int64_t tasks = e_.batch * ceil_div(e_.channels, width);
        parallel_for(tasks, threads, e_.elements(), [&](int64_t task) {
            const Block k = block(task, width);
            const int64_t at = k.b * e_.channels + k.c0;
            Buffer<float> v(k.n);
            copy(v, v0_ + at, k.n);
            advance(k, 0, e_.length, v, marks_);
            copy(v_out_ + at, v, k.n);
        });
    }

    void by_time(int64_t width, int64_t segments, int threads) {
        const int64_t length = ceil_div(ceil_div(e_.length, segments), MARK) * MARK;
        segments = ceil_div(e_.length, length);
        const int64_t tasks = e_.batch * ceil_div(e_.channels, width);
        // Marks are needed to see where a re-run meets what was computed, even if nobody saves them.
        Buffer<float> own_marks(marks_ ? 0 : e_.batch * ceil_div(e_.length, MARK) * e_.channels);
        float* marks = marks_ ? marks_ : static_cast<float*>(own_marks);
        Buffer<float> ends(tasks * segments * width);
        parallel_for(tasks * segments, threads, e_.elements(), [&](int64_t task) {
            const Block k = block(task / segments, width);
            const int64_t t0 = task % segments * length, t1 = t0 + length < e_.length ? t0 + length : e_.length;
            const int64_t start = t0 < WARM_UP ? 0 : t0 - WARM_UP;
            Buffer<float> v(k.n);
            if (start == 0) copy(v, v0_ + k.b * e_.channels + k.c0, k.n);
            tokens_(k.b, k.c0, k.n, start, t0, v, false);
            advance(k, t0, t1, v, marks);
            copy(ends + task * width, v, k.n);
        });
        parallel_for(tasks, threads, e_.elements(), [&](int64_t task) {
            const Block k = block(task, width);
            Buffer<float> v(k.n);
            copy(v, ends + task * segments * width, k.n);
            for (int64_t s = 1; s < segments; s++) {
                const int64_t end = (s + 1) * length < e_.length ? (s + 1) * length : e_.length;
                if (fix_up(k, s * length, end, v, marks)) copy(v, ends + (task * segments + s) * width, k.n);
            }
            copy(v_out_ + k.b * e_.channels + k.c0, v, k.n);
        });
    }

    // Runs tokens t0 .. t1 again from the true membrane v until it is, bit for bit, the one that was computed
    // there; true if it ever was, else v is the membrane after t1.
    bool fix_up(const Block& k, int64_t t0, int64_t t1, float* v, float* marks) {
        for (int64_t t = t0; t < t1; t += MARK) {
            if (std::memcmp(mark(marks, e_, k, t), v, size_t(k.n) * sizeof(float)) == 0) return true;
            advance(k, t, t1 - t < MARK ? t1 : t + MARK, v, marks);
        }
        return false;
    }

    const Extent e_;
    const float* v0_;
    float *v_out_, *marks_;
    const Tokens& tokens_;
};

}  // namespace spikescale
