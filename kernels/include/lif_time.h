// Running neurons over all tokens on several threads: over batch rows and blocks of channels, and, where
// those are too few, over segments of time, with the very result of one pass from the first token to the last.
#pragma once

#include <functional>

#include "lif.h"

namespace spikescale {

constexpr int64_t WARM_UP = 64;            // tokens that a segment starts early, from a membrane of 0
constexpr int64_t SHORTEST_SEGMENT = 128;  // tokens; below, the warm-up would be most of the work
constexpr int64_t FORWARD_UNIT = 64;       // channels of a block that is not cut further

inline void copy_floats(float* to, const float* from, int64_t n) { std::memcpy(to, from, size_t(n) * sizeof(float)); }

inline bool same_floats(const float* a, const float* b, int64_t n) {
    return std::memcmp(a, b, size_t(n) * sizeof(float)) == 0;
}

// Channels c0 .. c0 + n of batch row b.
struct ChannelBlock {
    int64_t b, c0, n;

    ChannelBlock(int64_t task, int64_t width, const Extent& e) {
        const int64_t blocks = ceil_div(e.channels, width);
        b = task / blocks;
        c0 = task % blocks * width;
        n = e.channels - c0 < width ? e.channels - c0 : width;
    }

    // Where they start in a tensor (B, C).
    int64_t row(const Extent& e) const { return b * e.channels + c0; }
};

// Blocks of `width` channels, and into how many segments of time each is cut: 1 unless threads would be idle.
struct TimePlan {
    int64_t width, tasks, segments;

    TimePlan(const Extent& e, int64_t width, int threads)
        : width(width), tasks(e.batch * ceil_div(e.channels, width)), segments(1) {
        if (e.elements() < FEW_ELEMENTS) return;
        const int64_t idle = threads / tasks, most = e.length / SHORTEST_SEGMENT;
        segments = idle < most ? idle : most;
        if (segments < 1) segments = 1;
    }
};

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
        const TimePlan plan(e_, block_width(e_.batch, e_.channels, threads, FORWARD_UNIT), threads);
        if (plan.segments > 1) by_time(plan, threads);
        else sequential(plan.width, threads);
    }

  private:
    static float* mark(float* marks, const Extent& e, const ChannelBlock& k, int64_t t) {
        return marks + (k.b * ceil_div(e.length, MARK) + t / MARK) * e.channels + k.c0;
    }

    void advance(const ChannelBlock& k, int64_t t0, int64_t t1, float* v, float* marks) {
        for (int64_t t = t0; t < t1; t += MARK) {
            if (marks) copy_floats(mark(marks, e_, k, t), v, k.n);
            tokens_(k.b, k.c0, k.n, t, t1 - t < MARK ? t1 : t + MARK, v, true);
        }
    }

    void sequential(int64_t width, int threads) {
        const int64_t tasks = e_.batch * ceil_div(e_.channels, width);
        parallel_for(tasks, threads, e_.elements(), [&](int64_t task) {
            const ChannelBlock k(task, width, e_);
            Buffer<float> v(k.n);
            copy_floats(v, v0_ + k.row(e_), k.n);
            advance(k, 0, e_.length, v, marks_);
            copy_floats(v_out_ + k.row(e_), v, k.n);
        });
    }

    void by_time(const TimePlan& plan, int threads) {
        const int64_t length = ceil_div(ceil_div(e_.length, plan.segments), MARK) * MARK;
        const int64_t segments = ceil_div(e_.length, length);
        // Marks are needed to see where a re-run meets what was computed, even if nobody saves them.
        Buffer<float> own_marks(marks_ ? 0 : e_.batch * ceil_div(e_.length, MARK) * e_.channels);
        float* marks = marks_ ? marks_ : static_cast<float*>(own_marks);
        Buffer<float> ends(plan.tasks * segments * plan.width);
        parallel_for(plan.tasks * segments, threads, e_.elements(), [&](int64_t task) {
            const ChannelBlock k(task / segments, plan.width, e_);
            const int64_t t0 = task % segments * length, t1 = t0 + length < e_.length ? t0 + length : e_.length;
            const int64_t start = t0 < WARM_UP ? 0 : t0 - WARM_UP;
            Buffer<float> v(k.n);
            if (start == 0) copy_floats(v, v0_ + k.row(e_), k.n);
            tokens_(k.b, k.c0, k.n, start, t0, v, false);
            advance(k, t0, t1, v, marks);
            copy_floats(ends + task * plan.width, v, k.n);
        });
        parallel_for(plan.tasks, threads, e_.elements(), [&](int64_t task) {
            const ChannelBlock k(task, plan.width, e_);
            Buffer<float> v(k.n);
            copy_floats(v, ends + task * segments * plan.width, k.n);
            for (int64_t s = 1; s < segments; s++) {
                const int64_t end = (s + 1) * length < e_.length ? (s + 1) * length : e_.length;
                if (fix_up(k, s * length, end, v, marks))
                    copy_floats(v, ends + (task * segments + s) * plan.width, k.n);
            }
            copy_floats(v_out_ + k.row(e_), v, k.n);
        });
    }

    // Runs tokens t0 .. t1 again from the true membrane v until it is, bit for bit, the one that was computed
    // there; true if it ever was, else v is the membrane after t1.
    bool fix_up(const ChannelBlock& k, int64_t t0, int64_t t1, float* v, float* marks) {
        for (int64_t t = t0; t < t1; t += MARK) {
            if (same_floats(mark(marks, e_, k, t), v, k.n)) return true;
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
