// What both operators learn from their arguments, checked: sizes, weights, row offsets.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tensors.h"

namespace fastrnn {

CellId cell_of(const std::string& name);
Dtype dtype_of(ScalarType dtype);

// The weights of all groups. The list of an operator holds, for one group after the other, weight_ih, weight_hh,
// [bias_ih, bias_hh], [weight_hr]; or each of these for S groups at a time, stacked [S, ...].
struct Weights {
  int64_t stacked;                                  // S, or 0
  size_t per_group;                                 // entries of the list
  std::vector<const void*> ih, hh, b_ih, b_hh, hr;  // [D], of each group

  Weights(const std::vector<Tensor>& list, int64_t groups) {
    const int64_t count = static_cast<int64_t>(list.size());
    stacked = count > 0 && list[0].dim() == 3 ? list[0].size(0) : 0;
    STD_TORCH_CHECK(groups > 0 && (count == 0 || list[0].dim() != 3 || (stacked > 0 && groups % stacked == 0)),
                    "fastrnn: weights of ", stacked, " groups at a time do not make ", groups, " groups");
    const int64_t entries = groups / std::max<int64_t>(stacked, 1);
    STD_TORCH_CHECK(count % entries == 0 && count / entries >= 2 && count / entries <= 5, "fastrnn: ", count,
                    " weights are not 2 to 5 for each of ", entries, " groups");
    per_group = static_cast<size_t>(count / entries);
    for (const Tensor& t : list) tensors_.push_back(as_contiguous(t));
  }
  Weights(const Weights&) = delete;

  bool has_bias() const { return per_group >= 4; }
  bool projected() const { return per_group % 2 == 1; }
  // Groups of an entry of the list.
  int64_t members() const { return std::max<int64_t>(stacked, 1); }
  // The sizes of the first weight_ih (0) or weight_hh (1), of one group.
  Sizes first(size_t kind) const {
    Sizes sizes = sizes_of(tensors_[kind]);
    if (stacked > 0 && !sizes.empty()) sizes.erase(sizes.begin());
    return sizes;
  }

  void check_all(const ScanShape& s, int64_t G, int64_t I, ScalarType dtype, const Place& place) {
    for (size_t next = 0; next < tensors_.size();) {
      take(next, "weight_ih", {G * s.H, I}, dtype, place, ih);
      take(next, "weight_hh", {G * s.H, s.P}, dtype, place, hh);
      if (has_bias()) {
        take(next, "bias_ih", {G * s.H}, dtype, place, b_ih);
        take(next, "bias_hh", {G * s.H}, dtype, place, b_hh);
      }
      if (projected()) take(next, "weight_hr", {s.P, s.H}, dtype, place, hr);
    }
  }

  static const void* const* or_null(const std::vector<const void*>& arrays) {
    return arrays.empty() ? nullptr : arrays.data();
  }

 private:
  void take(size_t& next, const char* name, Sizes sizes, ScalarType dtype, const Place& place,
            std::vector<const void*>& arrays) {
    const Sizes own = sizes;
    if (stacked > 0) sizes.insert(sizes.begin(), stacked);
    const Tensor& t = tensors_[next++];
    check(t, name, sizes, dtype, place);
    int64_t bytes = item_size(dtype);
    for (const int64_t size : own) bytes *= size;
    for (int64_t i = 0; i < members(); ++i)
      arrays.push_back(static_cast<const char*>(t.const_data_ptr()) + static_cast<size_t>(i * bytes));
  }

  std::vector<Tensor> tensors_;
};

// What both operators learn from their arguments. Owns the row offsets that `shape` points to; the batch sizes are the
// caller's.
struct Problem {
  ScanShape shape;
  CellInfo cell;
  ScalarType dtype;
  int64_t I, M;   // M inputs [I] side by side in a row of data
  Sizes leading;  // [T, B] dense or [N] packed: the leading dimensions of input and output
  std::vector<int64_t> offsets;
  Weights weights;

