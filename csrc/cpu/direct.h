// Rows of a panel times a matrix as it lies in memory, for so few rows that packing it would not pay; and with the
// weights of low precision, which are read in no other way.
//
// Computes   sums as of `product` (product.h)
// Work       kLanes rows of weights at a time, one vector of k after the other: for few rows limited by the reading of
//            the weights. bfloat16: 2 kLanes weights are one register, whose even and odd halves become floats by a
//            shift and a mask. int8: integer products with x in 16-bit fixed point
// Memory     every weight is read once per run and, from L1, once per row
// Requires   for weights of kPrepared types: each row of x prepared, once, by `prepare`
// Order      kLanes partial sums over k, then their sum in a fixed tree; int8: the sums over k are exact, kFixedChunk
//            of them at a time
//
// The fixed-point x of a row is a multiple of max|x| / 32767: its error is at most 2^-16 max|x|, and that of a product
// 2^-16 max|x| sum|w|; the rounding of the weights to int8 brings up to max|w| / 254 sum|x|. A row with NaN or
// infinity, or with nothing above 1e-30, is multiplied in floats.
#pragma once

#include "product.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Lanes of a register part of 16 bytes, within which shuffles are cheap, and the number of parts.
template <class S>
constexpr int kPart = 16 / static_cast<int>(sizeof(S));
template <class S>
constexpr int kParts = Vec<S>::kLanes / kPart<S>;

// a and b interleaved within each part, lower and upper halves of the parts, and added.
template <class S, size_t... I>
FASTRNN_INLINE Vec<S> interleave_add(Vec<S> a, Vec<S> b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I), w = kPart<S>;
  return Vec<S>(__builtin_shufflevector(a.raw, b.raw, static_cast<int>(I / w * w + I % w / 2 + I % 2 * n)...)) +
         Vec<S>(__builtin_shufflevector(a.raw, b.raw, static_cast<int>(I / w * w + w / 2 + I % w / 2 + I % 2 * n)...));
}
// The even blocks of `width` parts of a and b, one after the other, and the odd ones, added.
template <class S, int width, size_t... I>
FASTRNN_INLINE Vec<S> add_parts(Vec<S> a, Vec<S> b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I), w = kPart<S> * width;
  return Vec<S>(
             __builtin_shufflevector(a.raw, b.raw, static_cast<int>(I / (2 * w) * 2 * w + I % w + I / w % 2 * n)...)) +
         Vec<S>(__builtin_shufflevector(a.raw, b.raw,
                                        static_cast<int>(I / (2 * w) * 2 * w + w + I % w + I / w % 2 * n)...));
}

// The accumulator whose lanes sum_lanes adds up into this lane.
template <class S>
constexpr int accumulator_of(int lane) {
  return lane / kPart<S> + lane % kPart<S> * kParts<S>;
}

// Lane i of the result is the sum over the lanes of accumulator accumulator_of(i).
template <class S>
FASTRNN_INLINE Vec<S> sum_lanes(Vec<S>* sum) {
  constexpr int n = Vec<S>::kLanes;
  constexpr auto lanes = std::make_index_sequence<n>();
#pragma GCC unroll 4
  for (int count = n / 2; count >= kParts<S>; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) sum[i] = interleave_add<S>(sum[i], sum[i + count], lanes);
  if constexpr (kParts<S> == 4) {
    sum[0] = add_parts<S, 2>(sum[0], sum[2], lanes);
    sum[1] = add_parts<S, 2>(sum[1], sum[3], lanes);
  }
  if constexpr (kParts<S> > 1) sum[0] = add_parts<S, 1>(sum[0], sum[1], lanes);
  return sum[0];
}

// Whether a row of x is laid out anew for weights of type W, once for all of them.
template <class W>
constexpr bool kPrepared = std::is_same_v<W, BFloat16> || std::is_same_v<W, Int8>;

// x for bfloat16 weights: of every two vectors the even elements, then the odd ones; a tail shorter than that as it is.
inline void prepare(const float* x, int64_t K, float* target, BFloat16) {
  constexpr int kLanes = Vec<float>::kLanes;
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) target[k + i] = x[k + 2 * i], target[k + kLanes + i] = x[k + 2 * i + 1];
  for (; k < K; ++k) target[k] = x[k];
}

