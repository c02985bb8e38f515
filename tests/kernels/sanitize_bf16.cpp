// The linear layers for AVX-512 BF16, in arrays of exactly their size on the heap, aligned and not: compiled with
// sanitizers by test_sanitizers.py. Returns 0 where no byte beyond an array is touched and the products are right.
#include <cmath>
#include <cstdlib>
#include <random>

#include "linear_bf16.cpp"

using namespace stripedrag;
using namespace stripedrag::STRIPEDRAG_ISA;

std::mt19937 random_bits(0);

// Ends where its allocation ends, and begins `shift` bytes after it.
struct Array {
  Array(int64_t bytes, int64_t shift) : base(static_cast<char*>(std::malloc(size_t(bytes + shift)))), p(base + shift) {
    for (int64_t i = 0; i < bytes; i++) p[i] = char(random_bits());
  }
  ~Array() { std::free(base); }
  void fill(int64_t count, float size) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; i++) {
      const bfloat16 number = narrow<bfloat16>(size * normal(random_bits));
      memcpy(p + 2 * i, &number, sizeof number);
    }
  }
  double operator[](int64_t i) const {
    bfloat16 number;
    memcpy(&number, p + 2 * i, sizeof number);
    return widen(number);
  }
  char *base, *p;
};

bool run(int64_t batch, int64_t rows, int64_t columns, int64_t shift) {
  const int64_t blocks = divide_up(columns, kBlockColumns), groups = blocks * kBlockGroups;
  Array weight(rows * blocks * 64, shift), scale(rows * groups * 2, shift), offset(rows * groups * 2, shift);
  Array bias(rows * 2, shift), x(batch * columns * 2, shift), y(batch * rows * 2, shift);
  scale.fill(rows * groups, 0.01f), offset.fill(rows * groups, 0.1f), bias.fill(rows, 1), x.fill(batch * columns, 1);
  if (!run_linear_int4({4, batch, rows, columns, 2, weight.p, scale.p, offset.p, batch % 2 ? bias.p : nullptr, x.p, y.p}))
    return false;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < rows; r++) {
      double sum = batch % 2 ? bias[r] : 0, size = 1;
      for (int64_t i = 0; i < columns; i++) {
        uint16_t word;
        memcpy(&word, weight.p + 2 * ((r * blocks + i / kBlockColumns) * kGroupColumns + i % kGroupColumns), sizeof word);
        const int64_t group = i / kGroupColumns, level = word >> (4 * (group % kBlockGroups)) & 15;
        const double product = (double(level) * scale[r * groups + group] + offset[r * groups + group]) * x[b * columns + i];
        sum += product, size += std::abs(product);
      }
      if (!(std::abs(y[b * rows + r] - sum) <= 4e-3 * std::abs(sum) + 1e-5 * size)) return false;
    }
  return true;
}

bool run_plain(int64_t batch, int64_t rows, int64_t columns, int64_t shift) {
  Array weight(rows * columns * 2, shift), bias(rows * 2, shift), x(batch * columns * 2, shift), y(batch * rows * 2, shift);
  weight.fill(rows * columns, 1), bias.fill(rows, 1), x.fill(batch * columns, 1);
  if (!run_linear({batch, rows, columns, 2, weight.p, batch % 2 ? bias.p : nullptr, x.p, y.p})) return false;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < rows; r++) {
      double sum = batch % 2 ? bias[r] : 0, size = 1;
      for (int64_t i = 0; i < columns; i++) {
        const double product = weight[r * columns + i] * x[b * columns + i];
        sum += product, size += std::abs(product);
      }
      if (!(std::abs(y[b * rows + r] - sum) <= 4e-3 * std::abs(sum) + 1e-5 * size)) return false;
    }
  return true;
}

int main() {
  for (const int64_t columns : {1, 31, 33, 128, 129, 513, 576, 4700, 9217})  // the last is long: rows go by fours
    for (const int64_t batch : {1, 2, 7, 8})
      for (const int64_t shift : {0, 2})
        if (!run(batch, 9, columns, shift) || !run_plain(batch, 9, columns, shift)) return 1;
  return 0;
}
