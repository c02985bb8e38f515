// What the Hyena operator is asked for, as plain data: shared by the binding and by the units compiled for one
// instruction set. B batch, L length, H channels, G filter groups, N modes, K taps. Every pointer is the caller's; arrays
// are contiguous and in checkpoint layout unless a stride says otherwise. Nothing here allocates or throws.
#pragma once
#include <cstdint>

namespace stripedrag {

// Of z, y and the FIR state. Parameters and the modal state are float, or double where z is.
enum class Element : int { float32 = 0, bfloat16 = 1, float64 = 2 };

constexpr int kMaxTaps = 8;
constexpr int kMaxModes = 16;
constexpr int64_t kCheckpointTokens = 32;  // the gradient restarts from a modal state kept every so many tokens

struct Shape {
  int64_t batch, length, channels;
  int64_t head_width;  // H for the plain layout [x2|x1|v], else the width of [x2|x1|v] in each head
  int64_t groups;
  int modes, taps, threads;
};

struct Parameters {
  const void* fir_weight;  // (3H, K)
  const void* fir_bias;    // (3H)
  const void* poles;       // (G, N, 2)
  const void* residues;    // (G, N, 2)
  const void* skip;        // (H)
};

struct Sequence {
  const void* z;  // (B, L, 3H), channels contiguous
  int64_t z_batch_stride, z_row_stride;
  const uint8_t* real;  // (B, L), 0 for a padded token; null: all are real
  const void* fir_state;  // (B, 3H, K-1), elements like z
  const void* iir_state;  // (B, H, N, 2)
};

struct Filter {
  Shape shape;
  Parameters parameters;
  Sequence sequence;
  void* y;              // (B, L, H), channels contiguous; may be the x2 channels of z in the plain layout
  int64_t y_batch_stride, y_row_stride;
  void* fir_state_out;  // like the sequence's states
  void* iir_state_out;
  void* checkpoints;    // checkpoint_numbers() of them, 64-byte aligned, in the unit's own order; null: none are kept
};

struct Gradient {
  Shape shape;
  Parameters parameters;
  Sequence sequence;
  const void* checkpoints;
  const void* dy;         // (B, L, H)
  const void* diir_out;   // (B, H, N, 2), of the final modal state
  void* dz;               // (B, L, 3H)
  void* dfir_weight;      // each like its parameter, but dpoles and dresidues (H, N, 2), a channel each
  void* dfir_bias;
  void* dpoles;
  void* dresidues;
  void* dskip;
  void* dfir_state;       // (B, 3H, K-1), elements like z
  void* diir_state;       // (B, H, N, 2)
};

struct Step {
  Shape shape;  // length is 1
  Parameters parameters;
  Element fir_element, skip_element;  // FIR weight and bias, and skip, may be kept in z's element
  const void* z;                      // (B, 3H)
  void* y;                            // (B, H)
  void* fir_state;                    // overwritten
  void* iir_state;
};

// y = W x + b for each row of x, all of one element: `linear` for up to kMaxBatch rows, `gemm` for more.
constexpr int64_t kMaxBatch = 8;
struct Linear {
  int64_t batch, rows, columns;
  int threads;
  const void* weight;  // (rows, columns)
  const void* bias;    // (rows), or null
  const void* x;       // (batch, columns)
  void* y;             // (batch, rows)
};

// The same with weights of few bits (`quantized.h` says how they lie), for x, bias and y in float32 or bfloat16; or those
// weights made wide again, (rows, columns) in y.
struct QuantizedLinear {
  int bits;  // 8 or 4
  int64_t batch, rows, columns;
  int threads;
  const void *weight, *scale, *offset;  // without offsets for 8 bits
  const void* bias;                     // (rows), or null
  const void* x;                        // (batch, columns)
  void* y;                              // (batch, rows)
};

// Weights of 4 bits from float32 or bfloat16.
struct Quantize {
  int64_t rows, columns;
  int threads, refits;  // how often the line on which a group's levels lie is fitted again
  const void* from;     // (rows, columns)
  void *weight, *scale, *offset;
};

// RMSNorm: y = x / sqrt(mean(x²) + eps) · scale, row by row.
struct Norm {
  int64_t rows, columns;
  int threads;
  double eps;
  bool scale_is_wide;  // its elements are the arithmetic's, else x's
  const void* x;       // (rows, columns)
  const void* scale;   // (columns)
  void* y;             // (rows, columns)
};
struct NormGradient {
  Norm norm;         // without y
  const void* dy;    // (rows, columns)
  void* dx;          // (rows, columns)
  void* dscale;      // (columns), of the arithmetic's type
};

// SwiGLU: y = a sigmoid(a) b, number by number; float32 or bfloat16.
struct Gate {
  int64_t numbers;
  int threads;
  const void *a, *b;
  void* y;
};
struct GateGradient {
  Gate gate;  // without y
  const void* dy;
  void *da, *db;
};

// Causal attention of the last L of `keys` tokens, in float32 or bfloat16: each reads all up to itself.
struct Attention {
  int64_t batch, heads, kv_heads, length, keys, width;  // B, G · Hkv, Hkv, L, P + L, D, which is a multiple of 16
  int threads;
  double scale;                                       // of the scores
  const void *q, *k, *v;                              // (B, heads, tokens, D), channels contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3];   // of their first three axes, in numbers
  void* y;                                            // (B, L, heads, D)
  float* lse;                                         // (B, heads, L): of the scaled scores the log-sum-exp; null: unwanted
};

// The gradient of attention of whole sequences, L = `keys`, in bfloat16.
struct AttentionGradient {
  Attention attention;             // with its y and lse
  const void* dy;                  // (B, heads, L, D), channels contiguous
  int64_t dy_strides[3];           // of its first three axes, in numbers
  void *dq, *dk, *dv;              // (B, L, heads, D), and twice (B, L, Hkv, D)
};

// Attention of one token over `keys` tokens, itself among them; float32 or bfloat16.
struct TokenAttention {
  int64_t batch, heads, kv_heads, keys, width;  // B, G · Hkv, Hkv, P, D
  int threads;
  double scale;           // of the scores
  const void* q;          // (B, heads, D), the last two contiguous
  int64_t q_stride;
  const void *k, *v;      // (B, Hkv, P, D), the last two contiguous
  int64_t kv_strides[2];  // of the first two, in numbers
  void* y;                // (B, heads, D)
};

// Rotary positions of one token, in place; float32 or bfloat16.
struct Rotation {
  int64_t batch, heads, width;
  void* x;                // (B, heads, D), the last two contiguous
  int64_t stride;
  const void *cos, *sin;  // (B, D / 2)
  int64_t angle_stride;   // 0: all rows stand at one position
};

// One instruction set's kernels. Those that return a bool return false where scratch memory could not be had.
struct Kernels {
  bool (*filter)(Element, const Filter&);
  bool (*gradient)(Element, const Gradient&);
  void (*step)(Element, const Step&);
  bool (*linear)(Element, const Linear&);
  bool (*gemm)(Element, const Linear&);
  bool (*quantized_linear)(Element, const QuantizedLinear&);
  void (*dequantize)(Element, const QuantizedLinear&);
  void (*quantize)(Element, const Quantize&);
  bool (*norm)(Element, const Norm&);
  bool (*norm_gradient)(Element, const NormGradient&);
  void (*gate)(Element, const Gate&);
  void (*gate_gradient)(Element, const GateGradient&);
  bool (*attention)(Element, const Attention&);
  bool (*attend)(Element, const TokenAttention&);
  void (*rotate)(Element, const Rotation&);
  void (*add)(Element, int64_t numbers, const void* x, void* y);  // y += x
  int64_t (*checkpoint_numbers)(Element, const Shape&);
};

}  // namespace stripedrag
