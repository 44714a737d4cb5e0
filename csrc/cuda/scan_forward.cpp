#include "step_pass.h"

namespace fastrnn::cuda {
namespace {

class ForwardPass : StepPass<ForwardPass, ForwardTable> {
 public:
  ForwardPass(const ScanArgs& args, const Context& context)
      : StepPass(args, context.step.forward, context, false), a(args) {}

  void run() {
    const Tensor c = has_c ? make(a.B, a.H, compute) : Tensor();
    const Tensor bias = a.bias_ih ? make(G + R, a.H, compute) : Tensor();
    prepare_bias(bias);
    room_ = chunk_rows(a.N, a.B, a.D * G * a.H * item_size(compute));
    gates_ = make(room_, G * a.H, compute);
    ForwardArgs& cell = now.cell;
    cell.gates = gates_.mutable_data_ptr(), cell.gates_rows = room_;
    cell.bias = a.bias_ih ? bias.mutable_data_ptr() : nullptr, cell.c = has_c ? c.mutable_data_ptr() : nullptr;
    cell.output = a.output, cell.h_n = a.h_n, cell.c_n = a.c_n, cell.cells = a.cells, cell.saved = a.saved;
    kernel == "persistent-grid" ? run_grid() : kernel == "persistent-block" ? run_blocks() : run_steps();
  }

  template <class Boundary, class Cell, class Projection>
  static void in_order(const Operands& of, bool projected, Boundary boundary, Cell cell, Projection projection) {
    boundary();
    gemm(of.product, of.state, of.weight);
    cell();
    if (!projected) return;
    gemm(of.inner_product, of.inner, of.projection);
    projection();
  }
  static Tensor oriented(const Tensor& weight) {
    return torch::stable::transpose(weight, weight.dim() - 2, weight.dim() - 1);
  }

 private:
  // A product and a kernel per step.
  void run_steps() {
    take_steps("forward", units_per_thread(a.H, item_size(compute)), a.weight_hh, a.weight_hr, a.P, G * a.H, a.H, a.P);
    ForwardArgs& cell = now.cell;
    cell.product = steps().product.mutable_data_ptr(), cell.product_rows = a.B;
    cell.h = steps().state.mutable_data_ptr(), cell.m = a.projected ? steps().inner.mutable_data_ptr() : nullptr;
    ProjectArgs& projection = now.projection;
    projection.product = a.projected ? steps().inner_product.mutable_data_ptr() : nullptr;
    projection.product_rows = a.B, projection.h = cell.h, projection.output = a.output, projection.h_n = a.h_n;
    ForwardBoundaryArgs boundary{};
    if (a.resets) {
      fill_boundary(boundary, a.h0, a.c0);
      boundary.h = cell.h, boundary.c = cell.c;
    } else {
      enter();
    }
    int64_t chunk_end = 0;
    for (int64_t t = 0; t < a.T; ++t) {
      if (t == chunk_end) {
        run_waiting();  // before its input products are written over
        chunk_end = input_products(t);
      }
      StepRows rows[2] = {};
      for (int reverse : {0, 1}) {
        rows[reverse] = rows_at(t, reverse);
        rows[reverse].gates_row = rows[reverse].row - chunk_begin_[reverse];
      }
      if (!a.resets) {
        run_step(rows, most_rows(t));
        continue;
      }
      std::copy(rows, rows + 2, boundary.rows);
      run_now(rows, most_rows(t), [&] { on.step.forward_boundary(boundary, on.queue); });
    }
    run_waiting();
    keep_steps();
  }

  // A kernel for the steps of a chunk.
  void run_blocks() {
    const Tensor h = make(a.B, a.P, storage);
    Tensor weight, offsets;
    fill_batch(weight, a.weight_hh, G * a.H, a.H, storage);
    now.cell.h = h.mutable_data_ptr();
    enter();
    BlockForwardArgs args{};
    args.cell = now.cell, args.steps = steps_on_device(offsets), args.weight_hh = weight.const_data_ptr();
    args.pairs = a.H % 2 == 0 && reinterpret_cast<uintptr_t>(args.weight_hh) % 4 == 0;
    for (int64_t first = 0; first < a.T; first = args.end) {
      args.first = first, args.end = input_products(first);
      std::copy(chunk_begin_, chunk_begin_ + 2, args.gates_begin);
      on.block.forward(args, on.queue);
    }
  }

  // Kernels of all multiprocessors for the steps of a chunk.
  void run_grid() {
    const Tensor h = make(a.B, a.P, storage);
    Tensor offsets;
    now.cell.h = h.mutable_data_ptr();
    enter();
    GridSetup setup(plan, on, a.dtype, a.weight_hh, false);
    GridForwardArgs args{};
    args.cell = now.cell, args.steps = steps_on_device(offsets);
    for (int64_t first = 0; first < a.T; first = args.end) {
      args.first = first, args.end = input_products(first);
      std::copy(chunk_begin_, chunk_begin_ + 2, args.gates_begin);
      setup.launch(args, args.end - first + 1, on.grid.forward);
    }
  }

  void enter() {
    EnterArgs args{};
    fill(args);
    args.h0 = a.h0, args.c0 = a.c0, args.h = now.cell.h, args.c = now.cell.c;
    on.step.enter(args, on.queue);
  }

  void prepare_bias(const Tensor& bias) {
    if (!a.bias_ih) return;
    for (int64_t d = 0; d < a.D; ++d) {
      BiasArgs args{};
      fill(args);
      args.bias_ih = a.bias_ih[d], args.bias_hh = a.bias_hh[d];
      args.bias = view(bias, d * (G + R) * a.H, {(G + R) * a.H}, {1}, on.device.place()).mutable_data_ptr();
      on.step.bias(args, on.queue);
    }
  }

  // gates = W_ih x of the steps from `first` on whose rows find room; returns the step behind the last of them.
  int64_t input_products(int64_t first) {
    int64_t end = first, rows[2] = {0, 0};
    for (; end < a.T; ++end) {
      const int64_t more[2] = {rows[0] + count_of(end, 0), rows[1] + count_of(end, 1)};
      if (std::max(more[0], more[1]) > room_) break;
      rows[0] = more[0], rows[1] = more[1];
    }
    for (int reverse : {0, 1})  // in memory a chunk of reversed steps begins with its last one
      if (has_order(reverse)) chunk_begin_[reverse] = a.row(time_of(reverse ? end - 1 : first, reverse), 0);
    const Place& place = on.device.place();
    for (int64_t d = 0; d < a.D; ++d) {
      const int reverse = a.reversed(d) ? 1 : 0;
      const Tensor target = view(gates_, d * room_ * G * a.H, {rows[reverse], G * a.H}, {G * a.H, 1}, place);
      if (a.I == 0) {
        Tensor zeros = target;
        torch::stable::zero_(zeros);
        continue;
      }
      const Array input(const_cast<void*>(a.input), storage), weight(const_cast<void*>(a.weight_ih[d]), storage);
      const int64_t first_input = (chunk_begin_[reverse] * a.M + d % a.M) * a.I;
      gemm(target, view(input, first_input, {rows[reverse], a.I}, {a.M * a.I, 1}, place),
           view(weight, 0, {a.I, G * a.H}, {1, a.I}, place));
    }
    return end;
  }

  const ScanArgs& a;
  Tensor gates_;      // input products of a chunk of steps
  int64_t room_ = 0;  // rows of it
  int64_t chunk_begin_[2] = {0, 0};
};

}  // namespace

void scan(const ScanArgs& args, const Context& context) {
  if (args.N > 0) ForwardPass(args, context).run();
}

}  // namespace fastrnn::cuda
