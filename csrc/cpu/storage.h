// Loads and stores of the storage types (float, double, bfloat16, half, and int8 weights) as vectors of the type that
// computes for them: whole, or of the first n lanes; a partial load gives zeros in the other lanes and never touches
// memory behind the n-th.
#pragma once

#include "vec.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The type that computes for a storage type.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// As many elements of T as Vec<Compute<T>> has lanes.
template <class T>
struct StorageLanes {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct StorageLanes<BFloat16> {
  typedef uint16_t Type __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct StorageLanes<Half> {
  typedef uint16_t Type __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Lanes = typename StorageLanes<T>::Type;

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits set in the first n lanes.
template <class Int>
FASTRNN_INLINE __m256i first_lanes(int n) {
  alignas(32) static constexpr Int kOnesThenZeros[2 * 32 / sizeof(Int)] = {-1,
                                                                           -1,
                                                                           -1,
                                                                           -1,
                                                                           sizeof(Int) == 4 ? Int(-1) : Int(0),
                                                                           sizeof(Int) == 4 ? Int(-1) : Int(0),
                                                                           sizeof(Int) == 4 ? Int(-1) : Int(0),
                                                                           sizeof(Int) == 4 ? Int(-1) : Int(0)};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnesThenZeros + 32 / sizeof(Int) - n));
}
#endif

template <>
struct StorageLanes<Int8> {
  typedef int8_t Type __attribute__((vector_size(kVectorBytes / 4)));
};

template <class T>
FASTRNN_INLINE Lanes<T> load_one_by_one(const T* p, int n) {
  T part[Vec<Compute<T>>::kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  Lanes<T> v;
  __builtin_memcpy(&v, part, sizeof v);
  return v;
}
template <class T>
FASTRNN_INLINE void store_one_by_one(T* p, Lanes<T> v, int n) {
  T part[Vec<Compute<T>>::kLanes];
  __builtin_memcpy(part, &v, sizeof v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

template <class T>
FASTRNN_INLINE Lanes<T> load_lanes(const T* p, int n) {
  Lanes<T> v;
  constexpr int kLanes = Vec<Compute<T>>::kLanes;
  if (__builtin_expect(n >= kLanes, 1)) {
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8)
    v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  else if constexpr (sizeof(T) == 4)
    v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  else if constexpr (sizeof(T) == 2)
    v = reinterpret_cast<Lanes<T>>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
  else
    v = reinterpret_cast<Lanes<T>>(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8)
    v = _mm256_maskload_pd(p, first_lanes<int64_t>(n));
  else if constexpr (sizeof(T) == 4)
    v = _mm256_maskload_ps(p, first_lanes<int32_t>(n));
  else
    v = load_one_by_one(p, n);
#else
  v = load_one_by_one(p, n);
#endif
  return v;
}

template <class T>
FASTRNN_INLINE void store_lanes(T* p, Lanes<T> v, int n) {
  constexpr int kLanes = Vec<Compute<T>>::kLanes;
  if (__builtin_expect(n >= kLanes, 1)) {
    __builtin_memcpy(p, &v, sizeof v);
    return;
  }
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), v);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), reinterpret_cast<__m256i>(v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8)
    _mm256_maskstore_pd(p, first_lanes<int64_t>(n), v);
  else if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(p, first_lanes<int32_t>(n), v);
  else
    store_one_by_one(p, v, n);
#else
  store_one_by_one(p, v, n);
#endif
}

// Storage -> compute and back; rounding to nearest even, NaN stays NaN.
FASTRNN_INLINE Vec<float> widen(Lanes<float> v, float) { return v; }
FASTRNN_INLINE Vec<double> widen(Lanes<double> v, double) { return v; }
FASTRNN_INLINE Lanes<float> narrow(Vec<float> v, float) { return v.raw; }
FASTRNN_INLINE Lanes<double> narrow(Vec<double> v, double) { return v.raw; }

using U16 = Lanes<BFloat16>;
using U32 = Raw<float>::UInt;
using F32 = Raw<float>::Type;

FASTRNN_INLINE Vec<float> widen(Lanes<Int8> v, Int8) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(v))));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<long long>(v)))));
#else
  return __builtin_convertvector(__builtin_convertvector(v, Raw<float>::Int), F32);
