// Prints the largest errors of sigmoid and tanh of csrc/cuda/quick.h against long double, with the errors of a GPU's
// instructions put in, and checks the limits. Built and run by tests/test_math.py.
#include <cmath>
#include <cstdio>
#include <limits>

// Each result off by as much as PTX allows (2^-22 of 2^x, an ulp of 1 / x), up or down in turns that nothing repeats.
inline float off(float y, float by) {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return y * (1.0f + (state >> 31 ? by : -by));
}
#define FASTRNN_QUICK_OFF(y, by) off(y, by)
#include "../../csrc/cuda/quick.h"

using fastrnn::cuda::Quick;

int main() {
  long double sigmoid_relative = 0, sigmoid_absolute = 0, tanh_relative = 0;
  const auto keep = [](long double& most, long double error) { most = error > most ? error : most; };
  for (int sign : {-1, 1})
    for (int exponent = -40; exponent < 7; ++exponent)
      for (int i = 0; i < 4096; ++i) {
        const float x = static_cast<float>(sign) * std::ldexp(1.0f + static_cast<float>(i) / 4096, exponent);
        const long double s = 1 / (1 + std::exp(-static_cast<long double>(x))),
                          t = std::tanh(static_cast<long double>(x));
        const long double s_error = std::fabs(sigmoid(Quick(x)).v - s), t_error = std::fabs(tanh(Quick(x)).v - t);
        if (s > 0x1p-20L)
          keep(sigmoid_relative, s_error / s);
        else
          keep(sigmoid_absolute, s_error);
        keep(tanh_relative, t_error / std::fabs(t));
      }
  std::printf("sigmoid_relative %.2Lf\nsigmoid_absolute %.2Lf\ntanh_relative %.2Lf\n", std::log2(sigmoid_relative),
              std::log2(sigmoid_absolute), std::log2(tanh_relative));
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  int failures = 0;
  failures += sigmoid(Quick(infinity)).v < 1 - 0x1p-20f || sigmoid(Quick(-infinity)).v != 0;
  failures += tanh(Quick(infinity)).v != 1 || tanh(Quick(-infinity)).v > -1 + 0x1p-20f || tanh(Quick(0.0f)).v != 0;
  failures += sigmoid(Quick(nan)).v == sigmoid(Quick(nan)).v || tanh(Quick(nan)).v == tanh(Quick(nan)).v;
  std::printf("failures %d\n", failures);
}
