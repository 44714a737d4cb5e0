// The two operators: schemas, argument checks, allocation, Tensor -> ScanArgs. Contract of the arrays: scan.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/scan_cpu.h"

namespace fastrnn {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

void check(const Tensor& t, const char* name, const Sizes& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(t.device().type() == DeviceType::CPU, "fastrnn: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastrnn: ", name,
                  " must have the dtype of gates (cells: its compute dtype)");
  STD_TORCH_CHECK(sizes_of(t) == sizes, "fastrnn: ", name, " must have shape ", text(sizes), ", got ",
                  text(sizes_of(t)));
  STD_TORCH_CHECK(t.is_contiguous(), "fastrnn: ", name, " must be contiguous");
}

// The array of an optional tensor, checked; null where there is none.
const void* optional_array(const OptionalTensor& t, const char* name, const Sizes& sizes, ScalarType dtype) {
  if (!t) return nullptr;
  check(*t, name, sizes, dtype);
  return t->const_data_ptr();
}
const void* array(const Tensor& t, const char* name, const Sizes& sizes, ScalarType dtype) {
  check(t, name, sizes, dtype);
  return t.const_data_ptr();
}

Dtype dtype_of(const Tensor& gates) {
  switch (gates.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "fastrnn: gates must be float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What both operators learn from their arguments. Owns the row offsets that `shape` points to, and `batch_sizes`.
struct Problem {
  ScanShape shape;
  CellInfo cell;
  ScalarType dtype;
  Sizes leading;  // [T, B] dense or [N] packed: the leading dimensions of every array over time
  std::vector<int64_t> offsets;

  Problem(const std::string& cell_name, const Tensor& data, const char* data_name, const Tensor& weight_hh,
          const OptionalTensor& weight_hr, const OptionalTensor& batch_sizes, const OptionalTensor& h0,
          int64_t direction) {
    int id = 0;
    const int count = static_cast<int>(sizeof(kCells) / sizeof(kCells[0]));
    while (id < count && cell_name != kCells[id].name) ++id;
    STD_TORCH_CHECK(id < count, "fastrnn: unknown cell '", cell_name, "'");
    cell = kCells[id];
    shape.cell = static_cast<CellId>(id);
    STD_TORCH_CHECK(direction >= 0 && direction <= 2, "fastrnn: direction must be 0, 1 or 2, got ", direction);
    shape.direction = static_cast<Direction>(direction);
    dtype = data.scalar_type();
    shape.dtype = dtype_of(data);

    const int64_t dims = batch_sizes ? 3 : 4;
    STD_TORCH_CHECK(data.dim() == dims, "fastrnn: ", data_name, " must have ", dims, " dimensions, got ", data.dim());
    STD_TORCH_CHECK(weight_hh.dim() == 3, "fastrnn: weight_hh must have 3 dimensions [D, G * H, P], got ",
                    weight_hh.dim());
    shape.D = weight_hh.size(0), shape.H = weight_hh.size(1) / cell.gates, shape.P = weight_hh.size(2);
    shape.projected = weight_hr.has_value();
    STD_TORCH_CHECK(shape.D > 0 && shape.H > 0 && shape.P > 0, "fastrnn: weight_hh must not be empty, got ",
                    text(sizes_of(weight_hh)));
    STD_TORCH_CHECK(direction != 2 || shape.D % 2 == 0, "fastrnn: direction 2 needs an even number of groups, got ",
                    shape.D);
    check(weight_hh, "weight_hh", {shape.D, cell.gates * shape.H, shape.P}, dtype);
    STD_TORCH_CHECK(!shape.projected || cell.has_c, "fastrnn: weight_hr needs an LSTM, got ", cell_name);
    STD_TORCH_CHECK(shape.projected || shape.P == shape.H, "fastrnn: weight_hh must have shape [D, G * H, H], got ",
                    text(sizes_of(weight_hh)));
    if (batch_sizes)
      take_batch_sizes(*batch_sizes, data.size(0), h0);
    else
      leading = {data.size(0), data.size(1)}, shape.T = leading[0], shape.B = leading[1], shape.N = shape.T * shape.B,
      shape.batch_sizes = shape.offsets = nullptr;
  }
  Problem(const Problem&) = delete;

  void take_batch_sizes(const Tensor& batch_sizes, int64_t rows, const OptionalTensor& h0) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0 && batch_sizes.is_contiguous() &&
                        batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.device().type() == DeviceType::CPU,
                    "fastrnn: batch_sizes must be a contiguous int64 tensor [T] on the CPU, T > 0");
    STD_TORCH_CHECK(h0.has_value(), "fastrnn: packed data needs h0");
    leading = {rows}, shape.T = batch_sizes.size(0), shape.N = rows;
    shape.batch_sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
    shape.B = shape.batch_sizes[0];
    offsets.assign(1, 0);
    for (int64_t t = 0; t < shape.T; ++t) {
      const int64_t n = shape.batch_sizes[t];
      STD_TORCH_CHECK(n > 0 && n <= rows && (t == 0 || n <= shape.batch_sizes[t - 1]),
                      "fastrnn: batch_sizes must be positive and must not increase, got ", n, " at step ", t);
      offsets.push_back(offsets.back() + n);
    }
    STD_TORCH_CHECK(offsets.back() == rows, "fastrnn: batch_sizes sum to ", offsets.back(), " rows, the data has ",
                    rows);
    shape.offsets = offsets.data();
  }

  // [leading..., D, width]
  Sizes over_time(int64_t width) const {
    Sizes sizes = leading;
    sizes.insert(sizes.end(), {shape.D, width});
    return sizes;
  }
  Sizes state(int64_t width) const { return {shape.D, shape.B, width}; }
};

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

Tensor make(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class Args>
void run(const Args& args, const Tensor& like) {
  OptionalTensor memory;
  scan_cpu(args, [&](size_t bytes) {
    memory = make(like, {static_cast<int64_t>(bytes) + 64}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory->mutable_data_ptr());
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan(StringHandle name, Tensor gates, Tensor weight_hh,
                                                        OptionalTensor bias_ih, OptionalTensor bias_hh,
                                                        OptionalTensor weight_hr, OptionalTensor h0, OptionalTensor c0,
                                                        OptionalTensor batch_sizes, int64_t direction, bool save) {
  const std::string cell = take_string(name);
  const Problem p(cell, gates, "gates", weight_hh, weight_hr, batch_sizes, h0, direction);
  const ScanShape& s = p.shape;
  const int64_t G = p.cell.gates, A = p.cell.saved;
  const bool has_c = p.cell.has_c;
  STD_TORCH_CHECK(has_c || !c0, "fastrnn: ", cell, " has no cell state, but c0 was given");

  ScanArgs a;
  static_cast<ScanShape&>(a) = s;
  a.gates = array(gates, "gates", p.over_time(G * s.H), p.dtype);
  a.weight_hh = weight_hh.const_data_ptr();
  a.bias_ih = optional_array(bias_ih, "bias_ih", {s.D, G * s.H}, p.dtype);
  a.bias_hh = optional_array(bias_hh, "bias_hh", {s.D, G * s.H}, p.dtype);
  a.weight_hr = optional_array(weight_hr, "weight_hr", {s.D, s.P, s.H}, p.dtype);
  a.h0 = optional_array(h0, "h0", p.state(s.P), p.dtype);
  a.c0 = optional_array(c0, "c0", p.state(s.H), p.dtype);

  const Sizes none = {0};
  Tensor output = make(gates, p.over_time(s.P), p.dtype);
  Tensor h_n = make(gates, p.state(s.P), p.dtype);
  Tensor c_n = make(gates, has_c ? p.state(s.H) : none, p.dtype);
  Tensor cells = make(gates, save && has_c ? p.over_time(s.H) : none, compute_dtype(p.dtype));
  Tensor saved = make(gates, save ? p.over_time(A * s.H) : none, p.dtype);
  a.output = output.mutable_data_ptr(), a.h_n = h_n.mutable_data_ptr();
  a.c_n = has_c ? c_n.mutable_data_ptr() : nullptr;
  a.cells = save && has_c ? cells.mutable_data_ptr() : nullptr;
  a.saved = save && A > 0 ? saved.mutable_data_ptr() : nullptr;
  STD_TORCH_CHECK(s.T > 0, "fastrnn: Expected sequence length to be larger than 0 in RNN");
  run(a, gates);
  return {output, h_n, c_n, cells, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    StringHandle name, OptionalTensor doutput, OptionalTensor dh_n, OptionalTensor dc_n, Tensor output, Tensor cells,
    Tensor saved, Tensor weight_hh, OptionalTensor weight_hr, OptionalTensor h0, OptionalTensor c0,
    OptionalTensor batch_sizes, int64_t direction, bool needs_dh0, bool needs_dc0) {
  const std::string cell = take_string(name);
  const Problem p(cell, output, "output", weight_hh, weight_hr, batch_sizes, h0, direction);
  const ScanShape& s = p.shape;
  const int64_t G = p.cell.gates, A = p.cell.saved, R = p.cell.own;
  const bool has_c = p.cell.has_c;
  STD_TORCH_CHECK(has_c || (!c0 && !dc_n && !needs_dc0), "fastrnn: ", cell, " has no cell state");
  STD_TORCH_CHECK(s.T > 0, "fastrnn: Expected sequence length to be larger than 0 in RNN");

  ScanBackwardArgs a;
  static_cast<ScanShape&>(a) = s;
  const Sizes none = {0};
  a.doutput = optional_array(doutput, "doutput", p.over_time(s.P), p.dtype);
  a.dh_n = optional_array(dh_n, "dh_n", p.state(s.P), p.dtype);
  a.dc_n = optional_array(dc_n, "dc_n", p.state(s.H), p.dtype);
  a.output = array(output, "output", p.over_time(s.P), p.dtype);
  a.cells = array(cells, "cells", has_c ? p.over_time(s.H) : none, compute_dtype(p.dtype));
  a.saved = array(saved, "saved", p.over_time(A * s.H), p.dtype);
  a.weight_hh = weight_hh.const_data_ptr();
  a.weight_hr = optional_array(weight_hr, "weight_hr", {s.D, s.P, s.H}, p.dtype);
  a.h0 = optional_array(h0, "h0", p.state(s.P), p.dtype);
  a.c0 = optional_array(c0, "c0", p.state(s.H), p.dtype);

  Tensor dgates = make(output, p.over_time(G * s.H), p.dtype);
  Tensor drecurrent = make(output, p.over_time(R * s.H), p.dtype);
  Tensor dprojected = make(output, s.projected ? p.over_time(s.P) : none, p.dtype);
  Tensor hidden = make(output, s.projected ? p.over_time(s.H) : none, p.dtype);
  Tensor dh0 = make(output, needs_dh0 ? p.state(s.P) : none, p.dtype);
  Tensor dc0 = make(output, needs_dc0 ? p.state(s.H) : none, p.dtype);
  a.dgates = dgates.mutable_data_ptr(), a.drecurrent = R > 0 ? drecurrent.mutable_data_ptr() : nullptr;
  a.dprojected = s.projected ? dprojected.mutable_data_ptr() : nullptr;
  a.hidden = s.projected ? hidden.mutable_data_ptr() : nullptr;
  a.dh0 = needs_dh0 ? dh0.mutable_data_ptr() : nullptr;
  a.dc0 = needs_dc0 ? dc0.mutable_data_ptr() : nullptr;
  run(a, output);
  return {dgates, drecurrent, dprojected, hidden, dh0, dc0};
}

}  // namespace
}  // namespace fastrnn

// Dimension key and meaning: scan.h. gates [T, B, D, G * H] dense, or [N, D, G * H] with batch_sizes [T] (packed).
// Empty tensors [0] stand for what a cell does not have or what was not asked for.
STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(
      "scan(str cell, Tensor gates, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? h0, "
      "Tensor? c0, "
      "Tensor? batch_sizes, int direction, bool save) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)");
  m.def(
      "scan_backward(str cell, Tensor? doutput, Tensor? dh_n, Tensor? dc_n, Tensor output, Tensor cells, Tensor saved, "
      "Tensor weight_hh, Tensor? weight_hr, Tensor? h0, Tensor? c0, Tensor? batch_sizes, int direction, "
      "bool needs_dh0, bool needs_dc0) "
      "-> (Tensor dgates, Tensor drecurrent, Tensor dprojected, Tensor hidden, Tensor dh0, Tensor dc0)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("scan", TORCH_BOX(&fastrnn::scan));
  m.impl("scan_backward", TORCH_BOX(&fastrnn::scan_backward));
}
