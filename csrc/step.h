// A unidirectional net on the CPU with as little around its kernels as there can be: what `module.step` calls once per
// step of a stream, and `forward` without gradients, or with them of one layer.
//
// Computes   per layer  h', c' = cell(W_ih x + b_ih, W_hh h + b_hh), x of the next layer = h'
// Memory     weights read where they lie (no copy, so none can be out of date) and kept no longer than the call;
//            scratch kept by each thread
// Requires   nothing of its caller: sizes and dtypes are checked at each call
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace fastrnn {

struct Shape {
  int64_t dim = 0, sizes[3] = {};

  bool operator==(const Shape& other) const {
    return dim == other.dim && sizes[0] == other.sizes[0] && sizes[1] == other.sizes[1] && sizes[2] == other.sizes[2];
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
};

// The elements of a contiguous tensor on the CPU that somebody else keeps; no data: no tensor.
struct TensorView {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  Shape shape;
};

// What a net is said to be. quantized: weight_ih and weight_hh are int8 or bfloat16 beside float activations.
struct StepKind {
  CellId cell;
  int64_t L, I, H, P;
  bool bias, quantized;

  bool has_c() const { return kCells[static_cast<int>(cell)].has_c; }
};

// One call of a net over T steps.
class StepCall {
 public:
  // Whether everything is as `kind` says. weights: for each layer weight_ih [G * H, I or P] and weight_hh [G * H, P],
  // of int8 their scales [G * H], with bias both biases [G * H], with P < H weight_hr [P, H]; input [T, B, I], or [B,
  // I] or [I] for a single step; h [L, B, P] and for an LSTM c [L, B, H], without B beside [I], or neither: zeros.
  bool take(const StepKind& kind, const std::vector<TensorView>& weights, const TensorView& input, const TensorView& h,
            const TensorView& c);

  // Whether the new state may be written here: h_n where h lies, c_n where c lies, or apart from everything else.
  bool may_write(const TensorView& h_n, const TensorView& c_n) const;

  // `cells` and `saved`: for backward, of a net of one layer; or no tensors.
  void run(const TensorView& output, const TensorView& h_n, const TensorView& c_n, const TensorView& cells = {},
           const TensorView& saved = {}) const;

  Shape output_shape() const;
  // Of what backward needs of a net of one layer: c of every step, none without c; and what the cell saves.
  Shape cells_shape() const { return saved_shape(cell().has_c, 1); }
  Shape saved_shape() const { return saved_shape(true, cell().saved); }
  ScalarType cells_dtype() const { return compute_dtype(dtype_); }
  Shape h_shape() const { return state_shape(shape_.P); }
  Shape c_shape() const { return state_shape(shape_.H); }
  ScalarType dtype() const { return dtype_; }

 private:
  // A layer of input width I: its weights, biases or none, weight_hr or none, scales or none.
  struct Layer {
    int64_t I;
    const void *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
    const float *scale_ih, *scale_hh;
  };

  bool take_weights(const StepKind& kind, const std::vector<TensorView>& weights);
  bool is_state(const TensorView& h, const TensorView& c) const;
  Shape state_shape(int64_t width) const;
  Shape saved_shape(bool is_there, int64_t arrays) const {
    return is_there ? Shape{3, {1, shape_.N, arrays * shape_.H}} : Shape{1, {0}};
  }
  const CellInfo& cell() const { return kCells[static_cast<int>(shape_.cell)]; }

  ScanShape shape_{};
  ScalarType dtype_ = ScalarType::Float;
  std::vector<Layer> layers_;
  TensorView input_, h_, c_;
};

}  // namespace fastrnn
