// The binding: addresses and sizes in, nothing out. The one caller, kernels/cpu.py, owns every array, and the door before
// it has checked shapes, dtypes and contiguity; so no torch is needed to build this, and nothing is copied.
#include <nanobind/nanobind.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(STRIPEDRAG_BF16)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "blocks.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace stripedrag {

// As CMakeLists.txt compiles them.
#if defined(__x86_64__)
namespace v2 { extern const Kernels kernels; }
namespace v3 { extern const Kernels kernels; }
namespace v4 { extern const Kernels kernels; }
#else
namespace native { extern const Kernels kernels; }
#endif

#if defined(STRIPEDRAG_BF16)
namespace bf16 {
extern bool (*const attention_bf16)(const Attention&);
extern bool (*const attention_gradient_bf16)(const AttentionGradient&);
extern bool (*const linear_bf16)(const Linear&);
extern bool (*const linear_int4_bf16)(const QuantizedLinear&);
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

// In order of preference. Levels of the x86-64 psABI; elsewhere one unit for the compiler's default target.
const Choice* choices(size_t* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const Choice all[] = {{"v4", &v4::kernels, __builtin_cpu_supports("x86-64-v4") != 0},
                               {"v3", &v3::kernels, __builtin_cpu_supports("x86-64-v3") != 0},
                               {"v2", &v2::kernels, __builtin_cpu_supports("x86-64-v2") != 0}};
#else
  static const Choice all[] = {{"native", &native::kernels, true}};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

// Raises ImportError where STRIPEDRAG_ISA names a set that is not there, or none runs.
const Choice& choose() {
  size_t count = 0;
  const Choice* all = choices(&count);
  const char* wanted = std::getenv("STRIPEDRAG_ISA");
  std::string runnable;
  for (size_t i = 0; i < count; i++)
    if (all[i].runs) {
      if (wanted == nullptr || *wanted == 0 || std::string(wanted) == all[i].name) return all[i];
      runnable += (runnable.empty() ? "" : ", ") + std::string(all[i].name);
    }
  if (runnable.empty()) throw nb::import_error("this processor has not even SSE4.2 (x86-64-v2), which the native kernels need");
  throw nb::import_error(("STRIPEDRAG_ISA is '" + std::string(wanted) + "'; this processor runs " + runnable).c_str());
}

// Those of the set that was chosen, but for what AVX-512 BF16 has its own.
Kernels kernels;

// Whether attention in bfloat16, and its gradient, are by products of it. With AMX neither is tried: torch's own has that.
bool has_bf16_attention = false;
bool (*attention_gradient)(const AttentionGradient&) = nullptr;

void choose_bf16(const Choice& chosen) {
#if defined(STRIPEDRAG_BF16)
  unsigned a = 0, b, c, d = 0;
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22;
  const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16);
  const bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
  if (std::string(chosen.name) != "v4" || !has_bf16) return;
  kernels.linear = [](Element element, const Linear& f) {
    return element == Element::bfloat16 ? bf16::linear_bf16(f) : v4::kernels.linear(element, f);
  };
  kernels.quantized_linear = [](Element element, const QuantizedLinear& f) {
    const bool has_own = element == Element::bfloat16 && f.bits == 4;
    return has_own ? bf16::linear_int4_bf16(f) : v4::kernels.quantized_linear(element, f);
  };
  kernels.attention = [](Element element, const Attention& f) {
    return element == Element::bfloat16 ? bf16::attention_bf16(f) : v4::kernels.attention(element, f);
  };
  has_bf16_attention = !has_amx;
  attention_gradient = bf16::attention_gradient_bf16;
#else
  (void)chosen;
#endif
}

template <class P>
P* at(uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

// From (B, L, H, head width, G, N, K, threads).
Shape shape_of(const nb::tuple& sizes) {
  const auto size = [&](size_t i) { return nb::cast<int64_t>(sizes[i]); };
  return {size(0), size(1), size(2), size(3), size(4), int(size(5)), int(size(6)), int(size(7))};
}

struct Addresses {
  const nb::tuple& all;
  size_t next = 0;
  uintptr_t operator()() { return nb::cast<uintptr_t>(all[next++]); }
};

// Runs a kernel, without the interpreter lock unless it is over in microseconds.
template <class Run>
auto run_kernel(bool takes_long, Run run) {
  if (!takes_long) return run();
  nb::gil_scoped_release release;
  return run();
}

Parameters parameters_of(Addresses& a) {
  Parameters p;
  p.fir_weight = at<void>(a());
  p.fir_bias = at<void>(a());
  p.poles = at<void>(a());
  p.residues = at<void>(a());
  p.skip = at<void>(a());
  return p;
}

Sequence sequence_of(Addresses& a, int64_t batch_stride, int64_t row_stride) {
  Sequence s;
  s.z = at<void>(a());
  s.z_batch_stride = batch_stride, s.z_row_stride = row_stride;
  s.real = at<uint8_t>(a());
  s.fir_state = at<void>(a());
  s.iir_state = at<void>(a());
  return s;
}

void run_filter(int element, const nb::tuple& sizes, int64_t batch_stride, int64_t row_stride,
                int64_t y_batch_stride, int64_t y_row_stride, const nb::tuple& addresses) {
  Addresses a{addresses};
  Filter f;
  f.shape = shape_of(sizes);
  f.parameters = parameters_of(a);
  f.sequence = sequence_of(a, batch_stride, row_stride);
  f.y = at<void>(a());
  f.y_batch_stride = y_batch_stride, f.y_row_stride = y_row_stride;
  f.fir_state_out = at<void>(a());
  f.iir_state_out = at<void>(a());
  f.checkpoints = at<void>(a());
  if (!run_kernel(true, [&] { return kernels.filter(Element(element), f); })) throw std::bad_alloc();
}

void run_gradient(int element, const nb::tuple& sizes, int64_t batch_stride, int64_t row_stride,
                  const nb::tuple& addresses) {
  Addresses a{addresses};
  Gradient g;
  g.shape = shape_of(sizes);
  g.parameters = parameters_of(a);
  g.sequence = sequence_of(a, batch_stride, row_stride);
  g.checkpoints = at<void>(a());
  g.dy = at<void>(a());
  g.diir_out = at<void>(a());
  g.dz = at<void>(a());
  g.dfir_weight = at<void>(a());
  g.dfir_bias = at<void>(a());
  g.dpoles = at<void>(a());
  g.dresidues = at<void>(a());
  g.dskip = at<void>(a());
  g.dfir_state = at<void>(a());
  g.diir_state = at<void>(a());
  if (!run_kernel(true, [&] { return kernels.gradient(Element(element), g); })) throw std::bad_alloc();
}

// Large new memory in pages of 2 MiB where the system gives them on request: in pages of 4 KiB, being mapped takes longer
// than the operator does.
void use_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
#else
  (void)address, (void)bytes;
#endif
}

// A call on fewer numbers takes microseconds and keeps the interpreter lock.
constexpr int64_t kNumbersUnderTheLock = 1 << 20;

void run_step(int element, int fir_element, int skip_element, int64_t batch, int64_t channels, int64_t head_width,
              int64_t groups, int modes, int taps, int threads, uintptr_t fir_weight, uintptr_t fir_bias,
              uintptr_t poles, uintptr_t residues, uintptr_t skip, uintptr_t z, uintptr_t y, uintptr_t fir_state,
              uintptr_t iir_state) {
  Step s;
  s.shape = {batch, 1, channels, head_width, groups, modes, taps, threads};
  s.parameters = {at<void>(fir_weight), at<void>(fir_bias), at<void>(poles), at<void>(residues), at<void>(skip)};
  s.fir_element = Element(fir_element), s.skip_element = Element(skip_element);
  s.z = at<void>(z), s.y = at<void>(y);
  s.fir_state = at<void>(fir_state), s.iir_state = at<void>(iir_state);
  run_kernel(batch * channels * modes > kNumbersUnderTheLock, [&] { kernels.step(Element(element), s); });
}

void run_linear(int element, int64_t batch, int64_t rows, int64_t columns, int threads, uintptr_t weight, uintptr_t bias,
                uintptr_t x, uintptr_t y) {
  const Linear f = {batch, rows, columns, threads, at<void>(weight), at<void>(bias), at<void>(x), at<void>(y)};
  const bool takes_long = rows * columns > kNumbersUnderTheLock;
  if (!run_kernel(takes_long, [&] { return kernels.linear(Element(element), f); })) throw std::bad_alloc();
}

QuantizedLinear quantized(int bits, int64_t rows, int64_t columns, int threads, uintptr_t weight, uintptr_t scale,
                          uintptr_t offset) {
  return {bits, 1, rows, columns, threads, at<void>(weight), at<void>(scale), at<void>(offset), nullptr, nullptr, nullptr};
}

void run_quantized_linear(int element, int bits, int64_t rows, int64_t columns, int threads, uintptr_t weight,
                          uintptr_t scale, uintptr_t offset, int64_t batch, uintptr_t bias, uintptr_t x, uintptr_t y) {
  QuantizedLinear f = quantized(bits, rows, columns, threads, weight, scale, offset);
  f.batch = batch, f.bias = at<void>(bias), f.x = at<void>(x), f.y = at<void>(y);
  const bool takes_long = rows * columns > kNumbersUnderTheLock;
  if (!run_kernel(takes_long, [&] { return kernels.quantized_linear(Element(element), f); })) throw std::bad_alloc();
}

void run_dequantize(int element, int bits, int64_t rows, int64_t columns, int threads, uintptr_t weight, uintptr_t scale,
                    uintptr_t offset, uintptr_t y) {
  QuantizedLinear f = quantized(bits, rows, columns, threads, weight, scale, offset);
  f.y = at<void>(y);
  run_kernel(true, [&] { kernels.dequantize(Element(element), f); });
}

void run_quantize(int element, int64_t rows, int64_t columns, int threads, int refits, uintptr_t from, uintptr_t weight,
                  uintptr_t scale, uintptr_t offset) {
  const Quantize f = {rows, columns, threads, refits, at<void>(from), at<void>(weight), at<void>(scale), at<void>(offset)};
  run_kernel(true, [&] { kernels.quantize(Element(element), f); });
}

void run_norm(int element, int64_t rows, int64_t columns, int threads, double eps, bool scale_is_wide, uintptr_t x,
              uintptr_t scale, uintptr_t y) {
  const Norm f = {rows, columns, threads, eps, scale_is_wide, at<void>(x), at<void>(scale), at<void>(y)};
  const bool takes_long = rows * columns > kNumbersUnderTheLock;
  if (!run_kernel(takes_long, [&] { return kernels.norm(Element(element), f); })) throw std::bad_alloc();
}

void run_norm_gradient(int element, int64_t rows, int64_t columns, int threads, double eps, bool scale_is_wide,
                       uintptr_t x, uintptr_t scale, uintptr_t dy, uintptr_t dx, uintptr_t dscale) {
  const NormGradient f = {{rows, columns, threads, eps, scale_is_wide, at<void>(x), at<void>(scale), nullptr},
                          at<void>(dy), at<void>(dx), at<void>(dscale)};
  if (!run_kernel(true, [&] { return kernels.norm_gradient(Element(element), f); })) throw std::bad_alloc();
}

void run_gate(int element, int64_t numbers, int threads, uintptr_t a, uintptr_t b, uintptr_t y) {
  const Gate f = {numbers, threads, at<void>(a), at<void>(b), at<void>(y)};
  run_kernel(numbers > kNumbersUnderTheLock, [&] { kernels.gate(Element(element), f); });
}

void run_gate_gradient(int element, int64_t numbers, int threads, uintptr_t a, uintptr_t b, uintptr_t dy, uintptr_t da,
                       uintptr_t db) {
  const GateGradient f = {{numbers, threads, at<void>(a), at<void>(b), nullptr}, at<void>(dy), at<void>(da), at<void>(db)};
  run_kernel(true, [&] { kernels.gate_gradient(Element(element), f); });
}

void run_gemm(int element, int64_t batch, int64_t rows, int64_t columns, int threads, uintptr_t weight, uintptr_t bias,
              uintptr_t x, uintptr_t y) {
  const Linear f = {batch, rows, columns, threads, at<void>(weight), at<void>(bias), at<void>(x), at<void>(y)};
  if (!run_kernel(true, [&] { return kernels.gemm(Element(element), f); })) throw std::bad_alloc();
}

// From (B, heads, kv_heads, L, P + L, D, threads), and the strides of the first three axes of q, k and v.
Attention attention_of(const nb::tuple& sizes, const nb::tuple& strides, double scale, uintptr_t q, uintptr_t k, uintptr_t v,
                       uintptr_t y, uintptr_t lse) {
  const auto size = [&](size_t i) { return nb::cast<int64_t>(sizes[i]); };
  const auto stride = [&](size_t i) { return nb::cast<int64_t>(strides[i]); };
  return {size(0), size(1), size(2), size(3), size(4), size(5), int(size(6)), scale, at<void>(q), at<void>(k), at<void>(v),
          {stride(0), stride(1), stride(2)}, {stride(3), stride(4), stride(5)}, {stride(6), stride(7), stride(8)},
          at<void>(y), at<float>(lse)};
}

void run_attention_gradient(const nb::tuple& sizes, const nb::tuple& strides, double scale, uintptr_t q, uintptr_t k,
                            uintptr_t v, uintptr_t y, uintptr_t lse, uintptr_t dy, uintptr_t dq, uintptr_t dk, uintptr_t dv) {
  const auto stride = [&](size_t i) { return nb::cast<int64_t>(strides[9 + i]); };
  const AttentionGradient f = {attention_of(sizes, strides, scale, q, k, v, y, lse), at<void>(dy),
                               {stride(0), stride(1), stride(2)}, at<void>(dq), at<void>(dk), at<void>(dv)};
  if (!run_kernel(true, [&] { return attention_gradient(f); })) throw std::bad_alloc();
}

void run_attention(int element, const nb::tuple& sizes, const nb::tuple& strides, double scale, uintptr_t q, uintptr_t k, uintptr_t v,
                   uintptr_t y, uintptr_t lse) {
  const Attention f = attention_of(sizes, strides, scale, q, k, v, y, lse);
  if (!run_kernel(true, [&] { return kernels.attention(Element(element), f); })) throw std::bad_alloc();
}

void run_attend(int element, const nb::tuple& sizes, double scale, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t y) {
  const auto size = [&](size_t i) { return nb::cast<int64_t>(sizes[i]); };
  const TokenAttention f = {size(0), size(1), size(2), size(3), size(4), int(size(5)), scale, at<void>(q),
                            size(6), at<void>(k), at<void>(v), {size(7), size(8)}, at<void>(y)};
  if (!run_kernel(true, [&] { return kernels.attend(Element(element), f); })) throw std::bad_alloc();
}

// From (bits, rows, columns, weight, scale, offset, bias).
Weights weights_of(const nb::tuple& w) {
  const auto address = [&](size_t i) { return at<void>(nb::cast<uintptr_t>(w[i])); };
  return {nb::cast<int>(w[0]), nb::cast<int64_t>(w[1]), nb::cast<int64_t>(w[2]), address(3), address(4), address(5), address(6)};
}

// From (H, width of the MLP, eps, scales of both norms, whether these are wide, weights: in, out, gate, up, down).
Block block_of(const nb::tuple& b) {
  const auto weights = [&](size_t i) { return weights_of(nb::cast<nb::tuple>(b[i])); };
  const auto address = [&](size_t i) { return at<void>(nb::cast<uintptr_t>(b[i])); };
  Block block = {};
  block.width = nb::cast<int64_t>(b[0]), block.mlp_width = nb::cast<int64_t>(b[1]), block.eps = nb::cast<double>(b[2]);
  block.pre_scale = address(3), block.post_scale = address(4), block.scales_are_wide = nb::cast<bool>(b[5]);
  block.in = weights(6), block.out = weights(7), block.gate = weights(8), block.up = weights(9), block.down = weights(10);
  return block;
}

// Whether each name still stands in its dictionary for what was found there, None for what is not there. What a decode step
// looks at so has left the caches since the last one, and here several lines are waited for at once.
bool are_registered(const nb::tuple& dictionaries, const nb::tuple& names, const nb::tuple& found) {
  for (size_t i = 0; i < dictionaries.size(); i++) {
    PyObject* const one = PyDict_GetItem(dictionaries[i].ptr(), names[i].ptr());
    if ((one == nullptr ? Py_None : one) != found[i].ptr()) return false;
  }
  return true;
}

// Blocks as Python holds them: what stays the same from step to step.
class Blocks {
 public:
  explicit Blocks(int element) : element_(Element(element)) {}

