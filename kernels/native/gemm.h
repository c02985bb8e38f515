// A linear layer on many rows, y = x Wᵀ + b, for processors without products of bfloat16: numbers are made wide as they come
// into the cache, products and sums are float32. One order of sums, whatever the threads and the rows beside.
#pragma once
#include "product.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int64_t kDepth = kPanel > 32 ? 128 : 256;  // columns of x at a time: a panel of the weight stays in the first-level cache
constexpr int64_t kRowsAtOnce = 96;                  // of x, beside which the panels of a task stay in the second-level cache
constexpr int64_t kTaskRows = 240;                   // for which a weight is laid out once
constexpr int64_t kTaskPanels = 192 / kPanel;

// How y is cut into tasks of `rows` by `panels` panels, of each as many as `chunks` by `groups`.
struct Tasks {
  int64_t chunks, groups, rows, panels;
  explicit Tasks(const Linear& f) {
    const int64_t all = divide_up(f.rows, kPanel), enough = 4 * f.threads;
    chunks = divide_up(f.batch, kTaskRows);
    panels = larger(smaller(2, all), smaller(kTaskPanels, all * chunks / enough));
    groups = divide_up(all, panels);
    chunks = larger(chunks, smaller(divide_up(enough, groups), divide_up(f.batch, 4 * kSumRows)));
    rows = divide_up(divide_up(f.batch, chunks), kSumRows) * kSumRows;
    chunks = divide_up(f.batch, rows);
  }
};

template <class T>
static bool gemm(const Linear& f) {
  const Tasks tasks(f);
  const int64_t width = tasks.panels * kPanel, numbers = kDepth * width + kRowsAtOnce * kDepth + tasks.rows * width;
  Scratch<float> scratch(numbers * f.threads);
  if (!scratch.has_memory()) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(f.threads) if (f.threads > 1)
  for (int64_t task = 0; task < tasks.chunks * tasks.groups; task++) {
    float* const weights = scratch.begin() + numbers * thread_index();  // panels (kDepth, kPanel)
    float* const x = weights + kDepth * width;                          // (kRowsAtOnce, kDepth)
    float* const sums = x + kRowsAtOnce * kDepth;                       // (tasks.rows, width)
    const int64_t column = task / tasks.chunks * width, columns = smaller(width, f.rows - column);  // of y
    const int64_t begin = task % tasks.chunks * tasks.rows, rows = smaller(tasks.rows, f.batch - begin);
    const T* bias = f.bias == nullptr ? nullptr : static_cast<const T*>(f.bias) + column;
    for (int64_t n = 0; n < width; n++) sums[n] = bias == nullptr || n >= columns ? 0 : widen(bias[n]);
    for (int64_t i = 1; i < tasks.rows; i++) memcpy(sums + i * width, sums, size_t(width) * sizeof(float));
    for (int64_t first = 0; first < f.columns; first += kDepth) {
      const int64_t depth = smaller(kDepth, f.columns - first);
      for (int64_t panel = 0; panel < columns; panel += kPanel)
        lay_out_panel(static_cast<const T*>(f.weight) + first, f.columns, column + panel, f.rows, depth, weights + panel * kDepth);
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t some = divide_up(smaller(kRowsAtOnce, rows - row), kSumRows) * kSumRows;
        for (int64_t i = 0; i < some; i++) {
          const T* from = static_cast<const T*>(f.x) + (begin + smaller(row + i, rows - 1)) * f.columns + first;
          for (int64_t k = 0; k < depth; k += kLanes<float>)
            store_in_order(x + i * kDepth + k, load_in_order(from + k, int(smaller(kLanes<float>, depth - k))));
        }
        for (int64_t panel = 0; panel < columns; panel += kPanel)
          for (int64_t i = 0; i < some; i += kSumRows)
            multiply<kSumVectors, Begin::sums>(x + i * kDepth, kDepth, weights + panel * kDepth, depth,
                                               sums + (row + i) * width + panel, width);
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      T* y = static_cast<T*>(f.y) + (begin + i) * f.rows + column;
      for (int64_t n = 0; n < columns; n += kLanes<float>)
        store_in_order(y + n, load_in_order(sums + i * width + n), int(smaller(kLanes<float>, columns - n)));
    }
  }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
