// The bodies of step_kernels.h, and the choice of their instance. Included by step_kernels.cu for GPUs, and by the
// tests for the host.
//
// Computes   the cells of csrc/cells.h, one time step of all groups and rows, and what passes between two
// Work       a thread: kUnits neighbouring hidden units of one row of one group (16 bytes of float; 1 where H is no
//            multiple of that); at boundaries one
// Memory     registers only; every value is read and written once, neighbouring threads beside one another
// Requires   arrays aligned to kUnits elements, which torch's allocator and H % kUnits == 0 give; a caller's may begin
//            anywhere, then kUnits is 1
// Order      none within a kernel: a thread reads and writes its own units; steps follow each other on the queue
#include <algorithm>

#include "machine.h"
#include "step_cell.h"
#include "step_kernels.h"

namespace fastrnn::cuda {
namespace {

#include "step_backward.inl"
#include "step_boundary.inl"
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

// A step of a program: a kernel with the arguments that the table holds when it runs.
template <class Kernel, class Table>
struct OfProgram {
  const Table* table;
  int step;

  FASTRNN_FN void operator()(Thread thread) const {
    Kernel kernel{arguments(*table, static_cast<decltype(Kernel::a)*>(nullptr))};
    kernel.a.rows[0] = kernel.a.rows[1] = table->rows[step][kernel.a.reversed(thread.group)];
    kernel(thread);
  }
  template <class A, class B>
  static FASTRNN_FN const A& arguments(const StepTable<A, B>& t, A*) {
    return t.cell;
  }
  template <class A, class B>
  static FASTRNN_FN const B& arguments(const StepTable<A, B>& t, B*) {
    return t.projection;
  }
};

// The table of a program, to device memory, word by word.
template <class Table>
struct WriteTable {
  using Word = uint64_t;
  static constexpr int64_t kWords = sizeof(Table) / sizeof(Word);
  static_assert(sizeof(Table) % sizeof(Word) == 0, "a table is whole words");
  Table source;
  Table* target;

  FASTRNN_FN void operator()(Thread thread) const {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(&source) + thread.item * sizeof(Word), sizeof(Word));
    memcpy(reinterpret_cast<char*>(target) + thread.item * sizeof(Word), &word, sizeof(Word));
  }
};

// Calls f(a null pointer to the type) for a dtype.
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
template <class T>
constexpr int kMostUnits = sizeof(T) == 8 ? 2 : 4;  // the larger of what units_per_thread gives

// Calls f(a null pointer to the instance) of a kernel <Cell, T, kUnits> for these arguments.
template <template <class, class, int> class Kernel, class Args, class F>
void with_instance(const Args& a, F f) {
  with_cell(a.cell, [&](auto* cell) {
    with_dtype(a.dtype, [&](auto* dtype) {
      using Cell = std::remove_pointer_t<decltype(cell)>;
      using T = std::remove_pointer_t<decltype(dtype)>;
      using Wide = Kernel<Cell, T, kMostUnits<T>>;
      if (units_per_thread(a.H, sizeof(Compute<T>)) == kMostUnits<T> && Wide::is_aligned(a))
        f(static_cast<Wide*>(nullptr));
      else
        f(static_cast<Kernel<Cell, T, 1>*>(nullptr));
    });
  });
}

template <template <class, class, int> class Kernel, class Table>
void launch_cell(const Table& now, Queue queue) {
  const auto& a = now.cell;
  with_instance<Kernel>(a, [&](auto* instance) {
    using Instance = std::remove_pointer_t<decltype(instance)>;
    launch(Instance{a}, a.most_rows() * (a.H / Instance::kWidth), a.D, queue);
  });
}
template <template <class, class, int> class Kernel, class Table>
void launch_cell_of(const Table& like, const Table* table, int step, Queue queue) {
  const auto& a = like.cell;
  with_instance<Kernel>(a, [&](auto* instance) {
    using Instance = std::remove_pointer_t<decltype(instance)>;
    launch(OfProgram<Instance, Table>{table, step}, a.B * (a.H / Instance::kWidth), a.D, queue);
  });
}

template <template <class> class Kernel, class Args>
void launch_dtype(const Args& a, int64_t items, int64_t groups, Queue queue) {
  with_dtype(a.dtype,
             [&](auto* dtype) { launch(Kernel<std::remove_pointer_t<decltype(dtype)>>{a}, items, groups, queue); });
}

template <template <class> class Kernel, class Table>
void launch_projection(const Table& now, Queue queue) {
  const auto& a = now.projection;
  launch_dtype<Kernel>(a, a.most_rows() * a.P, a.D, queue);
}
template <template <class> class Kernel, class Table>
void launch_projection_of(const Table& like, const Table* table, int step, Queue queue) {
  const auto& a = like.projection;
  with_dtype(a.dtype, [&](auto* dtype) {
    using Instance = Kernel<std::remove_pointer_t<decltype(dtype)>>;
    launch(OfProgram<Instance, Table>{table, step}, a.B * a.P, a.D, queue);
  });
}
template <class Table>
void write(const Table& now, Table* table, Queue queue) {
  launch(WriteTable<Table>{now, table}, WriteTable<Table>::kWords, 1, queue);
}
template <class Table, template <class, class, int> class Cell, template <class> class Projection>
constexpr PassKernels<Table> pass_kernels() {
  return {launch_cell<Cell, Table>, launch_projection<Projection, Table>, launch_cell_of<Cell, Table>,
          launch_projection_of<Projection, Table>, write<Table>};
}

template <template <class> class Kernel, class Args>
void launch_boundary(const Args& a, Queue queue) {
  launch_dtype<Kernel>(a, a.most_rows() * std::max(a.H, a.P), a.D, queue);
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
void add(const AddArgs& a, Queue queue) {
  if (a.dtype == Dtype::kDouble)
    launch(Add<double>{a}, a.count, 1, queue);
  else
    launch(Add<float>{a}, a.count, 1, queue);
}
void narrow_all(const NarrowArgs& a, Queue queue) { launch_dtype<Narrow>(a, a.count, 1, queue); }
int backward_units(const BackwardArgs& a) {
  int units = 0;
  with_instance<Backward>(a, [&](auto* instance) { units = std::remove_pointer_t<decltype(instance)>::kWidth; });
  return units;
}

}  // namespace

const StepKernels& step_kernels() {
  static const StepKernels table = {enter,
                                    bias,
                                    pass_kernels<ForwardTable, Forward, Project>(),
                                    pass_kernels<BackwardTable, Backward, BackwardProject>(),
                                    {launch_cell<BackwardOfPanels, BackwardTable>,
                                     launch_projection<BackwardProject, BackwardTable>, nullptr, nullptr, nullptr},
                                    launch_boundary<ForwardBoundary, ForwardBoundaryArgs>,
                                    launch_boundary<BackwardBoundary, BackwardBoundaryArgs>,
                                    add,
                                    narrow_all,
                                    backward_units};
  return table;
}

}  // namespace fastrnn::cuda
