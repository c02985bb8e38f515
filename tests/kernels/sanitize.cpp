// The CPU kernels on odd shapes, in arrays of exactly their size on the heap: compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer by test_sanitizers.py. Says nothing and returns 0 where no byte beyond an array is touched
// and a sequence gives what its steps give.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "blocks.h"
#include "isa.cpp"

using namespace stripedrag;
using STRIPEDRAG_ISA::bfloat16;
using STRIPEDRAG_ISA::kernels;

template <class T>
constexpr Element element_of = sizeof(T) == 2 ? Element::bfloat16 : sizeof(T) == 4 ? Element::float32 : Element::float64;

std::mt19937 random_bits(0);

template <class T>
std::unique_ptr<T[]> numbers(int64_t count) {
  auto array = std::make_unique<T[]>(size_t(count));
  std::uniform_real_distribution<float> uniform(-0.7f, 0.7f);
  for (int64_t i = 0; i < count; i++) array[i] = STRIPEDRAG_ISA::narrow<T>(STRIPEDRAG_ISA::Work<T>(uniform(random_bits)));
  return array;
}

// Aligned as checkpoints have to be, and as y and dz are where their stores may pass the cache.
template <class W>
struct Aligned {
  explicit Aligned(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(count) * sizeof(W)) != 0) std::abort();
    p = static_cast<W*>(memory);
  }
  ~Aligned() { std::free(p); }
  W* p;
};

template <class T>
bool run(Shape shape, bool with_mask, int64_t row_padding) {
  using W = STRIPEDRAG_ISA::Work<T>;
  const int64_t B = shape.batch, L = shape.length, H = shape.channels, N = shape.modes, K = shape.taps, G = shape.groups;
  const int64_t row = 3 * H + row_padding, batch = L * row;
  auto fir_weight = numbers<W>(3 * H * K), fir_bias = numbers<W>(3 * H), poles = numbers<W>(G * N * 2),
       residues = numbers<W>(G * N * 2), skip = numbers<W>(H);
  auto z = numbers<T>(B * batch - row_padding), dy = numbers<T>(B * L * H);
  auto fir = numbers<T>(B * 3 * H * (K - 1)), fir_out = numbers<T>(B * 3 * H * (K - 1)), dfir = numbers<T>(B * 3 * H * (K - 1));
  auto iir = numbers<W>(B * H * N * 2), iir_out = numbers<W>(B * H * N * 2), diir = numbers<W>(B * H * N * 2);
  auto real = std::make_unique<uint8_t[]>(size_t(B * L));
  for (int64_t i = 0; i < B * L; i++) real[i] = i % 5 != 0;
  Aligned<T> y(B * L * H), dz(B * L * 3 * H);
  Aligned<W> checkpoints(kernels.checkpoint_numbers(element_of<T>, shape));

  const Parameters parameters = {fir_weight.get(), fir_bias.get(), poles.get(), residues.get(), skip.get()};
  const Sequence sequence = {z.get(), batch, row, with_mask ? real.get() : nullptr, fir.get(), iir.get()};
  const Filter filter = {shape, parameters, sequence, y.p, L * H, H, fir_out.get(), iir_out.get(), checkpoints.p};
  if (!kernels.filter(element_of<T>, filter)) return false;

  auto dfir_weight = numbers<W>(3 * H * K), dfir_bias = numbers<W>(3 * H), dpoles = numbers<W>(H * N * 2),
       dresidues = numbers<W>(H * N * 2), dskip = numbers<W>(H), diir_state = numbers<W>(B * H * N * 2);
  const Gradient gradient = {shape,          parameters,      sequence,       checkpoints.p, dy.get(),
                             diir.get(),     dz.p,            dfir_weight.get(), dfir_bias.get(), dpoles.get(),
                             dresidues.get(), dskip.get(),    dfir.get(),     diir_state.get()};
  if (!kernels.gradient(element_of<T>, gradient)) return false;

  if (with_mask || L > 100) return true;  // unoptimised, the large ones would take minutes
  Shape one = shape;
  one.length = 1;
  for (int64_t t = 0; t < L; t++) {
    auto token = numbers<T>(B * 3 * H), out = numbers<T>(B * H);
    for (int64_t b = 0; b < B; b++) memcpy(&token[b * 3 * H], &z[b * batch + t * row], size_t(3 * H) * sizeof(T));
    const Element wide = element_of<W>;
    kernels.step(element_of<T>, {one, parameters, wide, wide, token.get(), out.get(), fir.get(), iir.get()});
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        const double step = STRIPEDRAG_ISA::widen(out[b * H + h]), whole = STRIPEDRAG_ISA::widen(y.p[(b * L + t) * H + h]);
        if (!(std::abs(step - whole) <= (sizeof(T) == 2 ? 2e-2 : 1e-4) * (1 + std::abs(whole)))) {
          std::printf("row %d channel %d: %g by steps, %g at once\n", int(t), int(h), step, whole);
          return false;
        }
      }
  }
  return true;
}

