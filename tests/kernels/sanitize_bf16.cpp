// The linear layers for AVX-512 BF16, and attention's gradient, in arrays of exactly their size on the heap, aligned and not:
// compiled with sanitizers by test_sanitizers.py. Returns 0 where no byte beyond an array is touched and the numbers are right.
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention_bf16.cpp"
#include "attention_gradient_bf16.cpp"
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

// Against sums in double, by the chain rule.
bool run_attention_gradient(int64_t batch, int64_t kv_heads, int64_t groups, int64_t length, int64_t width, int64_t shift) {
  const int64_t heads = kv_heads * groups, rows = batch * heads * length;
  const int64_t numbers = rows * width, kv_numbers = numbers / groups;
  Array q(numbers * 2, shift), dy(numbers * 2, shift), y(numbers * 2, shift), dq(numbers * 2, shift);
  Array k(kv_numbers * 2, shift), v(kv_numbers * 2, shift), dk(kv_numbers * 2, shift), dv(kv_numbers * 2, shift);
  q.fill(numbers, 1), dy.fill(numbers, 1), k.fill(kv_numbers, 1), v.fill(kv_numbers, 1);
  std::vector<float> lse(static_cast<size_t>(rows));
  const int64_t q_strides[3] = {heads * length * width, length * width, width}, k_strides[3] = {kv_heads * length * width, length * width, width};
  const double scale = 1 / std::sqrt(double(width));
  AttentionGradient f = {{batch, heads, kv_heads, length, length, width, 2, scale, q.p, k.p, v.p, {}, {}, {}, y.p, lse.data()},
                         dy.p, {}, dq.p, dk.p, dv.p};
  for (int i = 0; i < 3; i++) {
    f.attention.q_strides[i] = f.dy_strides[i] = q_strides[i];
    f.attention.k_strides[i] = f.attention.v_strides[i] = k_strides[i];
  }
  if (!attention_bf16(f.attention) || !attention_gradient_bf16(f)) return false;
  struct Error {
    double wrong = 0, size = 0;
    void add(double got, double wanted) { wrong += (got - wanted) * (got - wanted), size += wanted * wanted; }
    bool is_small() const { return wrong <= 1e-4 * size; }
  } of_q, of_k, of_v;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t kv = 0; kv < kv_heads; kv++) {
      std::vector<double> keys(size_t(length * width)), values(size_t(length * width));
      for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < length; i++) {
          const int64_t head = kv * groups + g, row = ((b * heads + head) * length + i) * width;
          const int64_t first = (b * kv_heads + kv) * length * width;
          std::vector<double> query(static_cast<size_t>(width));
          double delta = 0;
          for (int64_t c = 0; c < width; c++) delta += dy[row + c] * y[((b * length + i) * heads + head) * width + c];
          for (int64_t j = 0; j <= i; j++) {
            double score = 0, upstream = 0;
            for (int64_t c = 0; c < width; c++) {
              score += q[row + c] * k[first + j * width + c], upstream += dy[row + c] * v[first + j * width + c];
            }
            const double share = std::exp(score * scale - lse[size_t(row / width)]), change = share * (upstream - delta) * scale;
            for (int64_t c = 0; c < width; c++) {
              query[size_t(c)] += change * k[first + j * width + c];
              keys[size_t(j * width + c)] += change * q[row + c], values[size_t(j * width + c)] += share * dy[row + c];
            }
          }
          for (int64_t c = 0; c < width; c++) of_q.add(dq[((b * length + i) * heads + head) * width + c], query[size_t(c)]);
        }
      for (int64_t j = 0; j < length; j++)
        for (int64_t c = 0; c < width; c++) {
          const int64_t at = ((b * length + j) * kv_heads + kv) * width + c;
          of_k.add(dk[at], keys[size_t(j * width + c)]), of_v.add(dv[at], values[size_t(j * width + c)]);
        }
    }
  return of_q.is_small() && of_k.is_small() && of_v.is_small();
}

int main() {
  for (const int64_t length : {2, 63, 64, 191, 193, 260})
    for (const int64_t shift : {0, 2})
      if (!run_attention_gradient(2, 1 + length % 2, 2, length, length % 2 ? 80 : length == 260 ? 144 : 48, shift)) return 1;
  for (const int64_t columns : {1, 31, 33, 128, 129, 513, 576, 4700, 9217})  // the last is long: rows go by fours
    for (const int64_t batch : {1, 2, 7, 8})
      for (const int64_t shift : {0, 2})
        if (!run(batch, 9, columns, shift) || !run_plain(batch, 9, columns, shift)) return 1;
  return 0;
}
