// The matrix products behind a backward pass along time: the gradients of the weights and of the input.
#pragma once

#include <vector>

#include "device.h"

namespace fastrnn {

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
    if (!s.has_boundaries() || device.takes_lists()) return;
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
    if (s.has_boundaries() && device.takes_lists()) list_entered();
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

  // The h that entered each row of data, where it is not that of the rows one step before.
  Rows entered(int64_t d) const {
    return device_.takes_lists() ? Rows::of_list(entered_.data() + d * s.N, p.dtype)
                                 : Rows::of_group(between_.before, d, s.N, s.P);
  }

  // target [height, P] (+)= sum over time of dr_t h_{t-1}^T
  void add_recurrent(const Rows& target, int64_t d, int64_t height, const Rows& dr, const Some& rows, bool add) const {
    if (s.has_boundaries()) return outer_product(target, height, s.P, dr, entered(d), rows, s.N, add);
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

}  // namespace fastrnn
