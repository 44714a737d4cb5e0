// What the forward and the backward pass of scan_cuda.h have in common: memory, weights as batches, the rows of a step,
// and steps that run one by one or as programs.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "gemm.h"
#include "grid_setup.h"
#include "plan.h"
#include "program.h"
#include "scan_cuda.h"

namespace fastrnn::cuda {

// The operands of a step's products for some rows of a batch: product = state weight, inner_product = inner projection.
struct Operands {
  Tensor product, state, weight, inner_product, inner, projection;
};

// Derived has
//   in_order(const Operands&, bool projected, boundary, cell, projection)
//                      puts the products of a step on the queue, and calls what it is given for the kernels
//   oriented(weight)   a weight as the product takes it
template <class Derived, class Table>
class StepPass {
 protected:
  StepPass(const ScanShape& shape, const PassKernels<Table>& pass_kernels, const Context& context, bool is_backward,
           bool has_dcells = false)
      : s(shape),
        kernels(pass_kernels),
        on(context),
        storage(storage_of(shape.dtype)),
        compute(compute_dtype(storage)),
        G(kCells[static_cast<int>(shape.cell)].gates),
        R(kCells[static_cast<int>(shape.cell)].own),
        has_c(kCells[static_cast<int>(shape.cell)].has_c) {
    fill(now.cell);
    fill(now.projection);
    check_report(on.report(false));
    plan = {s.cell, s.T, s.B, 0, s.H, s.D, item_size(storage), item_size(compute), s.P};
    plan.gpu = on.gpu, plan.is_backward = is_backward;
    plan.has_resets = s.resets, plan.has_dcells = has_dcells;
    plan.tf32 = s.dtype == Dtype::kFloat && wants_tf32() && on.recorder && on.recorder->allows_tf32();
    const std::string reason = why_not_asked(on.asked.kernel, plan);
    STD_TORCH_CHECK(reason.empty(), "fastrnn: FASTRNN_CUDA_KERNEL=", on.asked.kernel, " cannot be met: ", reason);
    kernel = choose_kernel(on.asked.kernel, on.asked.persistent, plan);
    STD_TORCH_CHECK(kernel != "step-graph" || on.recorder,
                    "fastrnn: FASTRNN_CUDA_KERNEL=step-graph cannot be met: nothing here records graphs");
  }

  template <class Args>
  void fill(Args& args) const {
    args.cell = s.cell, args.dtype = s.dtype, args.projected = s.projected, args.N = s.N, args.D = s.D, args.B = s.B;
    args.H = s.H, args.P = s.P, args.direction = s.direction;
  }

  // Memory of a pass: [rows, width], for each group.
  Tensor make(int64_t rows, int64_t width, ScalarType dtype) const { return on.device.make({s.D, rows, width}, dtype); }

  // Takes the memory of the steps that was kept, or makes it; state and inner are as wide as said, the products as
  // the weights [rows, columns] have it, which are copied where they do not stand as one batch, or are kept.
  void take_steps(const char* pass, int units, const void* const* weights, const void* const* projections,
                  int64_t state_width, int64_t product_width, int64_t inner_width, int64_t inner_product_width) {
    if (kernel == "step-graph" && on.recorder->is_ready()) {
      key_ = std::string(pass) + on.recorder->product_settings();
      for (int64_t part :
           {int64_t(s.cell), int64_t(s.dtype), int64_t(s.projected), s.B, s.H, s.P, s.D, int64_t(s.direction),
            int64_t(units), int64_t(on.device.place().index), int64_t(reinterpret_cast<intptr_t>(on.queue))})
        key_ += " " + std::to_string(part);
      memory_ = take_memory(key_);
    }
    const bool is_new = !memory_;
    if (is_new) {
      memory_ = std::make_unique<StepMemory>();
      memory_->state = make(s.B, state_width, storage), memory_->product = make(s.B, product_width, compute);
      if (s.projected) {
        memory_->inner = make(s.B, inner_width, compute);
        memory_->inner_product = make(s.B, inner_product_width, compute);
      }
      STD_TORCH_CHECK(key_.empty() || memory_->bytes() <= kMostProgramBytes / 4,
                      "fastrnn: FASTRNN_CUDA_KERNEL=", kernel, " cannot be met: the products of a step with B=", s.B,
                      " would keep ", memory_->bytes() >> 20, " MiB, more than ", kMostProgramBytes >> 22, " MiB");
      if (!key_.empty()) memory_->table = on.device.make({static_cast<int64_t>(sizeof(Table))}, ScalarType::Byte);
    }
    fill_batch(memory_->weight, weights, G * s.H, s.P, storage);
    if (s.projected) fill_batch(memory_->projection, projections, s.P, s.H, compute);
  }
  void keep_steps() {
    if (!key_.empty()) give_back_memory(std::exchange(key_, ""), std::move(memory_));
  }
  ~StepPass() {
    if (!key_.empty()) give_back_memory(key_, nullptr);  // the pass has failed
  }
  const StepMemory& steps() const { return *memory_; }

