// The bodies of step_kernels.h, and the choice of their instance. Included by step_kernels.cu for GPUs, and by the
// tests for the host.
//
// Computes   the cells of csrc/cells.h, one time step of all groups and rows
// Work       a thread: kUnits neighbouring hidden units of one row of one group (16 bytes of float; 1 where H is no
//            multiple of that)
// Memory     registers only; every value is read and written once, neighbouring threads beside one another
// Requires   arrays aligned to kUnits elements, which torch's allocator and H % kUnits == 0 give; a caller's may begin
//            anywhere, then kUnits is 1
// Order      none within a kernel: a thread reads and writes its own units; steps follow each other on the queue
#include <algorithm>

#include "machine.h"
#include "step_kernels.h"

namespace fastrnn::cuda {
namespace {

template <class T>
FASTRNN_FN const T* at(const void* array) {
  return static_cast<const T*>(array);
}
template <class T>
FASTRNN_FN T* at(void* array) {
  return static_cast<T*>(array);
}

template <class T>
struct Enter {
  EnterArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    const int64_t width = a.H > a.P ? a.H : a.P, b = thread.item / width, j = thread.item % width;
    const int64_t row = thread.group * a.B + b;
    S unit;
    if (j < a.P) {
      load_or_zero<T, 1>(at<T>(a.h0), row * a.P + j, &unit);
      store<T, 1>(at<T>(a.h) + row * a.P + j, &unit);
    }
    if (j >= a.H || !a.c) return;
    load_or_zero<T, 1>(at<T>(a.c0), row * a.H + j, &unit);
    store<S, 1>(at<S>(a.c) + row * a.H + j, &unit);
  }
};

template <class Cell, class T>
struct Bias {
  BiasArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    constexpr int G = Cell::kGates, R = Cell::kOwn;
    const int64_t j = thread.item;
    for (int k = 0; k < G; ++k) {
      const S input = widen(at<T>(a.bias_ih)[k * a.H + j]), recurrent = widen(at<T>(a.bias_hh)[k * a.H + j]);
      at<S>(a.bias)[k * a.H + j] = k < G - R ? input + recurrent : input;
      if (k >= G - R) at<S>(a.bias)[(k + R) * a.H + j] = recurrent;
    }
  }
};

// Units kUnits apart: unit i of gate k is value[k][i].
template <class S, int kUnits, int kCount>
FASTRNN_FN void load_gates(const S* array, int64_t H, S (*value)[kUnits]) {
  FASTRNN_UNROLL
  for (int k = 0; k < kCount; ++k) load<S, kUnits>(array + k * H, value[k]);
}

template <class Cell, class T, int kUnits>
struct Forward {
  ForwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
    const StepRows& rows = a.rows[a.reversed(d)];
    if (b >= rows.count) return;
    const int64_t data_row = rows.row + b, row = d * a.N + data_row, state = (d * a.B + b) * a.H + j;
    S x[G][kUnits], r[G][kUnits], h[kUnits], c[kUnits], saved[A + 1][kUnits];
    load_gates<S, kUnits, G>(at<S>(a.gates) + (d * a.gates_rows + rows.gates_row + b) * G * a.H + j, a.H, x);
    load_gates<S, kUnits, G>(at<S>(a.product) + (d * a.product_rows + b) * G * a.H + j, a.H, r);
    if (a.bias) {
      S bias[G + R][kUnits];
      load_gates<S, kUnits, G + R>(at<S>(a.bias) + d * (G + R) * a.H + j, a.H, bias);
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) FASTRNN_UNROLL
      for (int i = 0; i < kUnits; ++i) x[k][i] += bias[k][i];
      FASTRNN_UNROLL
      for (int k = 0; k < R; ++k) FASTRNN_UNROLL
      for (int i = 0; i < kUnits; ++i) r[G - R + k][i] += bias[G + k][i];
    }
    load_or_zero<T, kUnits>(a.projected ? nullptr : at<T>(a.h), state, h);
    load_or_zero<S, kUnits>(Cell::kHasC ? at<S>(a.c) : nullptr, state, c);
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      S xi[G], ri[G], si[A + 1];
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) xi[k] = x[k][i], ri[k] = r[k][i];
      Cell::forward(xi, ri, h[i], c[i], si);
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) saved[k][i] = si[k];
    }
    const bool is_last = b >= rows.count_next;
    if (Cell::kHasC) {
      store<S, kUnits>(at<S>(a.c) + state, c);
      if (a.cells) store<S, kUnits>(at<S>(a.cells) + row * a.H + j, c);
      if (is_last) store<T, kUnits>(at<T>(a.c_n) + state, c);
    }
    if (a.saved) FASTRNN_UNROLL
    for (int k = 0; k < A; ++k) store<T, kUnits>(at<T>(a.saved) + (row * A + k) * a.H + j, saved[k]);
    if (a.projected) return store<S, kUnits>(at<S>(a.m) + (d * a.product_rows + b) * a.H + j, h);
    store<T, kUnits>(at<T>(a.h) + state, h);
    store<T, kUnits>(at<T>(a.output) + (data_row * a.D + d) * a.H + j, h);
    if (is_last) store<T, kUnits>(at<T>(a.h_n) + state, h);
  }
  static int64_t items(const ForwardArgs& a) { return std::max(a.rows[0].count, a.rows[1].count) * (a.H / kUnits); }
  static bool is_aligned(const ForwardArgs&) { return true; }  // all of its arrays are our own
};

