// One token of a whole SpikeGPT on the CPU, for a batch of rows. What is computed is spikescale/model; README.md says
// how. All threads walk through the same phases, between which they wait for one another:
//
//   rows       each thread some rows: residual stream -> LayerNorm -> token shift -> activations
//   channels   each thread some panels of outputs: product -> what follows per channel -> activations or residual
//
// Vectors of channels are padded to a multiple of PANEL with zeros.

#include <omp.h>

#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "nonzero.h"
#include "norm.h"
#include "steps.h"

using namespace spikescale::decode;

extern "C" {

// Membranes that a variant lacks are null, and the neurons with them. Membranes and shifts are (batch, width).
struct Layer {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *mu_key, *mu_value, *mu_receptance, *w, *u, *channel_mu_key, *channel_mu_receptance;
    // Packed: key, value, receptance of each panel in turn; output; key then receptance of ChannelMix; value.
    const char *time_in, *time_out, *channel_in, *channel_out;
    float *shift, *wkv_mean, *wkv_b, *wkv_base, *wkv_age, *channel_shift;
    float *v_key, *v_value, *v_receptance, *v_output, *v_time;
    float *v_channel_key, *v_channel_receptance, *v_activation, *v_channel_value, *v_channel;
};

struct Model {
    int64_t layer_count, width, inner, vocabulary, batch;
    const Layer* layers;
    const float *embedding, *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
    const char* head;
    float* v_head;
    float *stream, *gate;                   // (batch, padded width)
    void *mixed[3], *wide;                  // activations of `width` inputs, and of up to `inner` inputs
    double eps;
    float grid;  // spacing of the values that ln0 is rounded to; 0: none
    int32_t binary_embedding, neuron, arithmetic, skip_zeros;
    LifOptions lif;
};
}

namespace {

int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

class Step {
  public:
    Step(const Model& model, const int64_t* tokens, float* logits, int thread, int threads)
        : m(model), o(model.lif), arithmetic(Arithmetic(model.arithmetic)), tokens(tokens), logits(logits),
          thread(thread), threads(threads), batch(model.batch), width(model.width), row_size(padded(model.width)),
          panels(row_size / PANEL), inner_panels(padded(model.inner) / PANEL),
          panel_bytes(bytes_of_panel(model.width)), inner_panel_bytes(bytes_of_panel(model.inner)),
          gated{model.wide, model.width, chunk_length(model.width), batch},
          wide{model.wide, model.inner, chunk_length(model.inner), batch}, normed(row_size),
          products(3 * batch * PANEL) {
        for (int i = 0; i < 3; i++) mixed[i] = {model.mixed[i], width, chunk_length(width), batch};
    }

    void run() {
        for (int64_t row = share(batch); row < share(batch, 1); row++) embed(row);
        for (int64_t i = 0; i < m.layer_count; i++) {
            const Layer& layer = m.layers[i];
            const bool last = i + 1 == m.layer_count;
            for (int64_t row = share(batch); row < share(batch, 1); row++) enter_time_mix(layer, row);
            wait();
            time_mix(layer);
            wait();
            leave_time_mix(layer);
            wait();
            for (int64_t row = share(batch); row < share(batch, 1); row++) enter_channel_mix(layer, row);
            wait();
            channel_mix(layer);
            wait();
            leave_channel_mix(layer, last ? m.head + share(head_panels()) * panel_bytes
                                          : m.layers[i + 1].time_in + share(panels) * 3 * panel_bytes);
            wait();
        }
        for (int64_t row = share(batch); row < share(batch, 1); row++) enter_head(row);
        wait();
        head();
    }

  private:
    const Model& m;
    const LifOptions& o;
    const Arithmetic arithmetic;
    const int64_t* tokens;
    float* logits;
    const int thread, threads;
    const int64_t batch, width, row_size, panels, inner_panels, panel_bytes, inner_panel_bytes;
    Activations mixed[3], gated, wide;
    Nonzero nonzero[3];  // of the inputs of the product at hand
    std::vector<float> normed, products;

    int64_t bytes_of_panel(int64_t inputs) const {
        return m.arithmetic == FLOAT32 ? inputs * PANEL * 4 : (inputs + 1) / 2 * 2 * PANEL * 2;
    }
    int64_t head_panels() const { return padded(m.vocabulary) / PANEL; }

    // Where this thread's part of `count` things begins; with `next` 1, where it ends.
    int64_t share(int64_t count, int next = 0) const { return count * (thread + next) / threads; }

    static void wait() {
#pragma omp barrier
    }

    float* product(int number) { return products.data() + number * batch * PANEL; }