// x for int8 weights: its unit (NaN: x must be multiplied in floats), and from the second vector on x / unit as int16,
// with zeros up to a whole register of them.
inline void prepare(const float* x, int64_t K, float* target, Int8) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  constexpr float kMost = 32767, kRound = Pattern<float>::kRound, kLeast = 1e-30f;
  V most(0.0f), finite(0.0f);  // finite: 0, or NaN
  for (int64_t k = 0; k < K; k += kLanes) {
    const V now = load(x + k, K - k < kLanes ? static_cast<int>(K - k) : kLanes), negative = V(0.0f) - now;
    const V size = select(now < negative, negative, now);
    most = select(most < size, size, most), finite = fma(now, V(0.0f), finite);
  }
  alignas(64) float sizes[kLanes], whole[kLanes];
  store(sizes, most, kLanes), store(whole, finite, kLanes);
  float size = 0, is_finite = 0;
  for (int i = 0; i < kLanes; ++i) size = sizes[i] > size ? sizes[i] : size, is_finite += whole[i];
  target[0] = is_finite != 0 || (size > 0 && size < kLeast) ? __builtin_nanf("") : size / kMost;
  const V scale(size > 0 ? kMost / size : 0.0f), shift(kRound);
  uint16_t* fixed = reinterpret_cast<uint16_t*>(target + kLanes);
  for (int64_t k = 0; k < ceil_div(K, 2 * kLanes) * 2 * kLanes; k += kLanes) {
    const int n = K - k >= kLanes ? kLanes : K > k ? static_cast<int>(K - k) : 0;
    const V now = n > 0 ? load(x + k, n) : V(0.0f);
    const U16 bits = __builtin_convertvector(reinterpret_cast<U32>(fma(now, scale, shift).raw), U16);
    __builtin_memcpy(fixed + k, &bits, sizeof bits);
  }
}

// Prefetches what the rows of weights hold `ahead` elements behind k (0: nothing), once for each line of the cache.
template <class W, class S>
FASTRNN_INLINE void prefetch(const W* const* weights, int64_t k, int64_t ahead) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(W));
  if (ahead != 0 && k % kLine == 0)
#pragma GCC unroll 16
    for (int i = 0; i < Vec<S>::kLanes; ++i) __builtin_prefetch(weights[i] + k + ahead);
}

// sum[i] += weights[i][k..K) x[k..K)
template <class W, class S>
FASTRNN_INLINE void add_products(const W* const* weights, const S* x, int64_t k, int64_t K, int64_t ahead,
                                 Vec<S>* sum) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  for (; k + kLanes <= K; k += kLanes) {
    const V now = load(x + k, kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = fma(load(weights[i] + k, kLanes), now, sum[i]);
    prefetch<W, S>(weights, k, ahead);
  }
  if (k < K) {
    const int rest = static_cast<int>(K - k);
    const V now = load(x + k, rest);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = fma(load(weights[i] + k, rest), now, sum[i]);
  }
}

// The same of a prepared x.
FASTRNN_INLINE void add_prepared(const BFloat16* const* weights, const float* x, int64_t K, int64_t ahead,
                                 Vec<float>* sum) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    const V even = load(x + k, kLanes), odd = load(x + k + kLanes, kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      U32 pairs;
      __builtin_memcpy(&pairs, weights[i] + k, sizeof pairs);
      sum[i] = fma(V(reinterpret_cast<F32>(pairs << 16)), even, sum[i]);
      sum[i] = fma(V(reinterpret_cast<F32>(pairs & 0xFFFF0000)), odd, sum[i]);
    }
    prefetch<BFloat16, float>(weights, k, ahead);
  }
  add_products(weights, x, k, K, 0, sum);
}