template <class T>
struct Project {
  ProjectArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const int64_t b = thread.item / a.P, j = thread.item % a.P, d = thread.group;
    const StepRows& rows = a.rows[a.reversed(d)];
    if (b >= rows.count) return;
    const int64_t state = (d * a.B + b) * a.P + j;
    T h;
    narrow(at<Compute<T>>(a.product)[(d * a.product_rows + b) * a.P + j], h);
    at<T>(a.h)[state] = h;
    at<T>(a.output)[((rows.row + b) * a.D + d) * a.P + j] = h;
    if (b >= rows.count_next) at<T>(a.h_n)[state] = h;
  }
};

template <class Cell, class T, int kUnits>
struct Backward {
  BackwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
    const StepRows& rows = a.rows[a.reversed(d)];
    const int64_t state = (d * a.B + b) * a.H + j;
    const bool continues = b < rows.count_next;  // took part in the step run before, whose gradients the panels hold
    if (b >= rows.count) return continues ? leave(state, (d * a.product_rows + b) * a.H + j) : void();
    const int64_t data_row = rows.row + b, row = d * a.N + data_row;
    const bool is_first = b >= rows.count_before;
    const int64_t row_before = rows.row_before + b;
    S saved[A + 1][kUnits], dh[kUnits], dc[kUnits];
    load_gates<T, kUnits, A>(at<T>(a.saved) + row * A * a.H + j, saved);
    S h_before[kUnits], h_after[kUnits], c_before[kUnits], c_after[kUnits];
    if (Cell::kHasC) {
      load<S, kUnits>(at<S>(a.cells) + row * a.H + j, c_after);
      if (is_first)
        load_or_zero<T, kUnits>(at<T>(a.c0), state, c_before);
      else
        load<S, kUnits>(at<S>(a.cells) + (d * a.N + row_before) * a.H + j, c_before);
    }
    if (!a.projected && (!Cell::kHasC || a.before)) {
      load<T, kUnits>(at<T>(a.output) + (data_row * a.D + d) * a.H + j, h_after);
      if (is_first)
        load_or_zero<T, kUnits>(at<T>(a.h0), state, h_before);
      else
        load<T, kUnits>(at<T>(a.output) + (row_before * a.D + d) * a.H + j, h_before);
      if (a.before) store<T, kUnits>(at<T>(a.before) + row * a.H + j, h_before);
    }
    if (a.projected || continues)
      load<S, kUnits>(at<S>(a.product) + (d * a.product_rows + b) * a.H + j, dh);
    else
      load_or_zero<T, kUnits>(at<T>(a.dh_n), state, dh);
    if (!a.projected) {
      if (continues) add(at<S>(a.dh) + state, dh);
      if (a.doutput) add(at<T>(a.doutput) + (data_row * a.D + d) * a.H + j, dh);
    }
    if (Cell::kHasC) {
      if (continues)
        load<S, kUnits>(at<S>(a.dc) + state, dc);
      else
        load_or_zero<T, kUnits>(at<T>(a.dc_n), state, dc);
    }
    S dx[G][kUnits], dr[R + 1][kUnits], hidden[kUnits];
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      S si[A + 1], xi[G], ri[R + 1];
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) si[k] = saved[k][i];
      if constexpr (Cell::kHasC) hidden[i] = Cell::hidden(si, c_after[i]);
      Cell::backward(si, h_before[i], c_before[i], h_after[i], c_after[i], dh[i], dc[i], xi, ri);
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) dx[k][i] = xi[k];
      FASTRNN_UNROLL
      for (int k = 0; k < R; ++k) dr[k][i] = ri[k];
    }
    if (Cell::kHasC && a.projected) store<T, kUnits>(at<T>(a.unprojected) + row * a.H + j, hidden);
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) {
      store<T, kUnits>(at<T>(a.dgates) + (row * G + k) * a.H + j, dx[k]);
      store<T, kUnits>(at<T>(a.dr) + ((d * a.B + b) * G + k) * a.H + j, k < G - R ? dx[k] : dr[k - (G - R)]);
    }
    FASTRNN_UNROLL
    for (int k = 0; k < R; ++k) store<T, kUnits>(at<T>(a.drecurrent) + (row * R + k) * a.H + j, dr[k]);
    if (!a.projected) store<S, kUnits>(at<S>(a.dh) + state, dh);
    if (Cell::kHasC) store<S, kUnits>(at<S>(a.dc) + state, dc);
  }

  // The gradients of the initial states of a row that has run its first step.
  FASTRNN_FN void leave(int64_t state, int64_t product) const {
    using S = Compute<T>;
    S unit[kUnits];
    if (a.dh0 && !a.projected) {
      load<S, kUnits>(at<S>(a.product) + product, unit);
      add(at<S>(a.dh) + state, unit);
      store<T, kUnits>(at<T>(a.dh0) + state, unit);
    }
    if (!Cell::kHasC || !a.dc0) return;
    load<S, kUnits>(at<S>(a.dc) + state, unit);
    store<T, kUnits>(at<T>(a.dc0) + state, unit);
  }

  template <class F>
  static FASTRNN_FN void add(const F* array, Compute<T>* sum) {
    Compute<T> term[kUnits];
    load<F, kUnits>(array, term);
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) sum[i] += term[i];
  }
  template <class F, int kWidth, int kCount>
  FASTRNN_FN void load_gates(const F* array, Compute<T> (*value)[kWidth]) const {
    FASTRNN_UNROLL
    for (int k = 0; k < kCount; ++k) load<F, kWidth>(array + k * a.H, value[k]);
  }
  static int64_t items(const BackwardArgs& a) {
    const StepRows *f = &a.rows[0], *r = &a.rows[1];
    return std::max({f->count, f->count_next, r->count, r->count_next}) * (a.H / kUnits);
  }
  static bool is_aligned(const BackwardArgs& a) {
    const auto aligned = [](const void* array, size_t item) {
      return reinterpret_cast<uintptr_t>(array) % (kUnits * item) == 0;
    };
    bool all = aligned(a.cells, sizeof(Compute<T>));
    for (const void* array : {a.doutput, a.dh_n, a.dc_n, a.output, a.saved, a.h0, a.c0})
      all = all && aligned(array, sizeof(T));
    return all;
  }
};