    // To be called before the products of input x, of which a phase has up to three.
    void look_for_zeros(const Activations& x, int number = 0) {
        nonzero[number].pays = false;
        if (m.skip_zeros && batch == 1 && arithmetic != BFLOAT16) nonzero[number].find(x, arithmetic);
    }

    void multiply_panel(const char* weights, const Activations& x, float* y, const char* next, int number = 0) {
        if (nonzero[number].pays) multiply_nonzero(arithmetic, weights, nonzero[number], y, next);
        else multiply(arithmetic, weights, x, y, next);
    }

    // A membrane's block of PANEL channels drives the neurons; without a membrane x is left as it is.
    void fire(float* x, float* membrane, int64_t at) const {
        if (membrane) lif(x, membrane + at, o);
    }

    void embed(int64_t row) {
        float* x = m.stream + row * row_size;
        const float* from = m.embedding + tokens[row] * width;
        for (int64_t c = 0; c < width; c++) normed[c] = from[c];
        for (int64_t c = 0; m.binary_embedding && c < row_size; c += PANEL) heaviside(normed.data() + c);
        spikescale::norm_row(normed.data(), width, m.eps, m.ln0_weight, m.ln0_bias, x);
        // Near 1.5 * 2^23 grid, floats are spaced by the grid.
        const float offset = 12582912.0f * m.grid;
        for (int64_t c = 0; c < width; c++) x[c] = (x[c] + offset) - offset;
    }

    // Mixtures of the normed row with the one that the token before left in `shift`, each past its neurons.
    void mix(int64_t row, float* shift, int count, const float* const* mus, float* const* membranes) {
        float* last = shift + row * row_size;
        for (int64_t c = 0; c < row_size; c += PANEL) {
            for (int i = 0; i < count; i++) {
                float out[PANEL];
#pragma omp simd
                for (int j = 0; j < PANEL; j++) out[j] = last[c + j] + mus[i][c + j] * (normed[c + j] - last[c + j]);
                fire(out, membranes[i], row * row_size + c);
                put(mixed[i], arithmetic, row, c, out);
            }
#pragma omp simd
            for (int j = 0; j < PANEL; j++) last[c + j] = normed[c + j];
        }
    }

    void enter_time_mix(const Layer& l, int64_t row) {
        spikescale::norm_row(m.stream + row * row_size, width, m.eps, l.ln1_weight, l.ln1_bias, normed.data());
        const float* mus[] = {l.mu_key, l.mu_value, l.mu_receptance};
        float* membranes[] = {l.v_key, l.v_value, l.v_receptance};
        mix(row, l.shift, 3, mus, membranes);
    }

    void enter_channel_mix(const Layer& l, int64_t row) {
        spikescale::norm_row(m.stream + row * row_size, width, m.eps, l.ln2_weight, l.ln2_bias, normed.data());
        const float* mus[] = {l.channel_mu_key, l.channel_mu_receptance};
        float* membranes[] = {l.v_channel_key, l.v_channel_receptance};
        mix(row, l.channel_shift, 2, mus, membranes);
    }

    void enter_head(int64_t row) {
        spikescale::norm_row(m.stream + row * row_size, width, m.eps, m.ln_out_weight, m.ln_out_bias, normed.data());
        for (int64_t c = 0; c < row_size; c += PANEL) {
            fire(normed.data() + c, m.v_head, row * row_size + c);
            put(mixed[0], arithmetic, row, c, normed.data() + c);
        }
    }

    // Calls body(panel, y) with the product y (batch, PANEL) of each of this thread's panels. `next` is where the
    // thread reads on after the last of them.
    template <typename Body>
    void each_panel(int64_t count, const char* weights, int64_t bytes, const Activations& x, const char* next,
                    Body body) {
        const int64_t end = share(count, 1);
        look_for_zeros(x);
        for (int64_t panel = share(count); panel < end; panel++) {
            const char* from = weights + panel * bytes;
            multiply_panel(from, x, product(0), panel + 1 == end ? next : from + bytes);
            body(panel, product(0));
        }
    }

    void time_mix(const Layer& l) {
        const int64_t end = share(panels, 1);
        for (int i = 0; i < 3; i++) look_for_zeros(mixed[i], i);
        const char* from = l.time_in + share(panels) * 3 * panel_bytes;
        for (int64_t panel = share(panels); panel < end; panel++) {
            for (int i = 0; i < 3; i++, from += panel_bytes) {
                const bool last = panel + 1 == end && i == 2;
                const char* next = last ? l.time_out + share(panels) * panel_bytes : from + panel_bytes;
                multiply_panel(from, mixed[i], product(i), next, i);
            }
            const int64_t c = panel * PANEL;
            for (int64_t row = 0; row < batch; row++) {
                const int64_t at = row * row_size + c, in = row * PANEL;
                float y[PANEL];
                const Past past{l.wkv_mean + at, l.wkv_b + at, l.wkv_base + at, l.wkv_age + at};
                gated_wkv(past, l.w + c, l.u + c, product(0) + in, product(1) + in, product(2) + in, y);
                fire(y, l.v_output, at);
                put(gated, arithmetic, row, c, y);
            }
        }
    }