template <class T>
bool run_linear(int64_t batch, int64_t rows, int64_t columns) {
  auto weight = numbers<T>(rows * columns), bias = numbers<T>(rows), x = numbers<T>(batch * columns), y = numbers<T>(batch * rows);
  const Linear f = {batch, rows, columns, 2, weight.get(), bias.get(), x.get(), y.get()};
  if (!(batch > kMaxBatch ? kernels.gemm : kernels.linear)(element_of<T>, f)) return false;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < rows; r++) {
      double sum = STRIPEDRAG_ISA::widen(bias[r]);
      for (int64_t i = 0; i < columns; i++)
        sum += double(STRIPEDRAG_ISA::widen(weight[r * columns + i])) * STRIPEDRAG_ISA::widen(x[b * columns + i]);
      if (!(std::abs(sum - STRIPEDRAG_ISA::widen(y[b * rows + r])) <= 2e-2 * (1 + std::abs(sum)))) return false;
    }
  return true;
}

// Attention of the last L of P + L tokens, held to sums over all keys.
template <class T>
bool run_attention(int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t past, int64_t width) {
  const int64_t keys = past + length, row = heads * width, kv_row = kv_heads * width;
  const auto q = numbers<T>(batch * length * row), y = numbers<T>(batch * length * row);
  const auto k = numbers<T>(batch * keys * kv_row), v = numbers<T>(batch * keys * kv_row);
  const auto lse = numbers<float>(batch * heads * length);
  const Attention f = {batch, heads, kv_heads, length, keys, width, 2, 1 / std::sqrt(double(width)), q.get(), k.get(), v.get(),
                       {length * row, width, row}, {keys * kv_row, width, kv_row}, {keys * kv_row, width, kv_row}, y.get(), lse.get()};
  if (!kernels.attention(element_of<T>, f)) return false;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = 0; t < length; t++) {
        const int64_t kv = h / (heads / kv_heads);
        double total = 0, sum = 0;
        for (int64_t key = 0; key <= past + t; key++) {
          double score = 0;
          const int64_t at = (b * keys + key) * kv_row + kv * width;
          for (int64_t c = 0; c < width; c++)
            score += double(STRIPEDRAG_ISA::widen(q[(b * length + t) * row + h * width + c])) * STRIPEDRAG_ISA::widen(k[at + c]);
          const double share = std::exp(score * f.scale);
          total += share, sum += share * STRIPEDRAG_ISA::widen(v[at + width - 1]);
        }
        const double made = STRIPEDRAG_ISA::widen(y[((b * length + t) * heads + h) * width + width - 1]);
        if (!(std::abs(made - sum / total) <= (sizeof(T) == 2 ? 1e-2 : 1e-5))) return false;
        if (!(std::abs(lse[(b * heads + h) * length + t] - std::log(total)) <= 1e-4)) return false;
      }
  return true;
}

