// Vectors of one instruction set, by the compiler's own vector types, and how elements become them.
//
// A `Pair` is two vectors of neighbouring channels, the unit that every kernel works on: one cache line or two. bfloat16
// is widened without a shuffle, the even channels into one vector and the odd ones into the other, so which channel sits
// in which lane depends on the element: `lane_channel` says it. The namespace carries the instruction set's name, and
// no std template is used here or above: its instantiation could be taken by the linker for code of another set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "operator.h"
#if defined(__SSE2__)
#include <immintrin.h>  // only for stores that pass the cache, which vector types cannot say
#endif

#define STRIPEDRAG_INLINE static inline __attribute__((always_inline))
#define STRIPEDRAG_INLINE_MEMBER inline __attribute__((always_inline))

namespace stripedrag::STRIPEDRAG_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLineBytes = 64;

struct bfloat16 {
  uint16_t bits;
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bfloat16 pairs are split by shifts");

template <class T>
struct WorkOf {
  using type = T;
};
template <>
struct WorkOf<bfloat16> {
  using type = float;
};
template <class T>
using Work = typename WorkOf<T>::type;  // the type of the arithmetic and of the modal state

template <class W>
struct VectorOf {
  typedef W type __attribute__((vector_size(kVectorBytes)));
  typedef W loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(W)), may_alias));
};
template <class W>
using Vector = typename VectorOf<W>::type;
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint32_t LooseBits __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

template <class W>
constexpr int kLanes = kVectorBytes / int(sizeof(W));
template <class T>
constexpr int kPair = 2 * kLanes<Work<T>>;  // channels in a Pair

template <class W>
struct Pair {
  Vector<W> half[2];
};

template <class T>
STRIPEDRAG_INLINE int lane_channel(int half, int lane) {
  if constexpr (sizeof(T) == 2) return 2 * lane + half;
  return half * kLanes<Work<T>> + lane;
}

STRIPEDRAG_INLINE float widen(float x) { return x; }
STRIPEDRAG_INLINE double widen(double x) { return x; }
STRIPEDRAG_INLINE float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The upper half of a float32 rounded to nearest even, in place of all its bits; a NaN stays one.
STRIPEDRAG_INLINE Bits round_to_bfloat16(Vector<float> x) {
  const Bits bits = (Bits)x;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits is_nan = (Bits)(x != x);
  return (rounded & ~is_nan) | ((bits | 0x00400000u) & is_nan);
}
STRIPEDRAG_INLINE Bits to_bfloat16(const Pair<float>& x) {
  return (round_to_bfloat16(x.half[0]) >> 16) | (round_to_bfloat16(x.half[1]) & 0xffff0000u);
}
template <class T>
STRIPEDRAG_INLINE T narrow(Work<T> x) {
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {uint16_t((x != x ? bits | 0x00400000u : rounded) >> 16)};
  } else {
    return x;
  }
}

template <class T>
STRIPEDRAG_INLINE Pair<Work<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    const Bits both = *reinterpret_cast<const LooseBits*>(p);
    return {{(Vector<float>)(both << 16), (Vector<float>)(both & 0xffff0000u)}};
  } else {
    using Loose = typename VectorOf<T>::loose;
    return {{*reinterpret_cast<const Loose*>(p), *reinterpret_cast<const Loose*>(p + kLanes<T>)}};
  }
}

// One half of load(p).
template <class T>
STRIPEDRAG_INLINE Vector<Work<T>> load_half(const T* p, int half) {
  if constexpr (sizeof(T) == 2) {
    const Bits both = *reinterpret_cast<const LooseBits*>(p);
    return (Vector<float>)(half == 0 ? both << 16 : both & 0xffff0000u);
  } else {
    return *reinterpret_cast<const typename VectorOf<T>::loose*>(p + half * kLanes<T>);
  }
}

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct FirstLanes : FirstLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct FirstLanes<0, kLane...> {
  using List = LaneList<kLane...>;
};