  void add_attention(const nb::tuple& described, int64_t heads, int64_t kv_heads) {
    Block block = block_of(described);
    block.heads = heads, block.kv_heads = kv_heads;
    blocks_.push_back(block);
  }

  void add_hyena(const nb::tuple& described, int fir_element, int skip_element, int64_t head_width, int64_t groups, int modes,
                 int taps, const nb::tuple& parameters) {
    Block block = block_of(described);
    Addresses a{parameters};
    block.hyena.shape = {1, 1, block.width, head_width, groups, modes, taps, 1};
    block.hyena.parameters = parameters_of(a);
    block.hyena.fir_element = Element(fir_element), block.hyena.skip_element = Element(skip_element);
    blocks_.push_back(block);
  }

  // x (B, H) becomes the last block's output. `places` are of each block in turn (FIR state, modal state), or (keys, values,
  // their strides of rows and heads, tokens).
  void run(int64_t batch, int threads, uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t angle_stride,
           const nb::tuple& places) const {
    const Token token = {element_, batch, threads, at<void>(cos), at<void>(sin), angle_stride};
    Addresses a{places};
    std::vector<Memory> memories;
    for (const Block& block : blocks_) {
      Memory memory = {};
      if (block.heads == 0) {
        memory.fir_state = at<void>(a()), memory.iir_state = at<void>(a());
      } else {
        memory.keys = at<void>(a()), memory.values = at<void>(a());
        memory.kv_strides[0] = int64_t(a()), memory.kv_strides[1] = int64_t(a()), memory.tokens = int64_t(a());
      }
      memories.push_back(memory);
    }
    nb::gil_scoped_release release;
    std::vector<BlockStep> steps;
    int64_t bytes = 0;
    for (size_t i = 0; i < blocks_.size(); i++) {
      steps.emplace_back(blocks_[i], token, memories[i], kernels);
      if (bytes < steps[i].scratch_bytes()) bytes = steps[i].scratch_bytes();
    }
    std::vector<char> scratch(static_cast<size_t>(bytes));
    for (const BlockStep& step : steps)
      if (!step.run(at<char>(x), scratch.data())) throw std::bad_alloc();
  }