// A block with attention, or with the Hyena operator of N modes and K taps: its numbers are held to the model's elsewhere.
template <class T>
bool run_block(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_width, int64_t tokens, int modes, int taps) {
  const int64_t H = heads * head_width, mlp = H + 3, in_rows = modes ? 3 * H : (heads + 2 * kv_heads) * head_width;
  const auto scale = numbers<float>(H);
  const auto in = numbers<T>(in_rows * H), out = numbers<T>(H * H), gate = numbers<T>(mlp * H), down = numbers<T>(H * mlp);
  const auto weights = [](const auto& w, int64_t rows, int64_t columns) {
    return Weights{0, rows, columns, w.get(), nullptr, nullptr, nullptr};
  };
  Block block = {H, mlp, 1e-5, scale.get(), scale.get(), true, weights(in, in_rows, H), weights(out, H, H),
                 weights(gate, mlp, H), weights(gate, mlp, H), weights(down, H, mlp), heads, kv_heads, {}};
  const auto fir_weight = numbers<float>(3 * H * taps), fir_bias = numbers<float>(3 * H), skip = numbers<float>(H);
  const auto systems = numbers<float>(H * modes * 2);
  if (modes) {
    block.heads = 0;
    block.hyena.shape = {1, 1, H, H, H, modes, taps, 1};
    block.hyena.parameters = {fir_weight.get(), fir_bias.get(), systems.get(), systems.get(), skip.get()};
    block.hyena.fir_element = block.hyena.skip_element = Element::float32;
  }
  const auto fir = numbers<T>(batch * 3 * H * (taps - 1)), keys = numbers<T>(batch * kv_heads * tokens * head_width);
  const auto iir = numbers<float>(batch * H * modes * 2), values = numbers<T>(batch * kv_heads * tokens * head_width);
  const auto cos = numbers<T>(batch * head_width / 2), sin = numbers<T>(batch * head_width / 2), x = numbers<T>(batch * H);
  const Token token = {element_of<T>, batch, 2, cos.get(), sin.get(), head_width / 2};
  const Memory memory = {fir.get(), iir.get(), keys.get(), values.get(), {kv_heads * tokens * head_width, tokens * head_width}, tokens};
  const BlockStep step(block, token, memory, kernels);
  const auto scratch = std::make_unique<char[]>(size_t(step.scratch_bytes()));
  return step.run(reinterpret_cast<char*>(x.get()), scratch.get());
}

template <class T>
bool run_quantized(int bits, int64_t batch, int64_t rows, int64_t columns) {
  const int64_t blocks = (columns + 127) / 128, bytes = bits == 8 ? rows * columns : rows * blocks * 64;
  const auto weight = std::make_unique<uint8_t[]>(size_t(bytes));
  for (int64_t i = 0; i < bytes; i++) weight[i] = uint8_t(random_bits());
  const auto scale = numbers<float>(rows);
  const auto scales = numbers<bfloat16>(rows * blocks * 4), offsets = numbers<bfloat16>(rows * blocks * 4);
  const auto bias = numbers<T>(rows), x = numbers<T>(batch * columns), y = numbers<T>(batch * rows), w = numbers<T>(rows * columns);
  const Quantize q = {rows, columns, 2, 3, w.get(), weight.get(), scales.get(), offsets.get()};
  if (bits == 4) kernels.quantize(element_of<T>, q);
  const void* scale_of = bits == 8 ? (const void*)scale.get() : scales.get();
  QuantizedLinear f = {bits, batch, rows, columns, 2, weight.get(), scale_of, offsets.get(), bias.get(), x.get(), y.get()};
  if (!kernels.quantized_linear(element_of<T>, f)) return false;
  f.y = w.get();
  kernels.dequantize(element_of<T>, f);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < rows; r++) {
      double sum = STRIPEDRAG_ISA::widen(bias[r]), size = 1;
      for (int64_t i = 0; i < columns; i++) {
        const double product = double(STRIPEDRAG_ISA::widen(w[r * columns + i])) * STRIPEDRAG_ISA::widen(x[b * columns + i]);
        sum += product, size += std::abs(product);
      }
      if (!(std::abs(sum - STRIPEDRAG_ISA::widen(y[b * rows + r])) <= 1e-2 * size)) return false;
    }
  return true;
}

template <class T>
bool run_rows(int64_t rows, int64_t columns) {
  using W = STRIPEDRAG_ISA::Work<T>;
  const int64_t count = rows * columns;
  const auto x = numbers<T>(count), dy = numbers<T>(count), scale = numbers<T>(columns);
  const auto wide = numbers<W>(columns), dscale = numbers<W>(columns);
  const auto y = numbers<T>(count), dx = numbers<T>(count), other = numbers<T>(count);
  for (const bool is_wide : {false, true}) {
    const Norm norm = {rows, columns, 2, 1e-5, is_wide, x.get(), is_wide ? (const void*)wide.get() : scale.get(), y.get()};
    if (!kernels.norm(element_of<T>, norm)) return false;
    if (!kernels.norm_gradient(element_of<T>, {norm, dy.get(), dx.get(), dscale.get()})) return false;
    for (int64_t r = 0; r < rows; r++) {
      double squares = 0;
      for (int64_t c = 0; c < columns; c++) squares += std::pow(double(STRIPEDRAG_ISA::widen(x[r * columns + c])), 2);
      const int64_t last = (r + 1) * columns - 1;
      const double factor = is_wide ? wide[columns - 1] : STRIPEDRAG_ISA::widen(scale[columns - 1]);
      const double exact = STRIPEDRAG_ISA::widen(x[last]) / std::sqrt(squares / columns + 1e-5) * factor;
      if (!(std::abs(STRIPEDRAG_ISA::widen(y[last]) - exact) <= 2e-2 * (1 + std::abs(exact)))) return false;
    }
  }
  if constexpr (sizeof(T) < 8) {
    const Gate gate = {count, 2, x.get(), dy.get(), y.get()};
    kernels.gate(element_of<T>, gate);
    kernels.gate_gradient(element_of<T>, {gate, dy.get(), dx.get(), other.get()});
    const double a = STRIPEDRAG_ISA::widen(x[count - 1]), b = STRIPEDRAG_ISA::widen(dy[count - 1]);
    if (!(std::abs(STRIPEDRAG_ISA::widen(y[count - 1]) - a / (1 + std::exp(-a)) * b) <= 1e-2)) return false;
  }
  return true;
}

