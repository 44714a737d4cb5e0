#include "scan_step.h"

#include <algorithm>

#include "gemm.h"
#include "plan.h"

namespace fastrnn::cuda {
namespace {

ScalarType storage_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat:
      return ScalarType::Float;
    case Dtype::kDouble:
      return ScalarType::Double;
    case Dtype::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Half;
  }
}

// What both passes have: the shape for kernels, memory, weights as batches, the rows of a step.
class Pass {
 protected:
  Pass(const ScanShape& shape, const Context& context)
      : s(shape),
        on(context),
        storage(storage_of(shape.dtype)),
        compute(compute_dtype(storage)),
        G(kCells[static_cast<int>(shape.cell)].gates),
        R(kCells[static_cast<int>(shape.cell)].own),
        has_c(kCells[static_cast<int>(shape.cell)].has_c) {}

  template <class Args>
  void fill(Args& args) const {
    args.cell = s.cell, args.dtype = s.dtype, args.projected = s.projected, args.N = s.N, args.D = s.D, args.B = s.B;
    args.H = s.H, args.P = s.P, args.direction = s.direction;
  }

  // Memory of a pass: [rows, width], for each group.
  Tensor make(int64_t rows, int64_t width, ScalarType dtype) const { return on.device.make({s.D, rows, width}, dtype); }

  // Rows [0, count) of each group of such memory; a single group is a matrix.
  Tensor rows_of(const Tensor& array, int64_t count) const {
    const int64_t rows = array.size(1), width = array.size(2);
    if (s.D == 1) return view(array, 0, {count, width}, {width, 1}, on.device.place());
    return view(array, 0, {s.D, count, width}, {rows * width, width, 1}, on.device.place());
  }

  // The weights [rows, columns] of all groups as one batch (of one group a matrix), and transposed.
  Tensor batch(const void* const* weights, int64_t rows, int64_t columns, ScalarType dtype) const {
    const auto matrix = [&](int64_t d) {
      return view(Array(const_cast<void*>(weights[d]), storage), 0, {rows, columns}, {columns, 1}, on.device.place());
    };
    if (s.D == 1 && dtype == storage) return matrix(0);
    const Tensor all = s.D == 1 ? on.device.make({rows, columns}, dtype) : make(rows, columns, dtype);
    for (int64_t d = 0; d < s.D; ++d) {
      Tensor target = view(all, d * rows * columns, {rows, columns}, {columns, 1}, on.device.place());
      torch::stable::copy_(target, matrix(d));
    }
    return all;
  }
  static Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }

  // Whether groups run forward (0), in reverse (1).
  bool has_order(int reverse) const {
    return s.direction == Direction::kBoth || (s.direction == Direction::kReverse) == (reverse == 1);
  }
  int64_t time_of(int64_t step, int reverse) const { return reverse ? s.T - 1 - step : step; }
  int64_t count_of(int64_t step, int reverse) const {
    return step < 0 || step >= s.T || !has_order(reverse) ? 0 : s.active(time_of(step, reverse));
  }
  int64_t most_rows(int64_t step) const { return std::max(count_of(step, 0), count_of(step, 1)); }

  const ScanShape& s;
  const Context& on;
  const ScalarType storage, compute;
  const int64_t G, R;
  const bool has_c;
};

class ForwardPass : Pass {
 public:
  ForwardPass(const ScanArgs& args, const Context& context) : Pass(args, context), a(args) {}

