// The two operators: schemas, argument checks, allocation, Tensor -> ScanArgs. Contract of the arrays: scan.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "weight_gradients.h"

// Tests build the operators under another name.
#if !defined(FASTRNN_LIBRARY)
#define FASTRNN_LIBRARY fastrnn
#endif
#define FASTRNN_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define FASTRNN_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace fastrnn {

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "fastrnn: the input must be float32, float64, bfloat16 or float16");
  }
}

CellId cell_of(const std::string& name) {
  for (size_t id = 0; id < std::size(kCells); ++id)
    if (name == kCells[id].name) return static_cast<CellId>(id);
  STD_TORCH_CHECK(false, "fastrnn: unknown cell '", name, "'");
}

namespace {

// Owns the string: torch's own conversion to std::string (2.10 to 2.13) loses its memory at every call.
std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string copy(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

// The array of an optional tensor, checked; null where there is none.
const void* optional_array(const OptionalTensor& t, const char* name, const Sizes& sizes, ScalarType dtype,
                           const Device& device) {
  if (!t) return nullptr;
  check(*t, name, sizes, dtype, device.place());
  return t->const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer(StringHandle name, Tensor input_, std::vector<Tensor> list,
                                                         OptionalTensor h0_, OptionalTensor c0_,
                                                         OptionalTensor batch_sizes, int64_t groups, int64_t direction,
                                                         bool save, OptionalTensor resets_) {
  const std::string cell = take_string(name);
  const Tensor input = as_contiguous(input_);
  const OptionalTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), resets = as_contiguous(resets_);
  const std::unique_ptr<Device> device = device_of(input);
  const Problem p(device->place(), cell, input, list, h0, batch_sizes, groups, direction, resets);
  const ScanShape& s = p.shape;
  const int64_t A = p.cell.saved;
  const bool has_c = p.cell.has_c;
  check(input, "the input", sizes_of(input), p.dtype, device->place());
  STD_TORCH_CHECK(has_c || !c0, "fastrnn: ", cell, " has no cell state, but c0 was given");

  ScanArgs a;
  static_cast<ScanShape&>(a) = s;
  a.I = p.I, a.M = p.M, a.input = input.const_data_ptr();
  a.weight_ih = p.weights.ih.data(), a.weight_hh = p.weights.hh.data();
  a.scale_ih = a.scale_hh = nullptr;
  a.bias_ih = Weights::or_null(p.weights.b_ih), a.bias_hh = Weights::or_null(p.weights.b_hh);
  a.weight_hr = Weights::or_null(p.weights.hr);
  a.h0 = optional_array(h0, "h0", p.entering_state(s.P), p.dtype, *device);
  a.c0 = optional_array(c0, "c0", p.entering_state(s.H), p.dtype, *device);

  const Sizes none = {0};
  Tensor output = device->make(p.output(), p.dtype), h_n = device->make(p.state(s.P), p.dtype);
  Tensor c_n = device->make(has_c ? p.state(s.H) : none, p.dtype);
  Tensor cells = device->make(save && has_c ? p.over_time(s.H) : none, p.compute());
  Tensor saved = device->make(save ? p.over_time(A * s.H) : none, p.dtype);
  a.output = output.mutable_data_ptr(), a.h_n = h_n.mutable_data_ptr();
  a.c_n = has_c ? c_n.mutable_data_ptr() : nullptr;
  a.cells = save && has_c ? cells.mutable_data_ptr() : nullptr;
  a.saved = save && A > 0 ? saved.mutable_data_ptr() : nullptr;
  device->run(a);
  return {output, h_n, c_n, cells, saved};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> layer_backward(
    StringHandle name, OptionalTensor doutput_, OptionalTensor dh_n_, OptionalTensor dc_n_, Tensor input_,
    Tensor output_, Tensor cells_, Tensor saved_, std::vector<Tensor> list, OptionalTensor h0_, OptionalTensor c0_,
    OptionalTensor batch_sizes, int64_t groups, int64_t direction, std::vector<int64_t> wanted, OptionalTensor resets_,
    OptionalTensor dcells_) {
  const std::string cell = take_string(name);
  const Tensor input = as_contiguous(input_), output = as_contiguous(output_), cells = as_contiguous(cells_),
               saved = as_contiguous(saved_);
  const OptionalTensor h0 = as_contiguous(h0_), c0 = as_contiguous(c0_), doutput = as_contiguous(doutput_),
                       dh_n = as_contiguous(dh_n_), dc_n = as_contiguous(dc_n_), resets = as_contiguous(resets_),
                       dcells = as_contiguous(dcells_);
  const std::unique_ptr<Device> device = device_of(input);
  const Problem p(device->place(), cell, input, list, h0, batch_sizes, groups, direction, resets);
  const ScanShape& s = p.shape;
  const int64_t A = p.cell.saved;
  const bool has_c = p.cell.has_c;
  check(input, "the input", sizes_of(input), p.dtype, device->place());
  STD_TORCH_CHECK(wanted.size() == list.size() + 3, "fastrnn: wanted must hold ", list.size() + 3, " flags, got ",
                  wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i)
    STD_TORCH_CHECK(
        wanted[i] == 0 || wanted[i] == 1 || (i >= 3 && wanted[i] > 1 && !batch_sizes && s.B % wanted[i] == 0),
        "fastrnn: wanted must hold 0, 1 or, of a weight, a number of parts of the batch of ", s.B,
        " rows of dense data, got ", wanted[i]);
  STD_TORCH_CHECK(has_c || (!c0 && !dc_n && !dcells && !wanted[2]), "fastrnn: ", cell, " has no cell state");

  ScanBackwardArgs a;
  static_cast<ScanShape&>(a) = s;
  const Sizes none = {0};
  a.doutput = optional_array(doutput, "doutput", p.output(), p.dtype, *device);
  a.dh_n = optional_array(dh_n, "dh_n", p.state(s.P), p.dtype, *device);
  a.dc_n = optional_array(dc_n, "dc_n", p.state(s.H), p.dtype, *device);
  a.dcells = optional_array(dcells, "dcells", p.over_time(s.H), p.compute(), *device);
  a.output = optional_array(output, "output", p.output(), p.dtype, *device);
  a.cells = optional_array(cells, "cells", has_c ? p.over_time(s.H) : none, p.compute(), *device);
  a.saved = optional_array(saved, "saved", p.over_time(A * s.H), p.dtype, *device);
  a.weight_hh = p.weights.hh.data();
  a.weight_hr = Weights::or_null(p.weights.hr);
  a.h0 = optional_array(h0, "h0", p.entering_state(s.P), p.dtype, *device);
  a.c0 = optional_array(c0, "c0", p.entering_state(s.H), p.dtype, *device);

  const BetweenPasses between(p, *device);
  Tensor dh0 = device->make(wanted[1] ? p.entering_state(s.P) : none, p.dtype),
         dc0 = device->make(wanted[2] ? p.entering_state(s.H) : none, p.dtype);
  a.dgates = between.dgates.data, a.drecurrent = between.drecurrent.data;
  a.dprojected = between.dprojected.data, a.unprojected = between.unprojected.data;
  a.before = between.before.data;
  a.dh0 = wanted[1] ? dh0.mutable_data_ptr() : nullptr;
  a.dc0 = wanted[2] ? dc0.mutable_data_ptr() : nullptr;
  device->run(a);

  const WeightGradients gradients(p, *device, input, output, h0, between);
  const std::vector<Tensor> dweights = gradients.all(wanted.data() + 3);
  return {wanted[0] ? gradients.input() : device->make(none, p.dtype), dweights, dh0, dc0};
}

}  // namespace
}  // namespace fastrnn

// Dimension key: scan.h. One layer, all its groups (directions, members of an ensemble): input [T, B, I], or packed
// [N, I] with batch_sizes [T], or M * I features: M inputs, of which group d reads the (d mod M)-th; weights: weight_ih
// [G * H, I], weight_hh [G * H, P], with biases bias_ih and bias_hh [G * H], with a projection weight_hr [P, H], for
// each group, or each of them [S, ...] for S groups at a time; output [T, B, D * P] or [N, D * P]; cells [D, N, H] and
// saved [D, N, A * H] for backward. wanted: whether the gradient of the input, of h0, of c0 and of each weight is asked
// for; of a weight n > 1 asks for n gradients [n, ...], one for each of n equal parts of the batch of dense data. Empty
// tensors [0] stand for what a cell does not have or what was not asked for. resets [T, B] or [N], uint8: a Reset
// (scan.h) at each row; then h0 and c0 have 2 B rows, the initial states and those that a reset puts in their place.
// dcells: the gradient of cells.
FASTRNN_DEFINE(FASTRNN_LIBRARY, m) {
  m.def(
      "layer(str cell, Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, int groups, "
      "int direction, bool save, Tensor? resets=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor "
      "saved)");
  m.def(
      "layer_backward(str cell, Tensor? doutput, Tensor? dh_n, Tensor? dc_n, Tensor input, Tensor output, "
      "Tensor cells, Tensor saved, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, int groups, "
      "int direction, int[] wanted, Tensor? resets=None, Tensor? dcells=None) -> (Tensor dinput, Tensor[] dweights, "
      "Tensor dh0, Tensor dc0)");
}

FASTRNN_IMPLEMENT(FASTRNN_LIBRARY, CPU, m) {
  m.impl("layer", TORCH_BOX(&fastrnn::layer));
  m.impl("layer_backward", TORCH_BOX(&fastrnn::layer_backward));
}

#if defined(FASTRNN_CUDA)
FASTRNN_IMPLEMENT(FASTRNN_LIBRARY, CUDA, m) {
  m.impl("layer", TORCH_BOX(&fastrnn::layer));
  m.impl("layer_backward", TORCH_BOX(&fastrnn::layer_backward));
}
#endif
