// A unidirectional net on the CPU with as little around its kernels as there can be: what `module.step` calls once per
// step of a stream, and `forward` without gradients.
//
// Computes   per layer  h', c' = cell(W_ih x + b_ih, W_hh h + b_hh), x of the next layer = h'
// Memory     weights read where they lie (no copy, so none can be out of date); scratch kept by each thread
// Requires   weights whose shapes the caller has checked; refuses a call after one of them has moved
#pragma once

#include <string>

#include "cpu/kernels.h"
#include "problem.h"

namespace fastrnn {

// A layer: weight_ih [G * H, I], weight_hh [G * H, P], bias_ih and bias_hh [G * H] or none, weight_hr [P, H] or none;
// scales of weight_ih and weight_hh [G * H] (int8 only).
struct StepLayer {
  const void *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
  const float *scale_ih, *scale_hh;
};

// Where a weight lies, and as what.
struct Place {
  const void* address;
  int64_t rows, elements;
  ScalarType dtype;

  explicit Place(const Tensor& t)
      : address(t.const_data_ptr()), rows(t.dim() ? t.size(0) : 0), elements(t.numel()), dtype(t.scalar_type()) {}
  bool holds(const Tensor& t) const {
    if (elements == 0) return t.numel() == 0;  // stands for a weight that is not there
    return t.const_data_ptr() == address && t.numel() == elements && t.scalar_type() == dtype && t.is_contiguous() &&
           t.size(0) == rows && storage_suffices(t);
  }
};

class StepNet {
 public:
  // Seven weights for each layer, in the order of StepLayer; an empty tensor [0] where there is none. quantized:
  // weight_ih and weight_hh are int8 or bfloat16 beside float activations.
  StepNet(const std::string& cell, std::vector<Tensor> weights, int64_t H, int64_t P, bool quantized);

  // Whether every weight lies where it lay.
  bool is_current() const;

  // T steps: input [T, B, I], h and h_n [L, B, P], c and c_n [L, B, H] (null for cells without c), output [T, B, P] (or
  // null: not wanted). h_n may be h, and c_n c. h null: zeros.
  void run(int64_t T, int64_t B, const void* input, const void* h, const void* c, void* output, void* h_n,
           void* c_n) const;

  ScalarType dtype() const { return dtype_; }
  bool has_c() const { return kCells[static_cast<int>(shape_.cell)].has_c; }
  int64_t I() const { return I_; }
  int64_t H() const { return shape_.H; }
  int64_t P() const { return shape_.P; }
  int64_t L() const { return static_cast<int64_t>(layers_.size()); }

 private:
  ScanShape shape_;
  ScalarType dtype_;
  int64_t I_;
  std::vector<Tensor> weights_;
  std::vector<Place> places_;
  std::vector<StepLayer> layers_;
};

std::string take_string(StringHandle handle);

}  // namespace fastrnn
