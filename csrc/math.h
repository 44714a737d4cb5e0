// Activation functions of recurrent cells, written once for every value type.
//
// A value type V is a float or double, or a vector of either (cpu/vec.h). It has V(number), +, -, *, /, comparisons,
// select(mask, a, b), at_most and at_least (which let NaN pass), fma(a, b, c) = a * b + c (fused where the target
// fuses) and pow2_rounded. Nothing here touches memory.
//
// Errors are maxima over the whole range, measured by tests/cpp/math_test.cpp against long double:
//   sigmoid  float 3.0 ulp, double 3.0 ulp; exactly 0 below -88.4 (-709.4), exactly 1 above 17.4 (37.5)
//   tanh     float 3.0 ulp, double 3.0 ulp; exactly +-1 beyond |x| = 9.1 (19.1)
// NaN gives NaN, infinities give the limits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTRNN_FN __host__ __device__ __forceinline__
#else
#define FASTRNN_FN inline __attribute__((always_inline))
#endif

namespace fastrnn {

template <class V>
struct ScalarOf {
  using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;

// The scalar value types.
FASTRNN_FN float select(bool mask, float a, float b) { return mask ? a : b; }
FASTRNN_FN double select(bool mask, double a, double b) { return mask ? a : b; }
FASTRNN_FN float at_most(float x, float most) { return most < x ? most : x; }
FASTRNN_FN double at_most(double x, double most) { return most < x ? most : x; }
FASTRNN_FN float at_least(float x, float least) { return least > x ? least : x; }
FASTRNN_FN double at_least(double x, double least) { return least > x ? least : x; }
FASTRNN_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTRNN_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Adding 1.5 * 2^mantissa_bits leaves the rounded integer in the low bits of a float's pattern; shifted into the
// exponent, and offset by the exponent of 1, it is the pattern of 2^n.
template <class F>
struct Pattern;
template <>
struct Pattern<float> {
  using Int = int32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr Int kOne = 0x3F800000, kShift = 23;
};
template <>
struct Pattern<double> {
  using Int = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr Int kOne = 0x3FF0000000000000, kShift = 52;
};

// Returns the integer n nearest to x, sets scale = 2^n; n in [-126, 128] (float) or [-1022, 1024] (double), the
// largest giving infinity.
template <class F>
FASTRNN_FN F pow2_rounded_scalar(F x, F& scale) {
  using P = Pattern<F>;
  const F shifted = x + P::kRound;
  typename P::Int bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<typename P::Int>(static_cast<uint64_t>(bits) << P::kShift) + P::kOne;
  __builtin_memcpy(&scale, &bits, sizeof bits);
  return shifted - P::kRound;
}
FASTRNN_FN float pow2_rounded(float x, float& scale) { return pow2_rounded_scalar(x, scale); }
FASTRNN_FN double pow2_rounded(double x, double& scale) { return pow2_rounded_scalar(x, scale); }

// expm1(r) = r + r^2 q(r) for |r| <= ln(2) / 2.
// float: minimax of degree 4, relative error 1.3e-8. double: Taylor of degree 11, relative error 1.2e-17.
template <class V>
FASTRNN_FN V expm1_reduced(V r, float) {
  V q = fma(V(0.0013882496859878302), r, V(0.00836664717644453));
  q = fma(q, r, V(0.04166720435023308));
  q = fma(q, r, V(0.16666541993618011));
  q = fma(q, r, V(0.4999999701976776));
  return fma(r * r, q, r);
}

template <class V>
FASTRNN_FN V expm1_reduced(V r, double) {
  V q = fma(V(1.0 / 6227020800.0), r, V(1.0 / 479001600.0));
  q = fma(q, r, V(1.0 / 39916800.0));
  q = fma(q, r, V(1.0 / 3628800.0));
  q = fma(q, r, V(1.0 / 362880.0));
  q = fma(q, r, V(1.0 / 40320.0));
  q = fma(q, r, V(1.0 / 5040.0));
  q = fma(q, r, V(1.0 / 720.0));
  q = fma(q, r, V(1.0 / 120.0));
  q = fma(q, r, V(1.0 / 24.0));
  q = fma(q, r, V(1.0 / 6.0));
  q = fma(q, r, V(0.5));
  return fma(r * r, q, r);
}

// Constants of the range reduction y = n ln(2) + r. ln(2) in two parts, the first short enough that n * kLn2High is
// exact for every n used here. kExpMax: the smallest round number where 2^n is already infinite, kExpMin: the least
// with 2^n still normal.
template <class S>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr double kLn2High = 0.693359375, kLn2Low = -2.12194440054690583e-4;
  static constexpr double kExpMax = 89.0, kExpMin = -87.0, kTanhMax = 40.0;
};
template <>
struct ExpRange<double> {
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpMax = 710.0, kExpMin = -708.0, kTanhMax = 80.0;
};

template <class V>
FASTRNN_FN V clamp(V x, double low, double high) {  // NaN passes through
  return at_least(at_most(x, V(high)), V(low));
}

// y = n ln(2) + r: returns expm1(r), sets scale = 2^n. `y` lies in [kExpMin, kExpMax].
template <class V>
FASTRNN_FN V expm1_split(V y, V& scale) {
  using S = Scalar<V>;
  const V n = pow2_rounded(y * V(1.4426950408889634), scale);
  V r = fma(n, V(-ExpRange<S>::kLn2High), y);
  r = fma(n, V(-ExpRange<S>::kLn2Low), r);
  return expm1_reduced(r, S());
}

// 1 / (1 + exp(-x))
template <class V>
FASTRNN_FN V sigmoid(V x) {
  using R = ExpRange<Scalar<V>>;
  const V one = V(1.0);
  V scale;
  const V p = expm1_split(clamp(V(0.0) - x, R::kExpMin, R::kExpMax), scale);
  return one / fma(scale, one + p, one);
}

// expm1(2 x) / (expm1(2 x) + 2)
template <class V>
FASTRNN_FN V tanh(V x) {
  using R = ExpRange<Scalar<V>>;
  V scale;
  const V p = expm1_split(clamp(x + x, -R::kTanhMax, R::kTanhMax), scale);
  const V em1 = fma(scale, p, scale - V(1.0));
  return em1 / (em1 + V(2.0));
}

template <class V>
FASTRNN_FN V relu(V x) {  // NaN passes through
  const V zero = V(0.0);
  return select(x < zero, zero, x);
}

}  // namespace fastrnn