template <class T>
struct BackwardProject {
  BackwardProjectArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    const int64_t b = thread.item / a.P, j = thread.item % a.P, d = thread.group;
    const StepRows& rows = a.rows[a.reversed(d)];
    const int64_t state = (d * a.B + b) * a.P + j;
    const bool continues = b < rows.count_next;
    const S product = continues ? at<S>(a.product)[(d * a.product_rows + b) * a.P + j] : S(0);
    if (b >= rows.count) {
      if (continues && a.dh0) narrow(product, at<T>(a.dh0)[state]);
      return;
    }
    const int64_t data_row = rows.row + b;
    S dp = continues ? product : a.dh_n ? widen(at<T>(a.dh_n)[state]) : S(0);
    if (a.doutput) dp += widen(at<T>(a.doutput)[(data_row * a.D + d) * a.P + j]);
    at<S>(a.dp)[(d * a.dp_rows + b) * a.P + j] = dp;
    narrow(dp, at<T>(a.dprojected)[(d * a.N + data_row) * a.P + j]);
    if (!a.before) return;
    T* before = at<T>(a.before) + (d * a.N + data_row) * a.P + j;
    if (b < rows.count_before)
      *before = at<T>(a.output)[((rows.row_before + b) * a.D + d) * a.P + j];
    else if (a.h0)
      *before = at<T>(a.h0)[state];
    else
      narrow(S(0), *before);
  }
  static int64_t items(const BackwardProjectArgs& a) {
    const StepRows *f = &a.rows[0], *r = &a.rows[1];
    return std::max({f->count, f->count_next, r->count, r->count_next}) * a.P;
  }
};