  void run() {
    const Tensor weight_hh = batch(a.weight_hh, G * a.H, a.P, storage), hh = transposed(weight_hh);
    const Tensor weight_hr = a.projected ? batch(a.weight_hr, a.P, a.H, compute) : Tensor();
    const Tensor h = make(a.B, a.P, storage), product = make(a.B, G * a.H, compute);
    const Tensor c = has_c ? make(a.B, a.H, compute) : Tensor();
    const Tensor m = a.projected ? make(a.B, a.H, compute) : Tensor();
    const Tensor projected = a.projected ? make(a.B, a.P, compute) : Tensor();
    const Tensor bias = a.bias_ih ? make(G + R, a.H, compute) : Tensor();
    enter(h, c);
    prepare_bias(bias);

    ForwardArgs step{};
    fill(step);
    step.product = product.mutable_data_ptr(), step.product_rows = a.B;
    step.bias = a.bias_ih ? bias.mutable_data_ptr() : nullptr;
    step.h = h.mutable_data_ptr(), step.c = has_c ? c.mutable_data_ptr() : nullptr;
    step.m = a.projected ? m.mutable_data_ptr() : nullptr;
    step.output = a.output, step.h_n = a.h_n, step.c_n = a.c_n, step.cells = a.cells, step.saved = a.saved;

    const int64_t room = chunk_rows(a.N, a.B, a.D * G * a.H * item_size(compute));
    const Tensor gates = make(room, G * a.H, compute);
    step.gates = gates.mutable_data_ptr(), step.gates_rows = room;
    int64_t chunk_end = 0, last_count = -1;
    Tensor h_rows, product_rows, m_rows, projected_rows;
    for (int64_t t = 0; t < a.T; ++t) {
      if (t == chunk_end) chunk_end = input_products(t, room, gates);
      for (int reverse : {0, 1}) {
        StepRows& rows = step.rows[reverse];
        rows.row = has_order(reverse) ? a.row(time_of(t, reverse), 0) : 0;
        rows.count = count_of(t, reverse), rows.count_next = count_of(t + 1, reverse);
        rows.gates_row = rows.row - chunk_begin_[reverse];
      }
      if (const int64_t count = most_rows(t); count != last_count) {
        last_count = count;
        h_rows = rows_of(h, count), product_rows = rows_of(product, count);
        if (a.projected) m_rows = rows_of(m, count), projected_rows = rows_of(projected, count);
      }
      gemm(product_rows, h_rows, hh);
      on.kernels.forward(step, on.queue);
      if (a.projected) {
        gemm(projected_rows, m_rows, transposed(weight_hr));
        project(step, projected, h);
      }
    }
  }

 private:
  void enter(const Tensor& h, const Tensor& c) {
    EnterArgs args{};
    fill(args);
    args.h0 = a.h0, args.c0 = a.c0, args.h = h.mutable_data_ptr(), args.c = has_c ? c.mutable_data_ptr() : nullptr;
    on.kernels.enter(args, on.queue);
  }

  void prepare_bias(const Tensor& bias) {
    if (!a.bias_ih) return;
    for (int64_t d = 0; d < a.D; ++d) {
      BiasArgs args{};
      fill(args);
      args.bias_ih = a.bias_ih[d], args.bias_hh = a.bias_hh[d];
      args.bias = view(bias, d * (G + R) * a.H, {(G + R) * a.H}, {1}, on.device.place()).mutable_data_ptr();
      on.kernels.bias(args, on.queue);
    }
  }

  void project(const ForwardArgs& step, const Tensor& projected, const Tensor& h) {
    ProjectArgs args{};
    fill(args);
    args.rows[0] = step.rows[0], args.rows[1] = step.rows[1];
    args.product = projected.mutable_data_ptr(), args.product_rows = a.B;
    args.h = h.mutable_data_ptr(), args.output = a.output, args.h_n = a.h_n;
    on.kernels.project(args, on.queue);
  }

  // gates = W_ih x of the steps from `first` on whose rows find room; returns the step behind the last of them.
  int64_t input_products(int64_t first, int64_t room, const Tensor& gates) {
    int64_t end = first, rows[2] = {0, 0};
    for (; end < a.T; ++end) {
      const int64_t more[2] = {rows[0] + count_of(end, 0), rows[1] + count_of(end, 1)};
      if (std::max(more[0], more[1]) > room) break;
      rows[0] = more[0], rows[1] = more[1];
    }
    for (int reverse : {0, 1})  // in memory a chunk of reversed steps begins with its last one
      if (has_order(reverse)) chunk_begin_[reverse] = a.row(time_of(reverse ? end - 1 : first, reverse), 0);
    const Place& place = on.device.place();
    for (int64_t d = 0; d < a.D; ++d) {
      const int reverse = a.reversed(d) ? 1 : 0;
      const Tensor target = view(gates, d * room * G * a.H, {rows[reverse], G * a.H}, {G * a.H, 1}, place);
      if (a.I == 0) {
        Tensor zeros = target;
        torch::stable::zero_(zeros);
        continue;
      }
      const Array input(const_cast<void*>(a.input), storage), weight(const_cast<void*>(a.weight_ih[d]), storage);
      gemm(target, view(input, chunk_begin_[reverse] * a.I, {rows[reverse], a.I}, {a.I, 1}, place),
           view(weight, 0, {a.I, G * a.H}, {1, a.I}, place));
    }
    return end;
  }

