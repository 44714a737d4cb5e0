#include "step.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "cpu/scan_cpu.h"
#include "scratch.h"

namespace fastrnn {
namespace {

const void* at(const void* array, size_t bytes) { return array ? static_cast<const char*>(array) + bytes : nullptr; }
void* at(void* array, size_t bytes) { return array ? static_cast<char*>(array) + bytes : nullptr; }

constexpr size_t kWeightsPerLayer = 7;

}  // namespace

StepNet::StepNet(const std::string& cell, std::vector<Tensor> weights, int64_t H, int64_t P, bool quantized)
    : shape_(), weights_(std::move(weights)) {
  STD_TORCH_CHECK(!weights_.empty() && weights_.size() % kWeightsPerLayer == 0, "fastrnn: ", weights_.size(),
                  " weights are not seven per layer");
  shape_.cell = cell_of(cell);
  shape_.T = 1, shape_.D = 1, shape_.H = H, shape_.P = P;
  shape_.direction = Direction::kForward;
  const int64_t rows = kCells[static_cast<int>(shape_.cell)].gates * H;
  STD_TORCH_CHECK(H > 0 && P > 0 && weights_[0].dim() == 2, "fastrnn: wrong sizes of a net");
  I_ = weights_[0].size(1);
  const ScalarType stored = weights_[0].scalar_type();
  const bool scaled = stored == ScalarType::Char;
  dtype_ = quantized ? ScalarType::Float : stored;
  if (quantized) {
    STD_TORCH_CHECK(scaled || stored == ScalarType::BFloat16, "fastrnn: quantized weights must be int8 or bfloat16");
    shape_.weight_type = scaled ? WeightType::kInt8 : WeightType::kBFloat16;
  }
  shape_.dtype = dtype_of(dtype_);
  for (size_t i = 0; i < weights_.size(); i += kWeightsPerLayer) {
    const Tensor* w = &weights_[i];
    const auto array = [&](size_t k, const char* name, const Sizes& sizes, ScalarType dtype) -> const void* {
      if (k >= 2 && w[k].numel() == 0) return nullptr;
      check(w[k], name, sizes, dtype);
      return w[k].const_data_ptr();
    };
    layers_.push_back({array(0, "weight_ih", {rows, i == 0 ? I_ : P}, stored), array(1, "weight_hh", {rows, P}, stored),
                       array(2, "bias_ih", {rows}, dtype_), array(3, "bias_hh", {rows}, dtype_),
                       array(4, "weight_hr", {P, H}, dtype_),
                       static_cast<const float*>(array(5, "scale_ih", {rows}, ScalarType::Float)),
                       static_cast<const float*>(array(6, "scale_hh", {rows}, ScalarType::Float))});
    const StepLayer& layer = layers_.back();
    STD_TORCH_CHECK(P == H || layer.weight_hr, "fastrnn: a net with P < H needs weight_hr");
    STD_TORCH_CHECK(!scaled || (layer.scale_ih && layer.scale_hh), "fastrnn: int8 weights need scales");
  }
  for (const Tensor& t : weights_) places_.emplace_back(t);
}

bool StepNet::is_current() const {
  for (size_t i = 0; i < weights_.size(); ++i)
    if (!places_[i].holds(weights_[i])) return false;
  return true;
}

void StepNet::run(int64_t T, int64_t B, const void* input, const void* h, const void* c, void* output, void* h_n,
                  void* c_n) const {
  if (T == 0 || B == 0) return;
  PassScratch<0> scratch;
  PassScratch<1> odd_output;
  PassScratch<2> even_output;
  ScanArgs a{};
  static_cast<ScanShape&>(a) = shape_;
  a.T = T, a.B = B, a.N = T * B;
  const size_t item = static_cast<size_t>(item_size(dtype_));
  const size_t h_bytes = static_cast<size_t>(B * a.P) * item, c_bytes = static_cast<size_t>(B * a.H) * item;
  a.I = I_, a.input = input;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const StepLayer& layer = layers_[i];
    a.weight_ih = &layer.weight_ih, a.scale_ih = &layer.scale_ih;
    a.weight_hh = &layer.weight_hh, a.scale_hh = &layer.scale_hh;
    a.bias_ih = layer.bias_ih ? &layer.bias_ih : nullptr, a.bias_hh = layer.bias_hh ? &layer.bias_hh : nullptr;
    a.weight_hr = layer.weight_hr ? &layer.weight_hr : nullptr, a.projected = layer.weight_hr != nullptr;
    a.h0 = at(h, i * h_bytes), a.c0 = at(c, i * c_bytes);
    a.h_n = at(h_n, i * h_bytes), a.c_n = at(c_n, i * c_bytes);
    const bool last = i + 1 == layers_.size();
    const size_t bytes = static_cast<size_t>(T) * h_bytes;
    a.output = last && output ? output : i % 2 ? odd_output.get(bytes) : even_output.get(bytes);
    scan_cpu(a, [&](size_t bytes) { return scratch.get(bytes); });
    a.I = a.P, a.input = a.output;
  }
}

namespace {

// The nets that Python holds, by handle.
std::mutex registry_mutex;
std::unordered_map<int64_t, std::shared_ptr<const StepNet>>& registry() {
  static std::unordered_map<int64_t, std::shared_ptr<const StepNet>> nets;
  return nets;
}

int64_t step_net(StringHandle name, std::vector<Tensor> weights, int64_t H, int64_t P, bool quantized) {
  static int64_t next = 1;
  const std::string cell = take_string(name);
  auto net = std::make_shared<const StepNet>(cell, std::move(weights), H, P, quantized);
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[next] = std::move(net);
  return next++;
}

void step_free(int64_t handle) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(handle);
}

