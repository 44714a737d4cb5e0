// A unidirectional net on the CPU, without tensors: what `module.step` calls once per step of a stream, and quantized
// layers for a sequence.
//
// Computes   per layer  h', c' = cell(W_ih x + b_ih, W_hh h + b_hh), x of the next layer = h'
// Memory     weights read where they lie (no copy, so none can be out of date); scratch kept by each thread
// Requires   addresses of contiguous arrays of one dtype that live while it is used: the caller holds the tensors and
//            has checked their shapes
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scan.h"

namespace fastrnn {

// Addresses of the weights of a layer, 0 where there is none: weight_ih [G * H, I], weight_hh [G * H, P], bias_ih and
// bias_hh [G * H], weight_hr [P, H]; scales of weight_ih and weight_hh [G * H] (int8 only).
struct StepLayer {
  uintptr_t weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, scale_ih, scale_hh;
};

class Step {
 public:
  // cell and dtype by name; weight_type: "storage", "bfloat16" or "int8". Throws std::invalid_argument.
  Step(const std::string& cell, const std::string& dtype, const std::string& weight_type, int64_t I, int64_t H,
       int64_t P, std::vector<StepLayer> layers);

  // T steps: input [T, B, I], h and h_n [L, B, P], c and c_n [L, B, H] (0 for cells without c), output [T, B, P]. h_n
  // may be h, and c_n c. h 0: zeros.
  void run(int64_t T, int64_t B, uintptr_t input, uintptr_t h, uintptr_t c, uintptr_t output, uintptr_t h_n,
           uintptr_t c_n) const;

 private:
  void input_product(const StepLayer& layer, const void* x, int64_t rows, int64_t K, char* gates) const;

  ScanShape shape_;
  int64_t I_;
  std::vector<StepLayer> layers_;
};

}  // namespace fastrnn
