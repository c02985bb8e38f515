// Every kernel, compiled for one instruction set: STRIPEDRAG_ISA names the set and the namespace.
#include "attention_wide.h"
#include "filter.h"
#include "gemm.h"
#include "gradient.h"
#include "linear.h"
#include "quantized.h"
#include "rows.h"
#include "step.h"
#include "token.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

template <class Of>
bool by_element(Element element, Of of) {
  switch (element) {
    case Element::float32: return of(float{});
    case Element::bfloat16: return of(bfloat16{});
    case Element::float64: return of(double{});
  }
  return false;
}

// Of what takes float32 and bfloat16 alone.
template <class Of>
auto by_narrow_element(Element element, Of of) {
  return element == Element::bfloat16 ? of(bfloat16{}) : of(float{});
}

bool run_filter(Element element, const Filter& f) {
  return by_element(element, [&](auto t) { return filter<decltype(t)>(f); });
}
bool run_gradient(Element element, const Gradient& f) {
  return by_element(element, [&](auto t) { return gradient<decltype(t)>(f); });
}
void run_step(Element element, const Step& s) {
  by_element(element, [&](auto t) { return step<decltype(t)>(s), true; });
}
bool run_linear(Element element, const Linear& f) {
  return by_element(element, [&](auto t) { return linear<decltype(t)>(f); });
}
bool run_gemm(Element element, const Linear& f) {
  return by_narrow_element(element, [&](auto t) { return gemm<decltype(t)>(f); });
}
bool run_quantized_linear(Element element, const QuantizedLinear& f) {
  return by_narrow_element(element, [&](auto t) {
    using T = decltype(t);
    return f.bits == 8 ? linear_int8<T>(f) : linear_int4<T>(f);
  });
}
void run_dequantize(Element element, const QuantizedLinear& f) {
  by_narrow_element(element, [&](auto t) {
    using T = decltype(t);
    f.bits == 8 ? dequantize_int8<T>(f) : dequantize_int4<T>(f);
  });
}
void run_quantize(Element element, const Quantize& f) {
  by_narrow_element(element, [&](auto t) { quantize_int4<decltype(t)>(f); });
}
bool run_norm(Element element, const Norm& f) {
  return by_element(element, [&](auto t) { return norm<decltype(t)>(f); });
}
bool run_norm_gradient(Element element, const NormGradient& f) {
  return by_element(element, [&](auto t) { return norm_gradient<decltype(t)>(f); });
}
void run_gate(Element element, const Gate& f) {
  by_narrow_element(element, [&](auto t) { gate<decltype(t)>(f); });
}
void run_gate_gradient(Element element, const GateGradient& f) {
  by_narrow_element(element, [&](auto t) { gate_gradient<decltype(t)>(f); });
}
bool run_attention(Element element, const Attention& f) {
  return by_narrow_element(element, [&](auto t) { return attention<WideProducts<decltype(t)>>(f); });
}
bool run_attend(Element element, const TokenAttention& f) {
  return by_narrow_element(element, [&](auto t) { return attend<decltype(t)>(f); });
}
void run_rotate(Element element, const Rotation& f) {
  by_narrow_element(element, [&](auto t) { rotate<decltype(t)>(f); });
}
void run_add(Element element, int64_t numbers, const void* x, void* y) {
  by_narrow_element(element, [&](auto t) { add<decltype(t)>(numbers, x, y); });
}
int64_t checkpoint_numbers(Element element, const Shape& shape) {
  int64_t numbers = 0;
  by_element(element, [&](auto t) {
    const Layout layout(shape, kPair<decltype(t)>);
    numbers = shape.batch * divide_up(shape.length, kCheckpointTokens) * layout.pairs * layout.pair_channels * 2 * shape.modes;
    return true;
  });
  return numbers;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {run_filter,   run_gradient,      run_step,      run_linear,        run_gemm,   run_quantized_linear,
                         run_dequantize, run_quantize,    run_norm,      run_norm_gradient, run_gate,   run_gate_gradient,
                         run_attention, run_attend,       run_rotate,    run_add,           checkpoint_numbers};

}  // namespace stripedrag::STRIPEDRAG_ISA