#endif
}

FASTRNN_INLINE Vec<float> widen(U16 v, BFloat16) {
  return reinterpret_cast<F32>(__builtin_convertvector(v, U32) << 16);
}
FASTRNN_INLINE U16 narrow(Vec<float> v, BFloat16) {
  const U32 bits = reinterpret_cast<U32>(v.raw);
  const U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v.raw == v.raw ? rounded : quiet, U16);
}

#if defined(__AVX512F__)
FASTRNN_INLINE Vec<float> widen(U16 v, Half) {
  return Vec<float>(_mm512_maskz_cvtph_ps(0xFFFF, reinterpret_cast<__m256i>(v)));
}
FASTRNN_INLINE U16 narrow(Vec<float> v, Half) {
  return reinterpret_cast<U16>(_mm512_maskz_cvtps_ph(0xFFFF, v.raw, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FASTRNN_INLINE Vec<float> widen(U16 v, Half) { return Vec<float>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v))); }
FASTRNN_INLINE U16 narrow(Vec<float> v, Half) {
  return reinterpret_cast<U16>(_mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT));
}
#else
// The pattern shifted into a float's exponent is off by a factor of 2^112, which a product restores, subnormals
// included; infinity and NaN get the full exponent.
FASTRNN_INLINE Vec<float> widen(U16 v, Half) {
  const U32 bits = __builtin_convertvector(v, U32);
  const U32 magnitude = (bits & 0x7FFF) << 13;
  const F32 scaled = reinterpret_cast<F32>(magnitude) * 0x1p112f;
  const U32 special = magnitude | 0x7F800000;
  const U32 finite = reinterpret_cast<U32>(scaled);
  const U32 value = (bits & 0x7C00) == 0x7C00 ? special : finite;
  return reinterpret_cast<F32>(value | ((bits & 0x8000) << 16));
}
// Normal results: round the pattern to 10 bits of mantissa. Subnormal results: adding 0.5 lets the float adder round
// at 2^-24. Overflow gives infinity.
FASTRNN_INLINE U16 narrow(Vec<float> v, Half) {
  const U32 bits = reinterpret_cast<U32>(v.raw), sign = bits & 0x80000000, magnitude = bits ^ sign;
  const U32 normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const U32 subnormal = reinterpret_cast<U32>(reinterpret_cast<F32>(magnitude) + 0.5f) - 0x3F000000;
  const U32 infinity = U32{} + 0x7C00, nan = U32{} + 0x7E00;
  U32 value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477FF000 ? infinity : value;
  value = magnitude > 0x7F800000 ? nan : value;
  return __builtin_convertvector(value | (sign >> 16), U16);
}
#endif

#if defined(__AVX512F__)
FASTRNN_INLINE Vec<float> widen_whole(const Int8* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
FASTRNN_INLINE Vec<float> widen_whole(const BFloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
#elif defined(__AVX2__)
FASTRNN_INLINE Vec<float> widen_whole(const Int8* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
}
FASTRNN_INLINE Vec<float> widen_whole(const BFloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
#endif

template <class T>
FASTRNN_INLINE Vec<Compute<T>> load(const T* p, int n) {
#if defined(__AVX2__)  // straight from memory, where GCC would go through other registers
  if constexpr (std::is_same_v<T, Int8>)
    if (__builtin_expect(n >= Vec<float>::kLanes, 1)) return widen_whole(p);
  if constexpr (std::is_same_v<T, BFloat16>)
    if (__builtin_expect(n >= Vec<float>::kLanes, 1)) return widen_whole(p);
#endif
  return widen(load_lanes(p, n), T());
}
// Returns the value as stored.
template <class T>
FASTRNN_INLINE Vec<Compute<T>> store(T* p, Vec<Compute<T>> v, int n) {
  const Lanes<T> narrowed = narrow(v, T());
  store_lanes(p, narrowed, n);
  return widen(narrowed, T());
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
