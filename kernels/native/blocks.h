// One token through blocks: the kernels for rows one after another, without Python between them. Every number is rounded
// where the same operations on tensors round it.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "operator.h"

namespace stripedrag {

// A linear layer's weights: plain, or of few bits as in QuantizedLinear.
struct Weights {
  int bits;  // 0: plain
  int64_t rows, columns;
  const void *weight, *scale, *offset;
  const void* bias;  // (rows), or null
};

// x + mixer(norm x), then x + MLP(norm x).
struct Block {
  int64_t width, mlp_width;
  double eps;
  const void *pre_scale, *post_scale;  // of the norms
  bool scales_are_wide;
  Weights in, out, gate, up, down;  // around the mixer, and of the gated MLP
  int64_t heads, kv_heads;          // of attention; 0: the mixer is the Hyena operator
  Step hyena;                       // without batch, threads, z, y and states
};

// Where a block's state lies, or its keys and values (B, Hkv, room, D), of which the token's become the last of `tokens`.
struct Memory {
  void *fir_state, *iir_state;
  void *keys, *values;
  int64_t kv_strides[2], tokens;
};

// What all blocks share of a call: B up to kMaxBatch, and the angles of the token's position.
struct Token {
  Element element;
  int64_t batch;
  int threads;
  const void *cos, *sin;  // (B, D / 2), or with a stride of 0 one for all rows
  int64_t angle_stride;
};

class BlockStep {
 public:
  BlockStep(const Block& block, const Token& token, const Memory& memory, const Kernels& kernels)
      : block_(block), token_(token), memory_(memory), kernels_(kernels), bytes_(token.element == Element::bfloat16 ? 2 : 4) {}

  int64_t scratch_bytes() const {
    return token_.batch * (2 * block_.width + block_.in.rows + 2 * block_.mlp_width) * bytes_;
  }

  // x (B, H) becomes the block's output, with so many bytes of scratch; false where memory could not be had.
  bool run(char* x, char* scratch) const {
    const int64_t width = block_.width, numbers = token_.batch * block_.mlp_width;
    char* const normed = scratch;
    char* const mixed = normed + token_.batch * width * bytes_;
    char* const z = mixed + token_.batch * width * bytes_;
    char* const gate = z + token_.batch * block_.in.rows * bytes_;
    char* const up = gate + numbers * bytes_;
    if (!norm(x, block_.pre_scale, normed) || !linear(block_.in, normed, z) || !mix(z, mixed)) return false;
    if (!linear(block_.out, mixed, normed)) return false;
    kernels_.add(token_.element, token_.batch * width, normed, x);
    if (!norm(x, block_.post_scale, normed) || !linear(block_.gate, normed, gate) || !linear(block_.up, normed, up)) return false;
    kernels_.gate(token_.element, {numbers, token_.threads, gate, up, gate});
    if (!linear(block_.down, gate, normed)) return false;
    kernels_.add(token_.element, token_.batch * width, normed, x);
    return true;
  }

 private:
  bool norm(const void* x, const void* scale, void* y) const {
    const Norm f = {token_.batch, block_.width, token_.threads, block_.eps, block_.scales_are_wide, x, scale, y};
    return kernels_.norm(token_.element, f);
  }

  bool linear(const Weights& w, const void* x, void* y) const {
    const int threads = token_.threads;
    if (w.bits == 0) return kernels_.linear(token_.element, {token_.batch, w.rows, w.columns, threads, w.weight, w.bias, x, y});
    const QuantizedLinear f = {w.bits, token_.batch, w.rows, w.columns, threads, w.weight, w.scale, w.offset, w.bias, x, y};
    return kernels_.quantized_linear(token_.element, f);
  }

  bool mix(char* z, void* y) const {
    if (block_.heads != 0) return attend(z, y);
    Step s = block_.hyena;
    s.shape.batch = token_.batch, s.shape.threads = token_.threads;
    s.z = z, s.y = y, s.fir_state = memory_.fir_state, s.iir_state = memory_.iir_state;
    kernels_.step(token_.element, s);
    return true;
  }

  bool attend(char* qkv, void* y) const {
    const int64_t heads = block_.heads, kv_heads = block_.kv_heads, width = block_.width / heads, row_bytes = width * bytes_;
    const int64_t stride = (heads + 2 * kv_heads) * width;
    kernels_.rotate(token_.element, {token_.batch, heads + kv_heads, width, qkv, stride, token_.cos, token_.sin, token_.angle_stride});
    for (int64_t b = 0; b < token_.batch; b++)
      for (int64_t head = 0; head < kv_heads; head++) {
        const char* key = qkv + b * stride * bytes_ + (heads + head) * row_bytes;
        const int64_t place = b * memory_.kv_strides[0] + head * memory_.kv_strides[1] + (memory_.tokens - 1) * width;
        memcpy(static_cast<char*>(memory_.keys) + place * bytes_, key, size_t(row_bytes));
        memcpy(static_cast<char*>(memory_.values) + place * bytes_, key + kv_heads * row_bytes, size_t(row_bytes));
      }
    const double scale = 1 / std::sqrt(double(width));
    return kernels_.attend(token_.element, {token_.batch, heads, kv_heads, memory_.tokens, width, token_.threads, scale, qkv, stride,
                                            memory_.keys, memory_.values, {memory_.kv_strides[0], memory_.kv_strides[1]}, y});
  }

  const Block& block_;
  const Token& token_;
  const Memory& memory_;
  const Kernels& kernels_;
  const int64_t bytes_;
};

}  // namespace stripedrag
