// Prints the largest error of sigmoid and tanh in units in the last place, against long double, and checks the limits.
// Built and run by tests/test_math.py, once per instruction set (FASTRNN_ISA); needs nothing but the headers.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

#include "../../csrc/cpu/storage.h"

using namespace fastrnn;
using fastrnn::FASTRNN_ISA::Vec;

template <class F>
F ulp(long double exact) {
  const F x = std::fabs(static_cast<F>(exact));
  const F floor = std::numeric_limits<F>::min();  // below the normal numbers the spacing is that of the smallest one
  return std::nextafter(x < floor ? floor : x, std::numeric_limits<F>::infinity()) - (x < floor ? floor : x);
}

template <class V>
Scalar<V> first_lane(V v) {
  if constexpr (sizeof(V) == sizeof(Scalar<V>)) {
    Scalar<V> s;
    __builtin_memcpy(&s, &v, sizeof s);
    return s;
  } else {
    return v.raw[0];
  }
}

template <class V>
int run(const char* name) {
  using F = Scalar<V>;
  long double worst_sigmoid = 0, worst_tanh = 0;
  const double limit = sizeof(F) == 4 ? 87.0 : 707.0;  // beyond it sigmoid(-x) is no normal number
  const auto visit = [&](double at) {
    const F x = static_cast<F>(at);
    const long double exact_sigmoid = 1.0L / (1.0L + std::exp(-static_cast<long double>(x)));
    const long double exact_tanh = std::tanh(static_cast<long double>(x));
    const auto error = [](F got, long double exact) { return std::fabs(got - exact) / ulp<F>(exact); };
    worst_sigmoid = std::fmax(worst_sigmoid, error(first_lane(sigmoid(V(x))), exact_sigmoid));
    worst_tanh = std::fmax(worst_tanh, error(first_lane(fastrnn::tanh(V(x))), exact_tanh));
  };
  for (int i = -200000; i <= 200000; ++i) {
    visit(limit * i / 200000);
    visit(12.0 * i / 200000);
    visit(i * 1e-9);
  }
  const F inf = std::numeric_limits<F>::infinity(), nan = std::numeric_limits<F>::quiet_NaN();
  const F big = sizeof(F) == 4 ? 1e30 : 1e300;
  int failures = 0;
  for (const F x : {inf, big}) {
    failures += first_lane(sigmoid(V(x))) != 1 || first_lane(sigmoid(V(-x))) != 0;
    failures += first_lane(fastrnn::tanh(V(x))) != 1 || first_lane(fastrnn::tanh(V(-x))) != -1;
  }
  failures += !std::isnan(first_lane(sigmoid(V(nan)))) || !std::isnan(first_lane(fastrnn::tanh(V(nan))));
  failures += !std::isnan(first_lane(relu(V(nan)))) || first_lane(relu(V(F(-1)))) != 0;
  std::printf("%s %.3Lf %.3Lf %d\n", name, worst_sigmoid, worst_tanh, failures);
  return failures;
}

int main() {
  return run<float>("float") + run<double>("double") + run<Vec<float>>("Vec<float>") + run<Vec<double>>("Vec<double>");
}
