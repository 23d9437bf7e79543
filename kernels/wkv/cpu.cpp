// WKV, forward and backward, on CPU: the way over sequences, channels and threads. The maths is in README.md,
// the work on one chunk of tokens in include/wkv_forward.h and wkv_backward.h.
//
// Tensors are contiguous: k, v, gate, y and their gradients are (B, T, C); state and its gradients are
// (B, 3, C) float32 rows a, b, m; w and u are (C); reset is (B, T) bytes or null; gate may be null; marks, what
// forward leaves for backward, is (B, ceil(T / CHUNK), 4, C) float32 or null.

#include "wkv_backward.h"
#include "wkv_plan.h"

using namespace spikescale;
using namespace spikescale::wkv;

namespace {

// What both directions read.
template <typename T>
struct Inputs {
    const float *w, *u;
    const T *k, *v, *gate;
    const uint8_t* reset;
    Sizes sizes;

    int64_t at(const Block& block, int64_t chunk, int64_t c) const {
        return (block.b * sizes.length + chunk * CHUNK) * sizes.channels + c;
    }

    int64_t mark_at(const Block& block, int64_t chunk, int64_t c) const {
        return (block.b * sizes.chunks() + chunk) * 4 * sizes.channels + c;
    }

    Tokens<T> tokens(const Block& block, int64_t chunk, int64_t c, int lanes, int ahead) const {
        const int64_t here = at(block, chunk, c), left = sizes.length - chunk * CHUNK;
        const uint8_t* flags = offset(reset, block.b * sizes.length + chunk * CHUNK);
        const int count = int(std::min<int64_t>(CHUNK, left));
        return {k + here, v + here, offset(gate, here), flags, sizes.channels, count, lanes, ahead};
    }

    void make_columns(const Block& block, Column* columns) const {
        block.each_column([&](int i, int64_t c, int lanes, auto full) {
            columns[i] = make_column<full.value>(w + c, u + c, lanes);
        });
    }
};

template <typename T>
struct Forward {
    Inputs<T> in;
    const float* state;
    T* y;
    float *state_out, *marks;

    struct Pasts {
        Past of[COLUMNS];
    };

    void read_state(const Block& block, Pasts& past) const {
        const int64_t channels = in.sizes.channels;
        block.each_column([&](int i, int64_t c, int lanes, auto full) {
            const float* row = state + block.b * 3 * channels + c;
            Past& p = past.of[i];
            const vec a = load<full.value>(row, lanes);
            p.empty();
            p.b = load<full.value>(row + channels, lanes);
            p.base = load<full.value>(row + 2 * channels, lanes);
            for (int j = 0; j < lanes; j++) p.mean[j] = p.b[j] == 0.0f ? 0.0f : a[j] / p.b[j];
        });
    }

    // m = base + age w is rounded once, here, and the rounding made good in a and b.
    void write_state(const Block& block, const Pasts& past) const {
        const int64_t channels = in.sizes.channels;
        block.each_column([&](int i, int64_t c, int lanes, auto) {
            float* row = state_out + block.b * 3 * channels + c;
            const Past& p = past.of[i];
            for (int j = 0; j < lanes; j++) {
                const bool empty = p.base[j] <= EMPTY / 2;
                const double exact = double(p.base[j]) + double(p.age[j]) * double(in.w[c + j]);
                const float m = empty ? EMPTY : float(exact);
                const double rest = empty || exact == double(m) ? 1.0 : std::exp(exact - double(m));
                row[j] = float(p.mean[j] * (p.b[j] * rest));
                row[channels + j] = float(p.b[j] * rest);
                row[2 * channels + j] = m;
            }
        });
    }

    // Takes the past through the chunks first..end; without outputs only the past matters, not y and the marks.
    void advance(const Block& block, int64_t first, int64_t end, Pasts& past, bool outputs) const {
        Column columns[COLUMNS];
        in.make_columns(block, columns);
        for (int64_t chunk = first; chunk < end; chunk++)
            block.each_column([&](int i, int64_t c, int lanes, auto full) {
                Past& p = past.of[i];
                if (outputs && marks) {
                    float* mark = marks + in.mark_at(block, chunk, c);
                    for (const vec* row : {&p.mean, &p.b, &p.base, &p.age}) {
                        store<full.value>(*row, mark, lanes);
                        mark += in.sizes.channels;
                    }
                }
                T* out = outputs ? y + in.at(block, chunk, c) : nullptr;
                const int ahead = chunk + 1 < end ? CHUNK : 0;
                forward_chunk<full.value>(columns[i], p, in.tokens(block, chunk, c, lanes, ahead), out);
            });
    }

