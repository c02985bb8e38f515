// A linear layer on many rows, y = x Wᵀ + b, for processors without products of bfloat16: numbers are made wide as they come
// into the cache, products and sums are float32. One order of sums, whatever the threads and the rows beside.
#pragma once
#include "product.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int64_t kDepth = 256;       // columns of x at a time: a panel of the weight stays in the first-level cache
constexpr int64_t kRowsAtOnce = 96;   // of x, which stay in the second-level cache with their sums
constexpr int64_t kTaskRows = 480;    // for which a weight is laid out once
constexpr int64_t kTaskPanels = 192 / kPanel;

template <class T>
static bool gemm(const Linear& f) {
  const int64_t panels = divide_up(f.rows, kPanel), chunks = divide_up(f.batch, kTaskRows);
  // Fewer panels a task where there would be too few tasks for the threads.
  const int64_t some = larger(1, smaller(kTaskPanels, panels * chunks / (4 * f.threads)));
  const int64_t groups = divide_up(panels, some), width = some * kPanel;
  const int64_t numbers = f.columns * width + kRowsAtOnce * (kDepth + width) + width;
  Scratch<float> scratch(numbers * f.threads);
  if (!scratch.has_memory()) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(f.threads) if (f.threads > 1)
  for (int64_t task = 0; task < chunks * groups; task++) {
    float* const weights = scratch.begin() + numbers * thread_index();  // panels (columns, kPanel)
    float* const x = weights + f.columns * width;                       // (kRowsAtOnce, kDepth)
    float* const sums = x + kRowsAtOnce * kDepth;                       // (kRowsAtOnce, width)
    float* const bias = sums + kRowsAtOnce * width;
    const int64_t column = task / chunks * width, columns = smaller(width, f.rows - column);  // of y
    for (int64_t panel = 0; panel < columns; panel += kPanel)
      lay_out_panel(static_cast<const T*>(f.weight), f.columns, column + panel, f.rows, f.columns, weights + panel * f.columns);
    for (int64_t i = 0; i < width; i++)
      bias[i] = f.bias == nullptr || i >= columns ? 0 : widen(static_cast<const T*>(f.bias)[column + i]);
    const int64_t end = smaller(f.batch, (task % chunks + 1) * kTaskRows);
    for (int64_t row = task % chunks * kTaskRows; row < end; row += kRowsAtOnce) {
      const int64_t rows = smaller(kRowsAtOnce, end - row), padded = divide_up(rows, kSumRows) * kSumRows;
      for (int64_t i = 0; i < padded; i++)
        for (int64_t n = 0; n < width; n += kLanes<float>) store_in_order(sums + i * width + n, load_in_order(bias + n));
      for (int64_t first = 0; first < f.columns; first += kDepth) {
        const int64_t depth = smaller(kDepth, f.columns - first);
        for (int64_t i = 0; i < padded; i++) {
          const T* from = static_cast<const T*>(f.x) + (row + smaller(i, rows - 1)) * f.columns + first;
          for (int64_t k = 0; k < depth; k += kLanes<float>)
            store_in_order(x + i * kDepth + k, load_in_order(from + k, int(smaller(kLanes<float>, depth - k))));
        }
        for (int64_t panel = 0; panel < columns; panel += kPanel)
          for (int64_t i = 0; i < padded; i += kSumRows)
            multiply<kSumVectors, Begin::sums>(x + i * kDepth, kDepth, weights + panel * f.columns + first * kPanel, depth,
                                        sums + i * width + panel, width);
      }
      for (int64_t i = 0; i < rows; i++) {
        T* y = static_cast<T*>(f.y) + (row + i) * f.rows + column;
        for (int64_t n = 0; n < columns; n += kLanes<float>)
          store_in_order(y + n, load_in_order(sums + i * width + n), int(smaller(kLanes<float>, columns - n)));
      }
    }
  }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
