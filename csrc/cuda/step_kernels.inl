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

// Unit i of gate k is value[k][i]; gates lie H apart.
template <class F, int kUnits, int kCount>
FASTRNN_FN void load_gates(const F* array, int64_t H, Compute<F> (*value)[kUnits]) {
  FASTRNN_UNROLL
  for (int k = 0; k < kCount; ++k) load<F, kUnits>(array + k * H, value[k]);
}

#include "step_backward.inl"
#include "step_forward.inl"

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