    void run(int threads) const {
        const Plan plan(in.sizes, threads);
        const int segments = plan.segments(), last = segments - 1;
        // The past before each segment; until it is known, what the segment before it adds.
        std::vector<Pasts> pasts(plan.blocks.size() * (segments + 1));
        const auto past_before = [&](int64_t block, int segment) -> Pasts& {
            return pasts[block * (segments + 1) + segment];
        };
        plan.run(0, std::max(last - 1, 0), [&](int64_t b, int segment) {
            Pasts past;
            for (Past& p : past.of) p.empty();
            if (segment == 0) read_state(plan.blocks[b], past);
            advance(plan.blocks[b], plan.starts[segment], plan.starts[segment + 1], past, segment == 0);
            past_before(b, segment + 1) = past;
        });
        for (size_t b = 0; b < plan.blocks.size(); b++)
            for (int segment = 1; segment < last; segment++) hand_on(plan, b, segment, past_before);
        if (last > 0)
            plan.run(1, last, [&](int64_t b, int segment) {
                Pasts past = past_before(b, segment);
                advance(plan.blocks[b], plan.starts[segment], plan.starts[segment + 1], past, true);
                if (segment == last) past_before(b, segments) = past;
            });
        for (size_t b = 0; b < plan.blocks.size(); b++) write_state(plan.blocks[b], past_before(b, segments));
    }

    template <typename PastBefore>
    void hand_on(const Plan& plan, size_t b, int segment, const PastBefore& past_before) const {
        const Block& block = plan.blocks[b];
        const int64_t first = plan.starts[segment], end = plan.starts[segment + 1];
        if (empties_within(in.reset, in.sizes, block.b, first, end)) return;
        Column columns[COLUMNS];
        in.make_columns(block, columns);
        Pasts sum = past_before(b, segment);
        block.each_column([&](int i, int64_t, int, auto) {
            append(columns[i], sum.of[i], past_before(b, segment + 1).of[i], float((end - first) * CHUNK));
            settle(columns[i], sum.of[i]);
        });
        past_before(b, segment + 1) = sum;
    }
};

template <typename T>
struct Backward {
    Inputs<T> in;
    const float *marks, *state_out;
    const T* grad_y;
    const float* grad_state_out;
    double *grad_w, *grad_u;
    T *grad_k, *grad_v, *grad_gate;
    float* grad_state;

    // What a segment hands to the one before it, and what it adds to the sums over tokens.
    struct Pass {
        Future future[COLUMNS];
        vec shift[COLUMNS];
        double w[BLOCK], u[BLOCK];
    };

    // The final sums are the output of one more token, of exponent m, linear in a and b.
    void read_state(const Block& block, Pass& pass) const {
        if (!grad_state_out) return;
        const int64_t channels = in.sizes.channels;
        block.each_column([&](int i, int64_t c, int lanes, auto full) {
            const int64_t at = block.b * 3 * channels + c;
            const float *row = state_out + at, *grad = grad_state_out + at;
            Future& f = pass.future[i];
            f.high = load<full.value>(row + 2 * channels, lanes);
            f.s = load<full.value>(grad, lanes);
            f.d = load<full.value>(grad + channels, lanes);
            for (int j = 0; j < lanes; j++) f.d[j] = -f.d[j] - row[j] / row[channels + j] * f.s[j];
        });
    }

    // The initial sums are one more token before the first, of exponent m.
    void write_sums(const Block& block, Pass& pass) const {
        const int64_t channels = in.sizes.channels;
        Column columns[COLUMNS];
        in.make_columns(block, columns);
        block.each_column([&](int i, int64_t c, int lanes, auto full) {
            const float* mark = marks + in.mark_at(block, 0, c);
            const vec mean = load<full.value>(mark, lanes), b = load<full.value>(mark + channels, lanes);
            const Future& f = pass.future[i];
            const vec scale = exp_any(exponent(f, columns[i], load<full.value>(mark + 2 * channels, lanes)));
            float* row = grad_state + block.b * 3 * channels + c;
            store<full.value>(scale * f.s, row, lanes);
            store<full.value>(-scale * multiply_add(mean, f.s, f.d), row + channels, lanes);
            store<full.value>(vec{}, row + 2 * channels, lanes);
            const vec of_state = scale * b * f.d1;
            const int64_t at = block.b * channels + c;
            for (int j = 0; j < lanes; j++) {
                grad_w[at + j] = pass.w[i * WIDTH + j] - double(of_state[j]);
                grad_u[at + j] = pass.u[i * WIDTH + j];
            }
        });
    }

