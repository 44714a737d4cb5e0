// A value type of cells (csrc/math.h) for numbers whose storage, or whose products, have at most 11 bits: float, but
// sigmoid and tanh by the GPU's own 2^x and 1/x, each of which is one instruction.
//
// Errors, measured by tests/cpp/quick_test.cpp against long double, with the instructions' own of 2^-22 and 1 ulp (PTX,
// ex2.approx.ftz.f32 and rcp.approx.ftz.f32) put in at random: sigmoid at most 2^-19 relative where it is above 2^-20,
// 2^-38 absolute below; tanh 2^-19 relative. NaN gives NaN, infinities give the limits.
#pragma once

#include <cmath>

#include "machine.h"

namespace fastrnn::cuda {

struct Quick {
  using Scalar = float;
  float v;

  Quick() = default;
  FASTRNN_FN Quick(float value) : v(value) {}
  explicit FASTRNN_FN Quick(double value) : v(static_cast<float>(value)) {}
  FASTRNN_FN operator float() const { return v; }
};

FASTRNN_FN Quick operator+(Quick a, Quick b) { return a.v + b.v; }
FASTRNN_FN Quick operator-(Quick a, Quick b) { return a.v - b.v; }
FASTRNN_FN Quick operator*(Quick a, Quick b) { return a.v * b.v; }
FASTRNN_FN bool operator<(Quick a, Quick b) { return a.v < b.v; }
FASTRNN_FN bool operator<=(Quick a, Quick b) { return a.v <= b.v; }
FASTRNN_FN Quick select(bool mask, Quick a, Quick b) { return mask ? a : b; }
FASTRNN_FN Quick fma(Quick a, Quick b, Quick c) { return fastrnn::fma(a.v, b.v, c.v); }

// 2^x, 1 / x. Tests on the host make them as wrong as a GPU may.
#if !defined(FASTRNN_QUICK_OFF)
#define FASTRNN_QUICK_OFF(y, by) y
#endif
FASTRNN_FN float quick_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return FASTRNN_QUICK_OFF(std::exp2(x), 0x1p-22f);
#endif
}
FASTRNN_FN float quick_inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return FASTRNN_QUICK_OFF(1.0f / x, 0x1p-23f);
#endif
}

// 1 / (1 + exp(-x))
FASTRNN_FN Quick sigmoid(Quick x) { return quick_inverse(1.0f + quick_exp2(x.v * -1.44269504f)); }

// 1 - 2 / (1 + exp(2 x)); near 0, where that cancels, its series up to x^7.
FASTRNN_FN Quick tanh(Quick x) {
  const float square = x.v * x.v;
  const float series = fastrnn::fma(square, fastrnn::fma(square, -17.0f / 315, 2.0f / 15), -1.0f / 3);
  const float near = fastrnn::fma(x.v * square, series, x.v);
  const float far = fastrnn::fma(-2.0f, quick_inverse(1.0f + quick_exp2(x.v * 2.88539008f)), 1.0f);
  return std::fabs(x.v) < 0.25f ? near : far;
}

// What computes for a storage type.
template <class T>
struct ValueOf {
  using type = Compute<T>;
};
template <>
struct ValueOf<BFloat16> {
  using type = Quick;
};
template <>
struct ValueOf<Half> {
  using type = Quick;
};
template <class T>
using Value = typename ValueOf<T>::type;

}  // namespace fastrnn::cuda