// As many numbers as a vector has lanes, in their order.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
STRIPEDRAG_INLINE Vector<float> load_in_order(const float* p) { return *reinterpret_cast<const VectorOf<float>::loose*>(p); }
STRIPEDRAG_INLINE Vector<float> load_in_order(const bfloat16* p) {
  return (Vector<float>)(__builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Bits) << 16);
}
STRIPEDRAG_INLINE void store_in_order(float* p, Vector<float> x) { *reinterpret_cast<VectorOf<float>::loose*>(p) = x; }
STRIPEDRAG_INLINE void store_in_order(bfloat16* p, Vector<float> x) {
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(round_to_bfloat16(x) >> 16, Halves);
}
// The first `valid` of them; the others read as zero and are not written.
template <class T>
STRIPEDRAG_INLINE Vector<float> load_in_order(const T* p, int valid) {
  if (valid == kLanes<float>) return load_in_order(p);
  T padded[kLanes<float>] = {};
  memcpy(padded, p, size_t(valid) * sizeof(T));
  return load_in_order(padded);
}
template <class T>
STRIPEDRAG_INLINE void store_in_order(T* p, Vector<float> x, int valid) {
  if (valid == kLanes<float>) return store_in_order(p, x);
  T padded[kLanes<float>];
  store_in_order(padded, x);
  memcpy(p, padded, size_t(valid) * sizeof(T));
}

template <class T>
STRIPEDRAG_INLINE void store(T* p, const Pair<Work<T>>& x) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<LooseBits*>(p) = to_bfloat16(x);
  } else {
    using Loose = typename VectorOf<T>::loose;
    *reinterpret_cast<Loose*>(p) = x.half[0];
    *reinterpret_cast<Loose*>(p + kLanes<T>) = x.half[1];
  }
}

// The first `valid` channels of a pair; the others read as zero and are not written.
template <class T>
STRIPEDRAG_INLINE Pair<Work<T>> load(const T* p, int valid) {
  if (valid == kPair<T>) return load(p);
  T padded[kPair<T>] = {};
  memcpy(padded, p, size_t(valid) * sizeof(T));
  return load(padded);
}
template <class T>
STRIPEDRAG_INLINE void store(T* p, const Pair<Work<T>>& x, int valid) {
  if (valid == kPair<T>) return store(p, x);
  T padded[kPair<T>];
  store(padded, x);
  memcpy(p, padded, size_t(valid) * sizeof(T));
}

// A store that passes the cache: for an output larger than it, where an ordinary store would first read the line.
template <class T>
constexpr bool kCanStream = (kPair<T> * sizeof(T)) % kLineBytes == 0;
STRIPEDRAG_INLINE void stream_vector(void* p, Bits x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#else
  memcpy(p, &x, sizeof x);
#endif
}
template <class T>
STRIPEDRAG_INLINE void stream(T* p, const Pair<Work<T>>& x) {
  if constexpr (sizeof(T) == 2) {
    stream_vector(p, to_bfloat16(x));
  } else {
    stream_vector(p, (Bits)x.half[0]);
    stream_vector(p + kLanes<T>, (Bits)x.half[1]);
  }
}
STRIPEDRAG_INLINE void end_of_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Numbers of a pair, a channel each: value(channel) for the first `valid` channels, zero for the others.
template <class T, class Value>
STRIPEDRAG_INLINE Pair<Work<T>> gather(int valid, Value value) {
  Work<T> numbers[2][kLanes<Work<T>>];
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < kLanes<Work<T>>; lane++) {
      const int channel = lane_channel<T>(half, lane);
      numbers[half][lane] = channel < valid ? value(channel) : 0;
    }
  Pair<Work<T>> x;
  memcpy(&x, numbers, sizeof x);
  return x;
}
// take(channel, number) for the first `valid` channels of a pair.
template <class T, class Take>
STRIPEDRAG_INLINE void scatter(const Pair<Work<T>>& x, int valid, Take take) {
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < kLanes<Work<T>>; lane++) {
      const int channel = lane_channel<T>(half, lane);
      if (channel < valid) take(channel, x.half[half][lane]);
    }
}

}  // namespace stripedrag::STRIPEDRAG_ISA
