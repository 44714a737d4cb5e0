// Two vectors as one value, for arithmetic that waits: a cell ends in a long chain of dependent operations, and two
// chains side by side take little longer than one.
#pragma once

#include "storage.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class V>
struct Twin {
  using Scalar = typename V::Scalar;
  struct Mask {
    typename V::Mask a, b;
  };
  V a, b;

  Twin() = default;
  FASTRNN_INLINE Twin(V first, V second) : a(first), b(second) {}
  FASTRNN_INLINE explicit Twin(Scalar s) : a(s), b(s) {}

  friend FASTRNN_INLINE Twin operator+(Twin x, Twin y) { return {x.a + y.a, x.b + y.b}; }
  friend FASTRNN_INLINE Twin operator-(Twin x, Twin y) { return {x.a - y.a, x.b - y.b}; }
  friend FASTRNN_INLINE Twin operator*(Twin x, Twin y) { return {x.a * y.a, x.b * y.b}; }
  friend FASTRNN_INLINE Twin operator/(Twin x, Twin y) { return {x.a / y.a, x.b / y.b}; }
  friend FASTRNN_INLINE Mask operator<(Twin x, Twin y) { return {x.a < y.a, x.b < y.b}; }
  friend FASTRNN_INLINE Mask operator<=(Twin x, Twin y) { return {x.a <= y.a, x.b <= y.b}; }
  friend FASTRNN_INLINE Twin select(Mask m, Twin x, Twin y) { return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)}; }
  friend FASTRNN_INLINE Twin fma(Twin x, Twin y, Twin z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
  friend FASTRNN_INLINE Twin at_most(Twin x, Twin y) { return {at_most(x.a, y.a), at_most(x.b, y.b)}; }
  friend FASTRNN_INLINE Twin at_least(Twin x, Twin y) { return {at_least(x.a, y.a), at_least(x.b, y.b)}; }
  friend FASTRNN_INLINE Twin pow2_rounded(Twin x, Twin& scale) {
    return {pow2_rounded(x.a, scale.a), pow2_rounded(x.b, scale.b)};
  }
};

// The vectors of a value, `apart` elements from one to the next; n: elements of a single vector, a twin's are whole.
template <class W>
struct Units {
  static constexpr int kVectors = 1;
  template <class T>
  static FASTRNN_INLINE W load(const T* p, int64_t, int n) {
    return FASTRNN_ISA::load(p, n);
  }
  template <class T>
  static FASTRNN_INLINE W store(T* p, W v, int64_t, int n) {
    return FASTRNN_ISA::store(p, v, n);
  }
};
template <class V>
struct Units<Twin<V>> {
  static constexpr int kVectors = 2;
  template <class T>
  static FASTRNN_INLINE Twin<V> load(const T* p, int64_t apart, int) {
    return {FASTRNN_ISA::load(p, V::kLanes), FASTRNN_ISA::load(p + apart, V::kLanes)};
  }
  template <class T>
  static FASTRNN_INLINE Twin<V> store(T* p, Twin<V> v, int64_t apart, int) {
    return {FASTRNN_ISA::store(p, v.a, V::kLanes), FASTRNN_ISA::store(p + apart, v.b, V::kLanes)};
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