    // Takes the future back through the chunks end..first; without outputs only it and the shift matter.
    void retreat(const Block& block, int64_t first, int64_t end, Pass& pass, bool outputs) const {
        Column columns[COLUMNS];
        in.make_columns(block, columns);
        for (int64_t chunk = end - 1; chunk >= first; chunk--)
            block.each_column([&](int i, int64_t c, int lanes, auto full) {
                Past past;
                const float* mark = marks + in.mark_at(block, chunk, c);
                for (vec* row : {&past.mean, &past.b, &past.base, &past.age}) {
                    *row = load<full.value>(mark, lanes);
                    mark += in.sizes.channels;
                }
                const int64_t at = in.at(block, chunk, c);
                Gradients<T> grad{grad_y + at, nullptr, nullptr, nullptr};
                if (outputs) grad = {grad_y + at, grad_k + at, grad_v + at, offset(grad_gate, at)};
                Totals totals{};
                const Tokens<T> tokens = in.tokens(block, chunk, c, lanes, chunk > first ? -CHUNK : 0);
                backward_chunk<full.value>(columns[i], past, pass.future[i], tokens, grad, totals);
                pass.shift[i] += totals.shift;
                for (int j = 0; j < WIDTH; j++) {
                    pass.w[i * WIDTH + j] += totals.w[j];
                    pass.u[i * WIDTH + j] += totals.u[j];
                }
            });
    }

    void run(int threads) const {
        const Plan plan(in.sizes, threads);
        const int segments = plan.segments(), last = segments - 1;
        std::vector<Pass> passes(plan.blocks.size() * segments);
        const auto pass_of = [&](int64_t block, int segment) -> Pass& { return passes[block * segments + segment]; };
        plan.run(std::min(last, 1), last, [&](int64_t b, int segment) {
            Pass pass{};
            for (Future& f : pass.future) f.empty();
            if (segment == last) read_state(plan.blocks[b], pass);
            retreat(plan.blocks[b], plan.starts[segment], plan.starts[segment + 1], pass, segment == last);
            pass_of(b, segment) = pass;
        });
        for (size_t b = 0; b < plan.blocks.size(); b++)
            for (int segment = last - 1; segment > 0; segment--) hand_on(plan, b, segment, pass_of);
        if (last > 0)
            plan.run(0, last - 1, [&](int64_t b, int segment) {
                Pass pass{};
                std::copy_n(pass_of(b, segment + 1).future, COLUMNS, pass.future);
                retreat(plan.blocks[b], plan.starts[segment], plan.starts[segment + 1], pass, true);
                std::copy_n(pass.w, BLOCK, pass_of(b, segment).w);
                std::copy_n(pass.u, BLOCK, pass_of(b, segment).u);
                if (segment == 0) std::copy_n(pass.future, COLUMNS, pass_of(b, 0).future);
            });
        for (size_t b = 0; b < plan.blocks.size(); b++) {
            Pass& sum = pass_of(b, 0);
            for (int segment = 1; segment < segments; segment++)
                for (int j = 0; j < BLOCK; j++) {
                    sum.w[j] += pass_of(b, segment).w[j];
                    sum.u[j] += pass_of(b, segment).u[j];
                }
            write_sums(plan.blocks[b], sum);
        }
    }

    // The future before `segment`, from what the segment adds and the future before the one after it.
    template <typename PassOf>
    void hand_on(const Plan& plan, size_t b, int segment, const PassOf& pass_of) const {
        const Block& block = plan.blocks[b];
        const int64_t first = plan.starts[segment], end = plan.starts[segment + 1];
        if (empties_within(in.reset, in.sizes, block.b, first, end)) return;
        Column columns[COLUMNS];
        in.make_columns(block, columns);
        Pass& own = pass_of(b, segment);
        block.each_column([&](int i, int64_t, int, auto) {
            Future sum = pass_of(b, segment + 1).future[i];
            prepend(columns[i], sum, own.future[i], float((end - first) * CHUNK), own.shift[i]);
            own.future[i] = sum;
        });
    }
};

}  // namespace

extern "C" {

int32_t wkv_chunk() { return CHUNK; }

#define SPIKESCALE_WKV(suffix, T)                                                                                      \
    void wkv_forward_##suffix(const float* w, const float* u, const T* k, const T* v, const float* state,              \
                              const uint8_t* reset, const T* gate, T* y, float* state_out, float* marks, int64_t B,    \
                              int64_t L, int64_t C, int32_t threads) {                                                 \
        Forward<T>{{w, u, k, v, gate, reset, {B, L, C}}, state, y, state_out, marks}.run(threads);                     \
    }                                                                                                                  \
    void wkv_backward_##suffix(const float* w, const float* u, const T* k, const T* v, const uint8_t* reset,           \
                               const T* gate, const float* marks, const float* state_out, const T* grad_y,             \
                               const float* grad_state_out, double* grad_w, double* grad_u, T* grad_k, T* grad_v,      \
                               T* grad_gate, float* grad_state, int64_t B, int64_t L, int64_t C, int32_t threads) {    \
        Backward<T>{{w, u, k, v, gate, reset, {B, L, C}},                                                              \
                    marks,  state_out, grad_y, grad_state_out, grad_w, grad_u, grad_k, grad_v, grad_gate, grad_state}  \
            .run(threads);                                                                                             \
    }

SPIKESCALE_WKV(f32, float)
SPIKESCALE_WKV(bf16, bf16)
}
