#include "step_pass.h"

namespace fastrnn::cuda {
namespace {

class BackwardPass : StepPass<BackwardPass, BackwardTable> {
 public:
  BackwardPass(const ScanBackwardArgs& args, const Context& context)
      : StepPass(args, context.step.backward, context, true), a(args) {}

  void run() {
    BackwardArgs& cell = now.cell;
    cell.doutput = a.doutput, cell.dh_n = a.dh_n, cell.dc_n = a.dc_n, cell.output = a.output, cell.cells = a.cells;
    cell.saved = a.saved, cell.h0 = a.h0, cell.c0 = a.c0, cell.dgates = a.dgates, cell.drecurrent = a.drecurrent;
    cell.unprojected = a.unprojected, cell.before = a.before, cell.dh0 = a.dh0, cell.dc0 = a.dc0;
    kernel == "persistent-grid" ? run_grid() : kernel == "persistent-block" ? run_blocks() : run_steps();
  }

  // Rows beyond those of the step, and in the first step all, are multiplied too: what they hold is read by nobody.
  template <class Cell, class Projection>
  static void in_order(const Operands& of, bool projected, Cell cell, Projection projection) {
    gemm(of.product, of.state, of.weight);
    if (projected) {
      projection();
      gemm(of.inner_product, of.inner, of.projection);
    }
    cell();
  }
  static const Tensor& oriented(const Tensor& weight) { return weight; }

 private:
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

    for (int64_t t = a.T - 1; t >= -1; --t) {  // -1: the gradients of the initial states
      if (t < 0 && !a.dh0 && !a.dc0) break;
      const StepRows rows[2] = {rows_at(t, 0), rows_at(t, 1)};
      run_step(rows, std::max(most_rows(t + 1), most_rows(t)));
    }
    run_waiting();
    keep_steps();
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

  StepRows rows_at(int64_t step, int reverse) const {
    StepRows rows{};
    rows.count = count_of(step, reverse), rows.count_next = count_of(step + 1, reverse);
    rows.count_before = count_of(step - 1, reverse);
    if (rows.count > 0) rows.row = a.row(time_of(step, reverse), 0);
    if (rows.count_before > 0) rows.row_before = a.row(time_of(step - 1, reverse), 0);
    return rows;
  }

  const ScanBackwardArgs& a;
};

}  // namespace

void scan(const ScanBackwardArgs& args, const Context& context) {
  if (args.N > 0) BackwardPass(args, context).run();
}

}  // namespace fastrnn::cuda
