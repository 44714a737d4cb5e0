// SIMD value types, from the compiler's vector extensions: Vec<float> and Vec<double> fill one register of the
// instruction set this file is compiled for, in a namespace of that set (FASTRNN_ISA), so that the same source built
// three times never shares a function. Their loads and stores: storage.h.
//
// On an instruction set without fused multiply-add, fma is a product and a sum, each rounded.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math.h"

namespace fastrnn {
namespace FASTRNN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#elif defined(FASTRNN_BASE_VECTOR_BYTES)  // for tests: the arithmetic of wide vectors on a machine without them
constexpr int kVectorBytes = FASTRNN_BASE_VECTOR_BYTES;
#else
constexpr int kVectorBytes = 16;
#endif

#define FASTRNN_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Int8 {  // weights only: loads as float
  int8_t value;
};

template <class F>
struct Raw;
template <>
struct Raw<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UInt __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Raw<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UInt __attribute__((vector_size(kVectorBytes)));
};

template <class F>
struct Vec {
  using Scalar = F;
  using Type = typename Raw<F>::Type;
  using Mask = typename Raw<F>::Int;
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(F));

  Type raw;

  Vec() = default;
  FASTRNN_INLINE Vec(Type v) : raw(v) {}
  FASTRNN_INLINE explicit Vec(F s) : raw(s - Type{}) {}  // x - 0 is x, also for -0: a broadcast and nothing else

  friend FASTRNN_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend FASTRNN_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend FASTRNN_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend FASTRNN_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend FASTRNN_INLINE Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }
  friend FASTRNN_INLINE Mask operator<=(Vec a, Vec b) { return a.raw <= b.raw; }
  friend FASTRNN_INLINE Mask operator>(Vec a, Vec b) { return a.raw > b.raw; }
  friend FASTRNN_INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a.raw : b.raw; }

  friend FASTRNN_INLINE Vec pow2_rounded(Vec x, Vec& scale) {
    using P = Pattern<F>;
    using UInt = typename Raw<F>::UInt;
    const Type shifted = x.raw + P::kRound;
    scale.raw = reinterpret_cast<Type>((reinterpret_cast<UInt>(shifted) << P::kShift) + P::kOne);
    return shifted - P::kRound;
  }
};

template <class F>
FASTRNN_INLINE Vec<F> fma(Vec<F> a, Vec<F> b, Vec<F> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm512_fmadd_ps(a.raw, b.raw, c.raw));
  else
    return Vec<F>(_mm512_fmadd_pd(a.raw, b.raw, c.raw));
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm256_fmadd_ps(a.raw, b.raw, c.raw));
  else
    return Vec<F>(_mm256_fmadd_pd(a.raw, b.raw, c.raw));
#else
  return a * b + c;
#endif
}

// min(x, most) and max(x, least). The instructions give their second operand where one is NaN: x.
template <class F>
FASTRNN_INLINE Vec<F> at_most(Vec<F> x, Vec<F> most) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm512_min_ps(most.raw, x.raw));
  else
    return Vec<F>(_mm512_min_pd(most.raw, x.raw));
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm256_min_ps(most.raw, x.raw));
  else
    return Vec<F>(_mm256_min_pd(most.raw, x.raw));
#else
  return select(most < x, most, x);
#endif
}
template <class F>
FASTRNN_INLINE Vec<F> at_least(Vec<F> x, Vec<F> least) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm512_max_ps(least.raw, x.raw));
  else
    return Vec<F>(_mm512_max_pd(least.raw, x.raw));
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4)
    return Vec<F>(_mm256_max_ps(least.raw, x.raw));
  else
    return Vec<F>(_mm256_max_pd(least.raw, x.raw));
#else
  return select(least > x, least, x);
#endif
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
