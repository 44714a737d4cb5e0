#include "step.h"

#include "cpu/scan_cpu.h"
#include "scratch.h"

namespace fastrnn {
namespace {

bool is(const TensorView& view, const Shape& shape, ScalarType dtype) {
  return view.data && view.dtype == dtype && view.shape == shape;
}

void* at(void* array, size_t bytes) { return array ? static_cast<char*>(array) + bytes : nullptr; }

// Whether `out` has no byte in common with `other`.
bool is_apart(const TensorView& out, const TensorView& other) {
  if (!out.data || !other.data) return true;
  const auto begin = [](const TensorView& t) { return static_cast<const char*>(t.data); };
  const auto end = [&](const TensorView& t) { return begin(t) + t.shape.numel() * item_size(t.dtype); };
  return end(out) <= begin(other) || end(other) <= begin(out);
}

}  // namespace

bool StepCall::take(const StepKind& kind, const std::vector<TensorView>& weights, const TensorView& input,
                    const TensorView& h, const TensorView& c) {
  shape_.cell = kind.cell;
  shape_.D = 1, shape_.H = kind.H, shape_.P = kind.P;
  shape_.direction = Direction::kForward;
  const int64_t dim = input.shape.dim;
  if (!take_weights(kind, weights) || dim < 1 || dim > 3 || input.dtype != dtype_ ||
      input.shape.sizes[dim - 1] != kind.I || input.shape.numel() == 0)
    return false;
  shape_.T = dim == 3 ? input.shape.sizes[0] : 1, shape_.B = dim >= 2 ? input.shape.sizes[dim - 2] : 1;
  shape_.N = shape_.T * shape_.B;
  input_ = input, h_ = h, c_ = c;
  return h.data || c.data ? is_state(h, c) : true;
}

bool StepCall::take_weights(const StepKind& kind, const std::vector<TensorView>& weights) {
  if (weights.empty() || kind.H <= 0 || kind.P <= 0 || kind.P > kind.H) return false;
  const ScalarType stored = weights[0].dtype;
  const bool scaled = stored == ScalarType::Char, projected = kind.P < kind.H;
  if (kind.quantized ? !scaled && stored != ScalarType::BFloat16 : scaled) return false;
  dtype_ = kind.quantized ? ScalarType::Float : stored;
  if (kind.quantized) shape_.weight_type = scaled ? WeightType::kInt8 : WeightType::kBFloat16;
  shape_.dtype = dtype_of(dtype_);
  const size_t per_layer = 2 + (scaled ? 2 : 0) + (kind.bias ? 2 : 0) + (projected ? 1 : 0);
  if (weights.size() != per_layer * static_cast<size_t>(kind.L)) return false;

  const int64_t rows = kCells[static_cast<int>(kind.cell)].gates * kind.H;
  const Shape row{1, {rows}};
  const TensorView* next = weights.data();
  bool all = true;
  const auto array = [&](const Shape& shape, ScalarType dtype) {
    all = all && is(*next, shape, dtype);
    return (next++)->data;
  };
  layers_.reserve(weights.size() / per_layer);
  for (size_t i = 0; i < weights.size(); i += per_layer) {
    Layer layer{};
    layer.I = layers_.empty() ? kind.I : kind.P;
    layer.weight_ih = array({2, {rows, layer.I}}, stored);
    layer.weight_hh = array({2, {rows, kind.P}}, stored);
    if (scaled) {
      layer.scale_ih = static_cast<const float*>(array(row, ScalarType::Float));
      layer.scale_hh = static_cast<const float*>(array(row, ScalarType::Float));
    }
    if (kind.bias) layer.bias_ih = array(row, dtype_), layer.bias_hh = array(row, dtype_);
    if (projected) layer.weight_hr = array({2, {kind.P, kind.H}}, dtype_);
    layers_.push_back(layer);
  }
  return all;
}

bool StepCall::is_state(const TensorView& h, const TensorView& c) const {
  const bool has_c = kCells[static_cast<int>(shape_.cell)].has_c;
  return is(h, h_shape(), dtype_) && (has_c ? is(c, c_shape(), dtype_) : !c.data);
}

bool StepCall::may_write(const TensorView& h_n, const TensorView& c_n) const {
  return is_state(h_n, c_n) && is_apart(h_n, c_n) && is_apart(h_n, input_) && is_apart(c_n, input_) &&
         is_apart(h_n, c_) && is_apart(c_n, h_) && (h_n.data == h_.data || is_apart(h_n, h_)) &&
         (c_n.data == c_.data || is_apart(c_n, c_));
}

Shape StepCall::state_shape(int64_t width) const {
  const int64_t L = static_cast<int64_t>(layers_.size());
  return input_.shape.dim == 1 ? Shape{2, {L, width}} : Shape{3, {L, shape_.B, width}};
}

Shape StepCall::output_shape() const {
  Shape shape = input_.shape;
  shape.sizes[shape.dim - 1] = shape_.P;
  return shape;
}

void StepCall::run(const TensorView& output, const TensorView& h_n, const TensorView& c_n, const TensorView& cells,
                   const TensorView& saved) const {
  PassScratch<1> odd_output;
  PassScratch<2> even_output;
  ScanArgs a{};
  static_cast<ScanShape&>(a) = shape_;
  const size_t item = static_cast<size_t>(item_size(dtype_));
  const size_t h_bytes = static_cast<size_t>(a.B * a.P) * item, c_bytes = static_cast<size_t>(a.B * a.H) * item;
  a.input = input_.data, a.cells = cells.data, a.saved = saved.data;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    a.I = layer.I;
    a.weight_ih = &layer.weight_ih, a.scale_ih = &layer.scale_ih;
    a.weight_hh = &layer.weight_hh, a.scale_hh = &layer.scale_hh;
    a.bias_ih = layer.bias_ih ? &layer.bias_ih : nullptr, a.bias_hh = layer.bias_hh ? &layer.bias_hh : nullptr;
    a.weight_hr = layer.weight_hr ? &layer.weight_hr : nullptr, a.projected = layer.weight_hr != nullptr;
    a.h0 = at(h_.data, i * h_bytes), a.c0 = at(c_.data, i * c_bytes);
    a.h_n = at(h_n.data, i * h_bytes), a.c_n = at(c_n.data, i * c_bytes);
    const bool last = i + 1 == layers_.size();
    const size_t bytes = static_cast<size_t>(a.T) * h_bytes;
    a.output = last ? output.data : i % 2 ? odd_output.get(bytes) : even_output.get(bytes);
    scan_cpu(a);
    a.input = a.output;
  }
}

}  // namespace fastrnn
