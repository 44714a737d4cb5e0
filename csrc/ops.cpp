// The two operators: schemas, argument checks, allocation, Tensor -> ScanArgs. Contract of the arrays: scan.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"

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

// What the scan leaves for the products after it: the gradients of the gates' products [D, N, G * H] and, where they
// differ, of those with h [D, N, R * H]; with a projection those of h [D, N, P] and o tanh c [D, N, H]; of packed data
// or with resets the h that entered each row [D, N, P], on devices that do not take a list of them.
struct BetweenPasses {
  Array dgates, drecurrent, dprojected, unprojected, before;

  BetweenPasses(const Problem& p, Device& device) {
    const ScanShape& s = p.shape;
    const int64_t projected = s.projected ? 1 : 0;
    const int64_t widths[] = {p.cell.gates * s.H, p.cell.own * s.H, projected * s.P, projected * s.H};
    Array* arrays[] = {&dgates, &drecurrent, &dprojected, &unprojected};
    const ScalarType dtype = device.between_dtype(p.dtype);
    size_t offsets[5] = {};
    for (int i = 0; i < 4; ++i) {
      const size_t bytes = static_cast<size_t>(s.D * s.N * widths[i] * item_size(dtype));
      offsets[i + 1] = offsets[i] + (bytes + 63) / 64 * 64;
    }
    char* memory = device.take_between(offsets[4]);
    for (int i = 0; i < 4; ++i) {
      arrays[i]->dtype = dtype;
      if (widths[i] > 0) arrays[i]->data = memory + offsets[i];
    }
    before.dtype = p.dtype;
    if ((!s.batch_sizes && !s.resets) || device.takes_lists()) return;
    gathered_ = device.make(p.over_time(s.P), p.dtype);
    before.data = gathered_.mutable_data_ptr();
  }

 private:
  Tensor gathered_;
};

// From so many groups on they are divided among threads; below, the products of each are.
constexpr int64_t kManyGroups = 4;

// The gradients of the weights from those of the products of their groups. `target`: of group d, in a tensor in which
// those of other groups and of other parts of the batch lie `apart` rows apart.
class WeightGradients {
 public:
  WeightGradients(const Problem& problem, Device& device, const Tensor& input, const Tensor& output,
                  const OptionalTensor& h0, const BetweenPasses& between)
      : p(problem),
        s(problem.shape),
        device_(device),
        input_(input),
        output_(output),
        first_(h0 ? *h0 : device.zeros(problem.entering_state(problem.shape.P), problem.dtype)),
        between_(between) {
    if ((s.batch_sizes || s.resets) && !between.before.data) list_entered();
  }

  // Those of the list, each in the layout of its weight; where parts > 1 one for each of so many equal parts of the
  // batch [parts, ...]; [0] for 0 parts.
  std::vector<Tensor> all(const int64_t* parts) const {
    const int64_t members = p.weights.members(), per_group = static_cast<int64_t>(p.weights.per_group);
    const int64_t count = s.D / members * per_group;
    std::vector<Tensor> found;
    for (int64_t i = 0; i < count; ++i) {
      Sizes sizes = parts[i] > 0 ? sizes_of_kind(i % per_group) : Sizes{0};
      if (parts[i] > 0 && p.weights.stacked > 0) sizes.insert(sizes.begin(), p.weights.stacked);
      if (parts[i] > 1) sizes.insert(sizes.begin(), parts[i]);
      found.push_back(s.B > 0 ? device_.make(sizes, p.compute()) : device_.zeros(sizes, p.compute()));
    }
    const auto of_group = [&](int64_t d) {
      for (int64_t kind = 0; kind < per_group; ++kind) {
        const int64_t i = d / members * per_group + kind;
        if (parts[i] > 0) add_parts(found[static_cast<size_t>(i)], d, kind, parts[i]);
      }
    };
    if (s.D >= kManyGroups) {
      device_.for_each(s.D, of_group);
    } else {
      for (int64_t d = 0; d < s.D; ++d) of_group(d);
    }
    for (Tensor& t : found) t = device_.to_storage(t, p.dtype);
    return found;
  }

  // dinput [N, M, I]: of each input the sum of dx W_ih over its groups
  Tensor input() const {
    Sizes sizes = p.leading;
    sizes.push_back(p.M * p.I);
    const Tensor dinput = device_.make(sizes, p.compute());
    const auto of_input = [&](int64_t m) {
      for (int64_t d = m; d < s.D; d += p.M)
        device_.row_product(Rows::of_input(dinput, m, p.M, p.I), s.N, p.I, dgates(d),
                            Rows::of_matrix(weight_ih(d), p.I), G * s.H, d > m);
    };
    p.M > 1 ? device_.for_each(p.M, of_input) : of_input(0);
    return device_.to_storage(dinput, p.dtype);
  }

 private:
  // Where the h that entered each row of data lies: a row of the output or of h0.
  void list_entered() {
    const Rows first = Rows::of_matrix(first_, s.P);
    entered_.resize(static_cast<size_t>(s.D * s.N));
    for (int64_t d = 0; d < s.D; ++d)
      for (int64_t t = 0; t < s.T; ++t)
        for (int64_t b = 0; b < s.active(t); ++b) {
          const int64_t k = s.entering(d, t, b), before = s.reversed(d) ? t + 1 : t - 1;
          const Rows h =
              k < 0 ? Rows::of_output(output_, d, s.D, s.P).from(s.row(before, b)) : first.from(d * s.K() + k);
          entered_[static_cast<size_t>(d * s.N + s.row(t, b))] = h.data();
        }
  }