  const ScanArgs& a;
  int64_t chunk_begin_[2] = {0, 0};
};

class BackwardPass : Pass {
 public:
  BackwardPass(const ScanBackwardArgs& args, const Context& context) : Pass(args, context), a(args) {}

  void run() {
    const Tensor hh = batch(a.weight_hh, G * a.H, a.P, storage);
    const Tensor hr = a.projected ? batch(a.weight_hr, a.P, a.H, compute) : Tensor();
    const Tensor dr = make(a.B, G * a.H, storage), product = make(a.B, a.P, compute);
    const Tensor dh = make(a.B, a.H, compute), dc = has_c ? make(a.B, a.H, compute) : Tensor();
    const Tensor dp = a.projected ? make(a.B, a.P, compute) : Tensor();
    const Tensor unprojected = a.projected ? make(a.B, a.H, compute) : Tensor();

    BackwardArgs step{};
    fill(step);
    step.product = (a.projected ? unprojected : product).mutable_data_ptr(), step.product_rows = a.B;
    step.doutput = a.doutput, step.dh_n = a.dh_n, step.dc_n = a.dc_n, step.output = a.output, step.cells = a.cells;
    step.saved = a.saved, step.h0 = a.h0, step.c0 = a.c0;
    step.dr = dr.mutable_data_ptr(), step.dh = dh.mutable_data_ptr(), step.dc = has_c ? dc.mutable_data_ptr() : nullptr;
    step.dgates = a.dgates, step.drecurrent = a.drecurrent, step.unprojected = a.unprojected, step.before = a.before;
    step.dh0 = a.dh0, step.dc0 = a.dc0;
    BackwardProjectArgs project{};
    fill(project);
    project.product = product.mutable_data_ptr(), project.product_rows = project.dp_rows = a.B;
    project.doutput = a.doutput, project.dh_n = a.dh_n, project.output = a.output, project.h0 = a.h0;
    project.dp = a.projected ? dp.mutable_data_ptr() : nullptr;
    project.dprojected = a.dprojected, project.before = a.before, project.dh0 = a.dh0;

    int64_t last_count = -1;
    Tensor product_rows, dr_rows, dp_rows, unprojected_rows;
    for (int64_t t = a.T - 1; t >= -1; --t) {  // -1: the gradients of the initial states
      if (t < 0 && !a.dh0 && !a.dc0) break;
      for (int reverse : {0, 1}) step.rows[reverse] = project.rows[reverse] = rows_at(t, reverse);
      const int64_t entered = most_rows(t + 1), count = most_rows(t);
      if (const int64_t most = std::max(entered, count); most != last_count) {
        last_count = most;
        product_rows = rows_of(product, most), dr_rows = rows_of(dr, most);
        if (a.projected) dp_rows = rows_of(dp, most), unprojected_rows = rows_of(unprojected, most);
      }
      // Rows beyond those of the step are multiplied too: what they hold is read by nobody.
      if (entered > 0 && (t >= 0 || a.dh0)) gemm(product_rows, dr_rows, hh);
      if (a.projected) {
        on.kernels.backward_project(project, on.queue);
        if (count > 0) gemm(unprojected_rows, dp_rows, hr);
      }
      on.kernels.backward(step, on.queue);
    }
  }

 private:
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

void scan_step(const ScanArgs& args, const Context& context) {
  if (args.N > 0) ForwardPass(args, context).run();
}
void scan_step(const ScanBackwardArgs& args, const Context& context) {
  if (args.N > 0) BackwardPass(args, context).run();
}

}  // namespace fastrnn::cuda