template <class S>
struct Add {
  AddArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const int64_t row = thread.item / a.columns, column = thread.item % a.columns;
    at<S>(a.sum)[row * a.sum_stride + column] += at<S>(a.term)[thread.item];
  }
};

template <class T>
struct Narrow {
  NarrowArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    narrow(at<Compute<T>>(a.source)[thread.item], at<T>(a.target)[thread.item]);
  }
};

// Calls f(a null pointer to the type) for a dtype, for a cell.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(static_cast<float*>(nullptr));
    case Dtype::kDouble:
      return f(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::kHalf:
      return f(static_cast<Half*>(nullptr));
  }
}
template <class F>
void with_cell(CellId cell, F f) {
  switch (cell) {
#define FASTRNN_CASE(name, Cell) \
  case CellId::name:             \
    return f(static_cast<Cell*>(nullptr));
    FASTRNN_CELLS(FASTRNN_CASE)
#undef FASTRNN_CASE
  }
}

template <class T>
constexpr int kMostUnits = sizeof(T) == 8 ? 2 : 4;  // the larger of what units_per_thread gives

// Launches the instance of a kernel <Cell, T, kUnits> for these arguments.
template <template <class, class, int> class Kernel, class Args>
void launch_cell(const Args& a, Queue queue) {
  with_cell(a.cell, [&](auto* cell) {
    with_dtype(a.dtype, [&](auto* dtype) {
      using Cell = std::remove_pointer_t<decltype(cell)>;
      using T = std::remove_pointer_t<decltype(dtype)>;
      using Wide = Kernel<Cell, T, kMostUnits<T>>;
      using Narrowest = Kernel<Cell, T, 1>;
      if (units_per_thread(a.H, sizeof(Compute<T>)) == kMostUnits<T> && Wide::is_aligned(a))
        launch(Wide{a}, Wide::items(a), a.D, queue);
      else
        launch(Narrowest{a}, Narrowest::items(a), a.D, queue);
    });
  });
}

template <template <class> class Kernel, class Args>
void launch_dtype(const Args& a, int64_t items, int64_t groups, Queue queue) {
  with_dtype(a.dtype,
             [&](auto* dtype) { launch(Kernel<std::remove_pointer_t<decltype(dtype)>>{a}, items, groups, queue); });
}

void enter(const EnterArgs& a, Queue queue) {
  with_dtype(a.dtype, [&](auto* dtype) {
    using T = std::remove_pointer_t<decltype(dtype)>;
    launch(Enter<T>{a}, a.B * std::max(a.H, a.P), a.D, queue);
  });
}
void bias(const BiasArgs& a, Queue queue) {
  with_cell(a.cell, [&](auto* cell) {
    with_dtype(a.dtype, [&](auto* dtype) {
      launch(Bias<std::remove_pointer_t<decltype(cell)>, std::remove_pointer_t<decltype(dtype)>>{a}, a.H, 1, queue);
    });
  });
}
void project(const ProjectArgs& a, Queue queue) {
  launch_dtype<Project>(a, std::max(a.rows[0].count, a.rows[1].count) * a.P, a.D, queue);
}
void backward_project(const BackwardProjectArgs& a, Queue queue) {
  launch_dtype<BackwardProject>(a, BackwardProject<float>::items(a), a.D, queue);
}
void add(const AddArgs& a, Queue queue) {
  if (a.dtype == Dtype::kDouble)
    launch(Add<double>{a}, a.count, 1, queue);
  else
    launch(Add<float>{a}, a.count, 1, queue);
}
void narrow_all(const NarrowArgs& a, Queue queue) { launch_dtype<Narrow>(a, a.count, 1, queue); }

}  // namespace

const StepKernels& step_kernels() {
  static const StepKernels table = {enter,
                                    bias,
                                    launch_cell<Forward, ForwardArgs>,
                                    project,
                                    launch_cell<Backward, BackwardArgs>,
                                    backward_project,
                                    add,
                                    narrow_all};
  return table;
}

}  // namespace fastrnn::cuda