 private:
  Element element_;
  std::vector<Block> blocks_;
};

}  // namespace
}  // namespace stripedrag

NB_MODULE(_native, m) {
  using namespace stripedrag;
  nb::set_leak_warnings(false);  // of a model that a thread still holds when the process ends
  const Choice& chosen = choose();
  m.attr("isa") = chosen.name;
  kernels = *chosen.kernels;
  choose_bf16(chosen);
  m.attr("has_bf16_attention") = has_bf16_attention;
  m.def("filter", &run_filter, "element"_a, "sizes"_a, "batch_stride"_a, "row_stride"_a, "y_batch_stride"_a,
        "y_row_stride"_a, "addresses"_a);
  m.def("gradient", &run_gradient, "element"_a, "sizes"_a, "batch_stride"_a, "row_stride"_a, "addresses"_a);
  m.def("use_huge_pages", &use_huge_pages, "address"_a, "bytes"_a);
  m.def("step", &run_step);
  m.def("linear", &run_linear);
  m.def("gemm", &run_gemm);
  m.def("quantized_linear", &run_quantized_linear);
  m.attr("max_batch") = kMaxBatch;
  m.def("dequantize", &run_dequantize);
  m.def("quantize", &run_quantize);
  m.def("norm", &run_norm);
  m.def("norm_gradient", &run_norm_gradient);
  m.def("attention", &run_attention);
  m.def("attention_gradient", &run_attention_gradient);
  m.def("attend", &run_attend);
  m.def("are_registered", &are_registered);
  nb::class_<Blocks>(m, "Blocks")
      .def(nb::init<int>())
      .def("add_attention", &Blocks::add_attention)
      .def("add_hyena", &Blocks::add_hyena)
      .def("run", &Blocks::run);
  m.def("gate", &run_gate);
  m.def("gate_gradient", &run_gate_gradient);
  m.def("checkpoint_numbers", [](int element, const nb::tuple& sizes) {
    return kernels.checkpoint_numbers(Element(element), shape_of(sizes));
  });
}