  // A step, now. `boundary` is called where in_order says.
  template <class Boundary>
  void run_now(const StepRows (&rows)[2], int64_t count, Boundary boundary) {
    if (count != last_count_) last_operands_ = operands(count), last_count_ = count;
    std::copy(rows, rows + 2, now.cell.rows);
    std::copy(rows, rows + 2, now.projection.rows);
    Derived::in_order(
        last_operands_, s.projected, boundary, [&] { kernels.cell(now, on.queue); },
        [&] { kernels.projection(now, on.queue); });
  }

  // A step, now or with others that follow it. `count`: the most rows of the operands that any group needs.
  void run_step(const StepRows (&rows)[2], int64_t count) {
    if (key_.empty()) return run_now(rows, count, [] {});
    std::copy(rows, rows + 2, now.rows[waiting_]);
    counts_[waiting_] = count;
    if (++waiting_ == kProgramSteps) run_waiting();
  }

  // Runs what run_step has not yet.
  void run_waiting() {
    const int count = waiting_;
    waiting_ = 0;
    if (count < kFewSteps) {
      for (int i = 0; i < count; ++i) run_now(now.rows[i], counts_[i], [] {});
      return;
    }
    Table* const table = static_cast<Table*>(memory_->table.mutable_data_ptr());
    for (int i = count; i < kProgramSteps; ++i) now.rows[i][0] = now.rows[i][1] = StepRows{};  // nothing to do
    if (!memory_->program) {
      // What is recorded is also run, over a table without rows.
      Table idle = now;
      for (auto& rows : idle.rows) rows[0] = rows[1] = StepRows{};
      kernels.write(idle, table, on.queue);
      memory_->program = on.recorder->record(program_steps(table));
    }
    kernels.write(now, table, on.queue);
    memory_->program->run();
  }

  // Whether groups run forward (0), in reverse (1).
  bool has_order(int reverse) const {
    return s.direction == Direction::kBoth || (s.direction == Direction::kReverse) == (reverse == 1);
  }
  int64_t time_of(int64_t step, int reverse) const { return reverse ? s.T - 1 - step : step; }
  int64_t count_of(int64_t step, int reverse) const {
    return step < 0 || step >= s.T || !has_order(reverse) ? 0 : s.active(time_of(step, reverse));
  }
  int64_t most_rows(int64_t step) const { return std::max(count_of(step, 0), count_of(step, 1)); }
  StepRows rows_at(int64_t step, int reverse) const {
    StepRows rows{};
    rows.count = count_of(step, reverse), rows.count_next = count_of(step + 1, reverse);
    rows.count_before = count_of(step - 1, reverse);
    if (rows.count > 0) rows.row = s.row(time_of(step, reverse), 0);
    if (rows.count_before > 0) rows.row_before = s.row(time_of(step - 1, reverse), 0);
    return rows;
  }

  void fill_boundary(BoundaryArgs& args, const void* h0, const void* c0) const {
    fill(args);
    args.resets = s.resets, args.K = s.K(), args.h0 = h0, args.c0 = c0;
  }