// 2 kLanes products of int8 weights (the first n of them; the others count as 0) and int16 x: sums of two neighbours.
using I32 = Raw<float>::Int;
FASTRNN_INLINE I32 multiply_fixed(const Int8* weights, const int16_t* x, int n) {
  constexpr int kCount = 2 * Vec<float>::kLanes;
  int8_t part[kCount];
  const int8_t* w = &weights->value;
  if (__builtin_expect(n < kCount, 0)) {
    for (int i = 0; i < kCount; ++i) part[i] = i < n ? w[i] : int8_t{0};
    w = part;
  }
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  return reinterpret_cast<I32>(_mm512_madd_epi16(wide, _mm512_loadu_si512(x)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  return reinterpret_cast<I32>(_mm256_madd_epi16(wide, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#else
  I32 sums;
  for (int i = 0; i < kCount / 2; ++i) sums[i] = w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1];
  return sums;
#endif
}

constexpr int64_t kFixedChunk = 2048;  // so many products of 2^22 in at least 4 lanes: an int32 holds them

FASTRNN_INLINE void add_prepared(const Int8* const* weights, const float* x, int64_t K, int64_t ahead,
                                 Vec<float>* sum) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes, kCount = 2 * kLanes;
  const int16_t* fixed = reinterpret_cast<const int16_t*>(x + kLanes);
  const V unit(x[0]);
  for (int64_t first = 0; first < K; first += kFixedChunk) {
    const int64_t last = K - first < kFixedChunk ? K : first + kFixedChunk;
    I32 total[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) total[i] = I32{};
    int64_t k = first;
    for (; k + kCount <= last; k += kCount) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) total[i] += multiply_fixed(weights[i] + k, fixed + k, kCount);
      prefetch<Int8, float>(weights, k, ahead);
    }
    if (k < last)
      for (int i = 0; i < kLanes; ++i)
        total[i] += multiply_fixed(weights[i] + k, fixed + k, static_cast<int>(last - k));
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = fma(V(__builtin_convertvector(total[i], F32)), unit, sum[i]);
  }
}

// The products of kLanes rows of weights, K long, with one x, each in its lane; meanwhile the weights `ahead` elements
// further on (0: none) are fetched into the cache. `prepared`: x as `prepare` left it, for kPrepared types.
template <class W, class S>
FASTRNN_INLINE Vec<S> dot_lanes(const W* const* row, const S* x, const S* prepared, int64_t K, int64_t ahead) {
  constexpr int kLanes = Vec<S>::kLanes;
  const W* weights[kLanes];
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) weights[accumulator_of<S>(lane)] = row[lane];
  Vec<S> sum[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = Vec<S>(S(0));
  if constexpr (kPrepared<W>) {
    if (!std::is_same_v<W, Int8> || prepared[0] == prepared[0])
      add_prepared(weights, prepared, K, ahead, sum);
    else
      add_products(weights, x, 0, K, ahead, sum);
  } else {
    add_products(weights, x, 0, K, ahead, sum);
  }
  return sum_lanes<S>(sum);
}

// Weights of this many bytes stay in the second cache from one step to the next; larger ones are fetched ahead.
constexpr int64_t kCachedBytes = 1 << 18;

// sums = rows of the panel times blocks [begin, end) of weight [gates, units, K] where it lies; scale [gates, units]: a
// factor of each row, or null. prepared: the prepared rows, for kPrepared types.
template <class W, class S>
void product_direct(const S* panel, int64_t stride, const S* prepared, int64_t prepared_stride, int64_t rows,
                    const W* weight, const float* scale, const PackedShape& s, int64_t begin, int64_t end, S* sums) {
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t vectors = s.vectors_in(begin, end), row_sums = s.columns(begin, end) * kLanes;
  const int64_t gate = s.units * s.K;  // elements from a gate's row of a unit to the next gate's
  const bool cached = s.gates * gate * static_cast<int64_t>(sizeof(W)) <= kCachedBytes;
  for (int64_t u = 0; u < vectors; ++u) {
    const int64_t j = (s.first_vector(begin) + u) * kLanes;
    const int n = s.units - j < kLanes ? static_cast<int>(s.units - j) : kLanes;
    for (int64_t g = 0; g < s.gates; ++g) {
      const W* row[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)  // behind the last unit: that unit again
        row[lane] = weight + g * gate + (j + (lane < n ? lane : n - 1)) * s.K;
      const int64_t next = g + 1 < s.gates ? gate : u + 1 < vectors ? kLanes * s.K - g * gate : 0;
      for (int64_t b = 0; b < rows; ++b) {
        Vec<S> sum = dot_lanes(row, panel + b * stride, prepared + b * prepared_stride, s.K, cached ? 0 : next);
        if constexpr (std::is_same_v<S, float>)
          if (scale) sum = sum * load(scale + g * s.units + j, n);
        store(sums + b * row_sums + (u * s.gates + g) * kLanes, sum, kLanes);
      }
    }
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
