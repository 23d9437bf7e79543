// Spreading work over threads, scratch memory, and turning run-time switches into template arguments.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

// For functions that work long enough for the call not to matter: many inlined copies take long to compile.
#define NOINLINE __attribute__((noinline))

namespace spikescale {

struct Extent {
    int64_t batch, length, channels;
    int64_t elements() const { return batch * length * channels; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeroed scratch memory that starts at a cache line, so that no two threads write to the same one; null if
// the size is 0.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t size) {
        if (size == 0) return;
        const size_t bytes = size_t(ceil_div(size * int64_t(sizeof(T)), 64) * 64);
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    operator T*() { return data_; }
    operator const T*() const { return data_; }

  private:
    T* data_ = nullptr;
};

// Below this many elements, waking threads costs more than it saves.
constexpr int64_t FEW_ELEMENTS = 16384;

// body(task) for every task; `elements` is the size of the whole work.
template <typename Body>
void parallel_for(int64_t tasks, int threads, int64_t elements, Body body) {
    const int64_t team = elements < FEW_ELEMENTS ? 1 : (threads < tasks ? threads : tasks);
#pragma omp parallel for num_threads(int(team)) schedule(static) if (team > 1)
    for (int64_t task = 0; task < tasks; task++) body(task);
}

// How many channels a task takes when `batch` rows are to keep `threads` evenly busy: as many as possible, as a
// row of channels is contiguous in memory, in multiples of `unit`.
inline int64_t block_width(int64_t batch, int64_t channels, int threads, int64_t unit) {
    if (batch >= 4 * int64_t(threads) || threads <= 1) return channels;
    int64_t blocks = 1;
    while (batch * blocks % threads) blocks++;
    const int64_t width = ceil_div(ceil_div(channels, blocks), unit) * unit;
    return width < channels ? width : channels;
}

// body(std::true_type) or body(std::false_type).
template <typename Body>
void with_bool(bool value, Body body) {
    if (value) body(std::true_type{});
    else body(std::false_type{});
}

// The sum of `parts` rows of n numbers that are `stride` apart.
inline void add_rows(const double* rows, int64_t parts, int64_t stride, int64_t n, float* out) {
    Buffer<double> sums(n);
    for (int64_t p = 0; p < parts; p++)
        for (int64_t c = 0; c < n; c++) sums[c] += rows[p * stride + c];
    for (int64_t c = 0; c < n; c++) out[c] = float(sums[c]);
}

}  // namespace spikescale