  const ScanShape& s;
  const PassKernels<Table>& kernels;
  const Context& on;
  const ScalarType storage, compute;
  const int64_t G, R;
  const bool has_c;
  PlanShape plan;
  std::string kernel;
  Table now{};  // the arguments of the kernels; rows: of steps that wait

  // The weights [rows, columns] of all groups as one batch, of one group a matrix.
  void fill_batch(Tensor& batch, const void* const* weights, int64_t rows, int64_t columns, ScalarType dtype) const {
    const auto matrix = [&](int64_t d) {
      return view(Array(const_cast<void*>(weights[d]), storage), 0, {rows, columns}, {columns, 1}, on.device.place());
    };
    if (s.D == 1 && dtype == storage && key_.empty()) {
      batch = matrix(0);
      return;
    }
    if (!batch.defined()) batch = s.D == 1 ? on.device.make({rows, columns}, dtype) : make(rows, columns, dtype);
    for (int64_t d = 0; d < s.D; ++d) {
      Tensor target = view(batch, d * rows * columns, {rows, columns}, {columns, 1}, on.device.place());
      torch::stable::copy_(target, matrix(d));
    }
  }

  // Which rows a step has, for kernels that run several: in device memory, where they differ.
  Steps steps_on_device(Tensor& offsets) const {
    Steps found{s.T, s.B, nullptr};
    if (!s.offsets) return found;
    offsets = on.device.make({(s.T + 1) * 8}, ScalarType::Byte);
    auto* const target = static_cast<int64_t*>(offsets.mutable_data_ptr());
    for (int64_t first = 0; first <= s.T; first += OffsetsArgs::kMost) {
      OffsetsArgs args{};
      args.count = std::min<int64_t>(OffsetsArgs::kMost, s.T + 1 - first), args.target = target + first;
      std::copy(s.offsets + first, s.offsets + first + args.count, args.values);
      on.block.offsets(args, on.queue);
    }
    found.offsets = target;
    return found;
  }

 private:
  // Whether it matters what torch allows.
  bool wants_tf32() const { return on.asked.kernel == "persistent-grid" || on.asked.persistent; }

  static ScalarType storage_of(Dtype dtype) {
    return dtype == Dtype::kFloat      ? ScalarType::Float
           : dtype == Dtype::kDouble   ? ScalarType::Double
           : dtype == Dtype::kBFloat16 ? ScalarType::BFloat16
                                       : ScalarType::Half;
  }

  // Rows [0, count) of each group of memory; a single group is a matrix.
  Tensor rows_of(const Tensor& array, int64_t count) const {
    const int64_t rows = array.size(1), width = array.size(2);
    if (s.D == 1) return view(array, 0, {count, width}, {width, 1}, on.device.place());
    return view(array, 0, {s.D, count, width}, {rows * width, width, 1}, on.device.place());
  }
  Operands operands(int64_t count) const {
    Operands found;
    found.product = rows_of(memory_->product, count), found.state = rows_of(memory_->state, count);
    found.weight = Derived::oriented(memory_->weight);
    if (!s.projected) return found;
    found.inner_product = rows_of(memory_->inner_product, count), found.inner = rows_of(memory_->inner, count);
    found.projection = Derived::oriented(memory_->projection);
    return found;
  }

  Recorder::Steps program_steps(const Table* table) const {
    // What is captured outlives the pass.
    return [all = operands(s.B), like = now, &kernels = kernels, table](Queue queue) {
      for (int step = 0; step < kProgramSteps; ++step)
        Derived::in_order(
            all, like.cell.projected, [] {}, [&] { kernels.cell_of(like, table, step, queue); },
            [&] { kernels.projection_of(like, table, step, queue); });
    };
  }

  std::string key_;  // empty: nothing is kept, steps run one by one
  std::unique_ptr<StepMemory> memory_;
  int waiting_ = 0;
  int64_t counts_[kProgramSteps] = {};
  int64_t last_count_ = -1;
  Operands last_operands_;
};

}  // namespace fastrnn::cuda