  // The rows of data first, first + apart, ...: all of them, or those of one row of the batch.
  struct Some {
    int64_t apart, first;
  };

  Sizes sizes_of_kind(int64_t kind) const {
    if (kind == 0) return {G * s.H, p.I};
    if (kind == 1) return {G * s.H, s.P};
    return p.weights.has_bias() && kind < 4 ? Sizes{G * s.H} : Sizes{s.P, s.H};
  }

  // The gradient of a kind of weight of group d, in its place in a result.
  void add_parts(const Tensor& result, int64_t d, int64_t kind, int64_t parts) const {
    const Sizes sizes = sizes_of_kind(kind);
    const int64_t height = sizes[0], stack = p.weights.members(), members = s.B / parts;
    const Rows target = Rows::of_matrix(result, sizes.size() > 1 ? sizes[1] : 1).from(d % stack * height);
    if (parts == 1) return add(target, d, kind, {1, 0}, 1, false);
    device_.for_each(s.B > 0 ? parts : 0, [&](int64_t part) {
      for (int64_t i = 0; i < members; ++i)
        add(target.from(part * stack * height), d, kind, {s.B, part * members + i}, members, i > 0);
    });
  }

  // target (+)= what some rows of data contribute; one of `members` rows of the batch that make a part.
  void add(const Rows& target, int64_t d, int64_t kind, const Some& rows, int64_t members, bool add) const {
    if (kind == 0) {  // dW_ih [G * H, I] = sum over time of dx_t input_t^T
      outer_product(target, G * s.H, p.I, dgates(d), Rows::of_input(input_, d, p.M, p.I), rows, s.N, add);
    } else if (kind == 1) {
      // dW_hh [G * H, P] = sum over time of dr_t h_{t-1}^T, where dr is `drecurrent` for the last R gates
      const int64_t own = R * s.H, shared = G * s.H - own;
      add_recurrent(target, d, shared, dgates(d), rows, add);
      if (own > 0) add_recurrent(target.from(shared), d, own, drecurrent(d), rows, add);
    } else if (p.weights.has_bias() && kind < 4) {
      add_bias(target, d, kind == 3 ? R * s.H : 0, rows, members);
    } else {  // dW_hr [P, H] = sum over time of dh_t (o tanh c)_t^T
      outer_product(target, s.P, s.H, Rows::of_group(between_.dprojected, d, s.N, s.P),
                    Rows::of_group(between_.unprojected, d, s.N, s.H), rows, s.N, add);
    }
  }

  // db_ih [G * H] = sum over time of dx_t; db_hh that of dr_t, the last `own` of which are `drecurrent`.
  void add_bias(const Rows& target, int64_t d, int64_t own, const Some& rows, int64_t members) const {
    const int64_t shared = G * s.H - own;
    const Tensor sums = device_.make({members > 1 ? 2 : 0, G * s.H}, p.compute());  // what there was, and this row's
    const bool first = members == 1 || rows.first % members == 0;
    const Rows both = Rows::of_matrix(sums, G * s.H), sum = first ? target : both.from(1);
    if (!first) device_.sum_over_rows(target, 1, G * s.H, both);
    device_.sum_over_rows(dgates(d).each(rows.apart, rows.first), s.N / rows.apart, shared, sum);
    if (own > 0)
      device_.sum_over_rows(drecurrent(d).each(rows.apart, rows.first), s.N / rows.apart, own, sum.from(0, shared));
    if (!first) device_.sum_over_rows(both, 2, G * s.H, target);
  }

  Array weight_ih(int64_t d) const { return {const_cast<void*>(p.weights.ih[static_cast<size_t>(d)]), p.dtype}; }
  Rows dgates(int64_t d) const { return Rows::of_group(between_.dgates, d, s.N, G * s.H); }
  Rows drecurrent(int64_t d) const { return Rows::of_group(between_.drecurrent, d, s.N, R * s.H); }

  // target [height, K] (+)= sum over some of the first `count` rows of a^T b
  void outer_product(const Rows& target, int64_t height, int64_t K, const Rows& a, const Rows& b, const Some& rows,
                     int64_t count, bool add) const {
    device_.outer_product(target, height, K, a.each(rows.apart, rows.first), b.each(rows.apart, rows.first),
                          count / rows.apart, add);
  }

  // target [height, P] (+)= sum over time of dr_t h_{t-1}^T
  void add_recurrent(const Rows& target, int64_t d, int64_t height, const Rows& dr, const Some& rows, bool add) const {
    if (between_.before.data || !entered_.empty()) {
      const Rows before = between_.before.data ? Rows::of_group(between_.before, d, s.N, s.P)
                                               : Rows::of_list(entered_.data() + d * s.N, p.dtype);
      return outer_product(target, height, s.P, dr, before, rows, s.N, add);
    }
    const Rows h = Rows::of_output(output_, d, s.D, s.P);
    const int64_t rest = s.N - s.B;  // rows behind the first step, or before the last
    const bool reverse = s.reversed(d);
    if (rest > 0)
      outer_product(target, height, s.P, dr.from(reverse ? 0 : s.B), h.from(reverse ? s.B : 0), rows, rest, add);
    outer_product(target, height, s.P, dr.from(reverse ? rest : 0), Rows::of_group(first_, d, s.B, s.P), rows, s.B,
                  add || rest > 0);
  }

  const Problem& p;
  const ScanShape& s;
  Device& device_;
  const int64_t G = p.cell.gates, R = p.cell.own;
  const Tensor input_, output_, first_;  // first_: h that enters the first step
  const BetweenPasses& between_;
  std::vector<const void*> entered_;  // [D, N] of packed data or with resets, where the device takes lists
};

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