    // The residual sum (SEW): the neurons' output is added.
    void add(float* y, float* membrane, int64_t at) {
        if (m.neuron == HEAVISIDE) heaviside(y);
        if (m.neuron == LIF) fire(y, membrane, at);
#pragma omp simd
        for (int j = 0; j < PANEL; j++) m.stream[at + j] += y[j];
    }

    void leave_time_mix(const Layer& l) {
        const char* next = l.channel_in + share(inner_panels + panels) * panel_bytes;
        each_panel(panels, l.time_out, panel_bytes, gated, next, [&](int64_t panel, float* y) {
            for (int64_t row = 0; row < batch; row++)
                add(y + row * PANEL, l.v_time, row * row_size + panel * PANEL);
        });
    }

    void activate(const Layer& l, int64_t row, int64_t c, float* y) {
        const int64_t at = row * inner_panels * PANEL + c;
        if (l.v_activation) fire(y, l.v_activation, at);
        else squared_relu(y);
        fire(y, l.v_channel_value, at);
        put(wide, arithmetic, row, c, y);
    }

    void keep_gate(int64_t at, const float* receptance) {
#pragma omp simd
        for (int j = 0; j < PANEL; j++) m.gate[at + j] = sigmoid(receptance[j]);
    }

    void channel_mix(const Layer& l) {
        const int64_t count = inner_panels + panels, end = share(count, 1);
        for (int i = 0; i < 2; i++) look_for_zeros(mixed[i], i);
        for (int64_t panel = share(count); panel < end; panel++) {
            const char* from = l.channel_in + panel * panel_bytes;
            const char* next = panel + 1 == end ? l.channel_out + share(panels) * inner_panel_bytes
                                                : from + panel_bytes;
            const bool key = panel < inner_panels;
            multiply_panel(from, mixed[key ? 0 : 1], product(0), next, key ? 0 : 1);
            const int64_t c = (key ? panel : panel - inner_panels) * PANEL;
            for (int64_t row = 0; row < batch; row++) {
                float* y = product(0) + row * PANEL;
                if (key) activate(l, row, c, y);
                else keep_gate(row * row_size + c, y);
            }
        }
    }

    void leave_channel_mix(const Layer& l, const char* next) {
        each_panel(panels, l.channel_out, inner_panel_bytes, wide, next, [&](int64_t panel, float* y) {
            for (int64_t row = 0; row < batch; row++) {
                const int64_t at = row * row_size + panel * PANEL;
#pragma omp simd
                for (int j = 0; j < PANEL; j++) y[row * PANEL + j] *= m.gate[at + j];
                add(y + row * PANEL, l.v_channel, at);
            }
        });
    }

    void head() {
        // The next token begins where this one did.
        const char* next = m.layers[0].time_in + share(panels) * 3 * panel_bytes;
        each_panel(head_panels(), m.head, panel_bytes, mixed[0], next, [&](int64_t panel, const float* y) {
            const int64_t left = m.vocabulary - panel * PANEL, count = left < PANEL ? left : PANEL;
            for (int64_t row = 0; row < batch; row++)
                std::memcpy(logits + row * m.vocabulary + panel * PANEL, y + row * PANEL, size_t(count) * 4);
        });
    }
};

}  // namespace

extern "C" {

int32_t decode_panel() { return PANEL; }
int32_t decode_has_bf16_dots() { return has_bf16_dots(); }

// Elements that the activations of `rows` rows take.
int64_t decode_activations(int64_t inputs, int64_t rows) {
    const int64_t chunk = chunk_length(inputs);
    return (inputs + chunk - 1) / chunk * rows * STRIDE;
}

// Large pages for memory that is read from end to end: fewer addresses to look up.
void decode_advise(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, start = (uintptr_t(data) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Logits (batch, vocabulary) after `tokens` (batch), and the state in the model's arrays one token further. Returns -1,
// or the first row whose token is outside the vocabulary, and then has done nothing.
int64_t decode_step(const Model* model, const int64_t* tokens, float* logits, int32_t threads) {
    for (int64_t row = 0; row < model->batch; row++)
        if (tokens[row] < 0 || tokens[row] >= model->vocabulary) return row;
    if (model->batch == 0) return -1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    Step(*model, tokens, logits, omp_get_thread_num(), omp_get_num_threads()).run();
#else
    Step(*model, tokens, logits, 0, 1).run();
#endif
    return -1;
}
}