int main() {
  struct Case {
    int64_t batch, length, heads, width, groups;
    int modes, taps, threads;
  };
  const Case cases[] = {{1, 1, 1, 1, 1, 1, 1, 1},   {2, 2, 1, 5, 5, 3, 2, 2},    {1, 31, 3, 7, 7, 5, 3, 3},
                        {3, 33, 1, 33, 11, 16, 8, 2}, {1, 65, 2, 31, 62, 2, 4, 2}, {2, 70, 5, 3, 1, 7, 5, 1},
                        {1, 97, 1, 100, 50, 8, 3, 4}, {1, 40, 3, 64, 192, 4, 3, 2}, {2, 64, 1, 48, 48, 9, 7, 3},
                        {1, 520, 1, 1040, 1040, 1, 3, 2}, {1, 520, 1, 1024, 512, 2, 3, 2},
                        {1, 520, 1, 1024, 1, 5, 3, 2},   {1, 520, 1, 1024, 512, 2, 3, 3}};
  // The last four are large: one with a pair that is half full, whose y is stored as it comes; then, where vectors are long
  // enough for stores that pass the cache, one staged a tile at a time, one not, one in blocks of unequal width.
  for (const Case& c : cases)
    for (const bool with_mask : {false, true}) {
      const Shape shape = {c.batch, c.length, c.heads * c.width, c.width, c.groups, c.modes, c.taps, c.threads};
      if (!run<float>(shape, with_mask, 0) || !run<bfloat16>(shape, with_mask, 5) || !run<double>(shape, with_mask, 1)) {
        std::printf("heads %d of %d, %d rows\n", int(c.heads), int(c.width), int(c.length));
        return 1;
      }
    }
  for (const int64_t columns : {1, 31, 33, 576})
    for (const int64_t batch : {1, 3, 8})
      if (!run_linear<float>(batch, 37, columns) || !run_linear<bfloat16>(batch, 300, columns)) return 1;
  for (const int64_t columns : {1, 31, 257})  // by many rows: more than are taken at once, and a panel partly filled
    if (!run_linear<float>(9, 70, columns) || !run_linear<bfloat16>(101, 37, columns)) return 1;
  if (!run_linear<bfloat16>(13, 1700, 40)) return 1;  // tasks of several panels
  for (const int64_t width : {16, 80})
    for (const int64_t length : {1, 29})
      if (!run_attention<float>(1, 4, 2, length, 250, width) || !run_attention<bfloat16>(1, 3, 3, length, 3, width)) return 1;
  for (const int64_t head_width : {2, 10, 64})
    for (const int64_t tokens : {1, 255, 513})
      for (const int64_t kv_heads : {1, 2})
        if (!run_block<float>(2, 6, kv_heads, head_width, tokens, 0, 1) || !run_block<bfloat16>(1, 6, kv_heads, head_width, tokens, 0, 1))
          return 1;
  for (const int modes : {1, 3, 8})
    if (!run_block<float>(2, 1, 1, 34, 1, modes, 3) || !run_block<bfloat16>(3, 1, 1, 34, 1, modes, 2)) return 1;
  for (const int64_t columns : {1, 31, 33, 576, 4700})  // the last is long: rows of the weight go by fours
    for (const int bits : {8, 4})
      if (!run_quantized<float>(bits, 1, 7, columns) || !run_quantized<bfloat16>(bits, 3, 9, columns)) return 1;
  for (const int64_t columns : {1, 31, 33, 576})
    if (!run_rows<float>(70, columns) || !run_rows<bfloat16>(5, columns) || !run_rows<double>(3, columns)) return 1;
  return 0;
}
