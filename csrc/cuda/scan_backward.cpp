#include "step_pass.h"

namespace fastrnn::cuda {
namespace {

class BackwardPass : StepPass<BackwardPass, BackwardTable> {
 public:
  BackwardPass(const ScanBackwardArgs& args, const Context& context)
      : StepPass(args, has_boundaries(args) ? context.step.backward_of_panels : context.step.backward, context, true,
                 args.dcells != nullptr),
        a(args) {}

  void run() {
    BackwardArgs& cell = now.cell;
    cell.doutput = a.doutput, cell.dh_n = a.dh_n, cell.dc_n = a.dc_n, cell.output = a.output, cell.cells = a.cells;
    cell.saved = a.saved, cell.h0 = a.h0, cell.c0 = a.c0, cell.dgates = a.dgates, cell.drecurrent = a.drecurrent;
    cell.unprojected = a.unprojected, cell.before = a.before, cell.dh0 = a.dh0, cell.dc0 = a.dc0;
    kernel == "persistent-grid" ? run_grid() : kernel == "persistent-block" ? run_blocks() : run_steps();
  }

  // Rows beyond those of the step, and in the first step all, are multiplied too: what they hold is read by nobody.
  template <class Boundary, class Cell, class Projection>
  static void in_order(const Operands& of, bool projected, Boundary boundary, Cell cell, Projection projection) {
    gemm(of.product, of.state, of.weight);
    boundary();
    if (projected) {
      projection();
      gemm(of.inner_product, of.inner, of.projection);
    }
    cell();
  }
  static const Tensor& oriented(const Tensor& weight) { return weight; }

 private:
  // Whether something lies between the steps.
  static bool has_boundaries(const ScanBackwardArgs& args) { return args.resets || args.dcells; }

  // A product and a kernel per step.
  void run_steps() {
    BackwardArgs& cell = now.cell;
    take_steps("backward", on.step.backward_units(cell), a.weight_hh, a.weight_hr, G * a.H, a.P, a.P, a.H);
    const Tensor dh = make(a.B, a.H, compute), dc = has_c ? make(a.B, a.H, compute) : Tensor();
    cell.product = (a.projected ? steps().inner_product : steps().product).mutable_data_ptr(), cell.product_rows = a.B;
    cell.dr = steps().state.mutable_data_ptr(), cell.dh = dh.mutable_data_ptr();
    cell.dc = has_c ? dc.mutable_data_ptr() : nullptr;
    BackwardProjectArgs& projection = now.projection;
    projection.product = steps().product.mutable_data_ptr(), projection.product_rows = projection.dp_rows = a.B;
    projection.doutput = a.doutput, projection.dh_n = a.dh_n, projection.output = a.output, projection.h0 = a.h0;
    projection.dp = a.projected ? steps().inner.mutable_data_ptr() : nullptr;
    projection.dprojected = a.dprojected, projection.before = a.before, projection.dh0 = a.dh0;

    if (has_boundaries(a)) return run_with_boundaries();
    for (int64_t t = a.T - 1; t >= -1; --t) {  // -1: the gradients of the initial states
      if (t < 0 && !a.dh0 && !a.dc0) break;
      const StepRows rows[2] = {rows_at(t, 0), rows_at(t, 1)};
      run_step(rows, std::max(most_rows(t + 1), most_rows(t)));
    }
    run_waiting();
    keep_steps();
  }

  // The same with a kernel at the boundary of each step, which keeps the sums of the gradients of initial states.
  void run_with_boundaries() {
    BackwardArgs& cell = now.cell;
    const Tensor h_before = !has_c || a.before ? make(a.B, a.P, storage) : Tensor();
    const Tensor c_before = has_c ? make(a.B, a.H, compute) : Tensor();
    const Tensor dh_sum = zero_sum(a.dh0, a.P), dc_sum = zero_sum(a.dc0, a.H);
    BackwardBoundaryArgs args{};
    fill_boundary(args, a.h0, a.c0);
    args.dh_n = a.dh_n, args.dc_n = a.dc_n, args.dcells = a.dcells, args.output = a.output, args.cells = a.cells;
    args.product = steps().product.mutable_data_ptr(), args.product_rows = a.B;
    args.dh = a.projected ? nullptr : cell.dh, args.dc = cell.dc;
    args.h_before = pointer(h_before), args.c_before = pointer(c_before);
    args.dh_sum = pointer(dh_sum), args.dc_sum = pointer(dc_sum);
    cell.h0 = now.projection.h0 = args.h_before, cell.c_before = args.c_before, cell.c0 = nullptr;
    cell.dh0 = cell.dc0 = now.projection.dh0 = nullptr;

    for (int64_t t = a.T - 1; t >= -1; --t) {
      if (t < 0 && !a.dh0 && !a.dc0) break;
      StepRows rows[2];
      for (int reverse : {0, 1}) {
        args.rows[reverse] = rows[reverse] = rows_at(t, reverse), args.behind[reverse] = rows_at(t + 1, reverse);
        rows[reverse].count_next = rows[reverse].count, rows[reverse].count_before = 0;  // as the kernel takes them
      }
      run_now(rows, args.most_rows(), [&] { on.step.backward_boundary(args, on.queue); });
    }
    finish_sum(dh_sum, a.dh0);
    finish_sum(dc_sum, a.dc0);
  }

  static void* pointer(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

  // Zeros [D, K, width] for a gradient in the dtype that computes: in its own place where that is its dtype.
  Tensor zero_sum(void* gradient, int64_t width) const {
    if (!gradient) return {};
    const int64_t K = a.K();
    Tensor sum = storage == compute
                     ? view(Array(gradient, storage), 0, {a.D, K, width}, {K * width, width, 1}, on.device.place())
                     : make(K, width, compute);
    torch::stable::zero_(sum);
    return sum;
  }
  void finish_sum(const Tensor& sum, void* gradient) const {
    if (gradient && storage != compute)
      on.step.narrow({a.dtype, sum.const_data_ptr(), gradient, sum.numel()}, on.queue);
  }

  // A kernel for all steps.
  void run_blocks() {
    Tensor weight, offsets;
    fill_batch(weight, a.weight_hh, G * a.H, a.H, storage);
    BlockBackwardArgs args{};
    args.cell = now.cell, args.steps = steps_on_device(offsets), args.weight_hh = weight.const_data_ptr();
    args.pairs = a.H % 2 == 0 && are_aligned(now.cell, 2);
    on.block.backward(args, on.queue);
  }

  // Kernels of all multiprocessors for all steps.
  void run_grid() {
    const Tensor dh = make(a.B, a.H, compute), dc = has_c ? make(a.B, a.H, compute) : Tensor();
    Tensor offsets;
    now.cell.dh = dh.mutable_data_ptr(), now.cell.dc = has_c ? dc.mutable_data_ptr() : nullptr;
    GridBackwardArgs args{};
    args.cell = now.cell, args.steps = steps_on_device(offsets);
    GridSetup(plan, on, a.dtype, a.weight_hh, true).launch(args, a.T, on.grid.backward);
  }

  const ScanBackwardArgs& a;
};

}  // namespace

void scan(const ScanBackwardArgs& args, const Context& context) {
  if (args.N > 0) BackwardPass(args, context).run();
}

}  // namespace fastrnn::cuda