  Problem(const Place& place, const std::string& cell_name, const Tensor& input, const std::vector<Tensor>& list,
          const OptionalTensor& h0, const OptionalTensor& batch_sizes, int64_t groups, int64_t direction,
          const OptionalTensor& resets = {})
      : weights(list, groups) {
    shape.cell = cell_of(cell_name);
    cell = kCells[static_cast<int>(shape.cell)];
    STD_TORCH_CHECK(direction >= 0 && direction <= 2, "fastrnn: direction must be 0, 1 or 2, got ", direction);
    STD_TORCH_CHECK(direction != 2 || groups % 2 == 0, "fastrnn: direction 2 needs an even number of groups, got ",
                    groups);
    shape.direction = static_cast<Direction>(direction), shape.D = groups;
    dtype = input.scalar_type();
    shape.dtype = dtype_of(dtype);
    const int64_t dims = batch_sizes ? 2 : 3;
    STD_TORCH_CHECK(input.dim() == dims, "fastrnn: the input must have ", dims, " dimensions, got ", input.dim());
    take_input(input.size(dims - 1));

    const Sizes weight_hh = weights.first(1);
    STD_TORCH_CHECK(weight_hh.size() == 2, "fastrnn: weight_hh must have 2 dimensions [G * H, P], got ",
                    weight_hh.size());
    shape.H = weight_hh[0] / cell.gates, shape.P = weight_hh[1];
    shape.projected = weights.projected();
    STD_TORCH_CHECK(shape.H > 0 && shape.P > 0, "fastrnn: weight_hh must not be empty, got ", text(weight_hh));
    STD_TORCH_CHECK(!shape.projected || cell.has_c, "fastrnn: weight_hr needs an LSTM, got ", cell_name);
    STD_TORCH_CHECK(shape.projected || shape.P == shape.H, "fastrnn: weight_hh must have shape [G * H, H], got ",
                    text(weight_hh));
    weights.check_all(shape, cell.gates, I, dtype, place);
    if (batch_sizes)
      take_batch_sizes(*batch_sizes, input.size(0), h0);
    else
      take_dense(input.size(0), input.size(1));
    STD_TORCH_CHECK(shape.T > 0, "fastrnn: Expected sequence length to be larger than 0 in RNN");
    if (resets) take_resets(*resets, place);
  }
  Problem(const Problem&) = delete;

  // One input for all groups, or one for each member of an ensemble, whose groups lie M apart.
  void take_input(int64_t width) {
    I = width, M = 1;
    const Sizes weight_ih = weights.first(0);
    const int64_t own = weight_ih.size() == 2 ? weight_ih[1] : 0;
    if (own == width || own == 0 || width == 0 || width % own != 0) return;  // what is wrong is said of weight_ih
    const int64_t groups = shape.direction == Direction::kBoth ? shape.D / 2 : shape.D;
    STD_TORCH_CHECK(groups % (width / own) == 0, "fastrnn: the input has ", width / own, " times the ", own,
                    " features of weight_ih, which does not divide the ", groups, " groups of a direction");
    I = own, M = width / own;
  }

  void take_dense(int64_t T, int64_t B) {
    STD_TORCH_CHECK(B == 0 || T <= INT64_MAX / B, "fastrnn: ", T, " steps of ", B, " rows are too many");
    leading = {T, B};
    shape.T = T, shape.B = B, shape.N = T * B;
    shape.batch_sizes = shape.offsets = nullptr;
  }

  void take_batch_sizes(const Tensor& batch_sizes, int64_t rows, const OptionalTensor& h0) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0 && batch_sizes.is_contiguous() &&
                        batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.device().type() == DeviceType::CPU,
                    "fastrnn: batch_sizes must be a contiguous int64 tensor [T] on the CPU, T > 0");
    check_storage(batch_sizes, "batch_sizes");
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

  void take_resets(const Tensor& resets, const Place& place) {
    check(resets, "resets", leading, ScalarType::Byte, place);
    if (shape.N == 0) return;
    shape.resets = static_cast<const uint8_t*>(resets.const_data_ptr());
    if (!place.is_cpu()) return;
    const uint8_t most = *std::max_element(shape.resets, shape.resets + shape.N);
    STD_TORCH_CHECK(most <= kRestart, "fastrnn: resets must hold 0, 1 or 2, got ", static_cast<int>(most));
  }

  Sizes over_time(int64_t width) const { return {shape.D, shape.N, width}; }
  Sizes state(int64_t width) const { return {shape.D, shape.B, width}; }
  Sizes entering_state(int64_t width) const { return {shape.D, shape.K(), width}; }
  Sizes output() const {
    Sizes sizes = leading;
    sizes.push_back(shape.D * shape.P);
    return sizes;
  }
  ScalarType compute() const { return compute_dtype(dtype); }
};

}  // namespace fastrnn