std::shared_ptr<const StepNet> net_of(int64_t handle) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(handle);
  STD_TORCH_CHECK(found != registry().end(), "fastrnn: no net has handle ", handle);
  STD_TORCH_CHECK(found->second->is_current(), "fastrnn: a weight has moved");
  return found->second;
}

// The leading dimensions of a call, T and B, from its input [T, B, I], [B, I] or [I].
struct StepCall {
  const std::shared_ptr<const StepNet> net;
  const Tensor input;
  int64_t T, B;

  StepCall(int64_t handle, const Tensor& given) : net(net_of(handle)), input(as_contiguous(given)) {
    const int64_t dims = input.dim();
    STD_TORCH_CHECK(dims >= 1 && dims <= 3, "fastrnn: the input must have 1 to 3 dimensions, got ", dims);
    T = dims == 3 ? input.size(0) : 1, B = dims >= 2 ? input.size(dims - 2) : 1;
    STD_TORCH_CHECK(T > 0, "fastrnn: Expected sequence length to be larger than 0 in RNN");
    Sizes sizes = sizes_of(input);
    sizes.back() = net->I();
    check(input, "the input", sizes, net->dtype());
  }

  Sizes state(int64_t width) const { return input.dim() == 1 ? Sizes{net->L(), width} : Sizes{net->L(), B, width}; }
  Sizes output() const {
    Sizes sizes = sizes_of(input);
    sizes.back() = net->P();
    return sizes;
  }
  const void* array(const OptionalTensor& t, const char* name, int64_t width) const {
    if (!t) return nullptr;
    check(*t, name, state(width), net->dtype());
    return t->const_data_ptr();
  }
  // The new state may lie where the old one lies, or apart from it: nothing in between.
  void check_out(const Tensor& out, const OptionalTensor& other, bool may_be_same) const {
    if (!other || out.numel() == 0 || other->numel() == 0) return;
    const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
    const auto end = [&](const Tensor& t) { return begin(t) + t.numel() * item_size(t.scalar_type()); };
    const bool apart = end(out) <= begin(*other) || end(*other) <= begin(out);
    STD_TORCH_CHECK(apart || (may_be_same && begin(out) == begin(*other)), "fastrnn: out overlaps the state");
  }
  void check_states(const OptionalTensor& h, const OptionalTensor& c) const {
    STD_TORCH_CHECK(c.has_value() == (h.has_value() && net->has_c()), "fastrnn: c belongs to the h of an LSTM");
  }
};

std::tuple<Tensor, Tensor, Tensor> step(int64_t handle, Tensor input, OptionalTensor h_, OptionalTensor c_) {
  const StepCall call(handle, input);
  const OptionalTensor h = as_contiguous(h_), c = as_contiguous(c_);
  call.check_states(h, c);
  const StepNet& net = *call.net;
  const void *h0 = call.array(h, "h", net.P()), *c0 = call.array(c, "c", net.H());
  Tensor output = make(call.output(), net.dtype()), h_n = make(call.state(net.P()), net.dtype());
  Tensor c_n = make(net.has_c() ? call.state(net.H()) : Sizes{0}, net.dtype());
  net.run(call.T, call.B, call.input.const_data_ptr(), h0, c0, output.mutable_data_ptr(), h_n.mutable_data_ptr(),
          net.has_c() ? c_n.mutable_data_ptr() : nullptr);
  return {output, h_n, c_n};
}

Tensor step_out(int64_t handle, Tensor input, OptionalTensor h_, OptionalTensor c_, Tensor h_n, OptionalTensor c_n) {
  const StepCall call(handle, input);
  const OptionalTensor h = as_contiguous(h_), c = as_contiguous(c_);
  call.check_states(h, c);
  call.check_states(h_n, c_n);
  const StepNet& net = *call.net;
  const void *h0 = call.array(h, "h", net.P()), *c0 = call.array(c, "c", net.H());
  call.array(h_n, "h_n", net.P()), call.array(c_n, "c_n", net.H());
  call.check_out(h_n, h, true), call.check_out(h_n, c, true), call.check_out(h_n, call.input, true);
  call.check_out(h_n, c_n, false);
  if (c_n) call.check_out(*c_n, h, true), call.check_out(*c_n, c, true), call.check_out(*c_n, call.input, true);
  Tensor output = make(call.output(), net.dtype());
  net.run(call.T, call.B, call.input.const_data_ptr(), h0, c0, output.mutable_data_ptr(), h_n.mutable_data_ptr(),
          c_n ? c_n->mutable_data_ptr() : nullptr);
  return output;
}

}  // namespace
}  // namespace fastrnn

// A net of given weights, until it is freed; and its steps: input [B, I], [I] or [T, B, I], h [L, B, P], c [L, B, H].
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def("step_net(str cell, Tensor[] weights, int H, int P, bool quantized) -> int");
  m.def("step_free(int net) -> ()");
  m.def("step(int net, Tensor input, Tensor? h, Tensor? c) -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def("step_out(int net, Tensor input, Tensor? h, Tensor? c, Tensor(a!) h_n, Tensor(b!)? c_n) -> Tensor output");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("step_net", TORCH_BOX(&fastrnn::step_net));
  m.impl("step", TORCH_BOX(&fastrnn::step));
  m.impl("step_out", TORCH_BOX(&fastrnn::step_out));
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("step_free", TORCH_BOX(&fastrnn::step_free));
}
