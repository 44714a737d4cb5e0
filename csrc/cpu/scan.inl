// The CPU pass, forward and backward, built once per instruction set (scan_base.cpp, scan_avx2.cpp, scan_avx512.cpp).
//
// Computes   the cells of csrc/cells.h along time, each step's product fused with the cell's arithmetic
// Work       one call of `run`: one group, all time steps, a range of rows or of hidden units
// Memory     weights packed once per pass, or read where they lie; state of the rows in `Compute` panels, which hold
//            exactly the values that were stored; input products of a few steps at a time; every output written once
// Requires   what csrc/scan.h says; scratch of scratch_bytes(), aligned to 64
// Order      none between ranges of rows; a barrier after every step between ranges of units; every sum runs in an
//            order that the division of the work does not change
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "direct.h"
#include "kernels.h"
#include "twin.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

// Cuts the scratch memory into arrays; used once with a null base to count.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class S>
  S* take(int64_t count) {
    S* p = reinterpret_cast<S*>(base_ + used_);
    used_ += static_cast<size_t>(ceil_div(count * static_cast<int64_t>(sizeof(S)), 64) * 64);
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Elements between rows of a panel: whole vectors, and one more, so that rows do not meet in one cache set.
template <class S>
int64_t panel_stride(int64_t width) {
  return (ceil_div(width, Vec<S>::kLanes) + 1) * Vec<S>::kLanes;
}

template <class T>
const T* at(const void* array, int64_t index) {
  return array ? static_cast<const T*>(array) + index : nullptr;
}
template <class T>
T* at(void* array, int64_t index) {
  return array ? static_cast<T*>(array) + index : nullptr;
}

// A range of blocks of units, and of the units: the share of a member of a team, or all of them.
struct Part {
  int64_t begin, end, first, last;

  Part(const PackedShape& shape, const Share& share) {
    const int64_t members = share.team ? share.team->size() : 1;
    begin = shape.blocks * share.member / members, end = shape.blocks * (share.member + 1) / members;
    first = shape.first_vector(begin) * shape.lanes;
    last = first + shape.vectors_in(begin, end) * shape.lanes;
    if (last > shape.units) last = shape.units;
  }
  explicit Part(int64_t units) : begin(0), end(0), first(0), last(units) {}
};

// The units of a part from one array to another, or zeros; panels take and give storage values.
template <class To, class From>
void copy_row(const From* source, const Part& part, To* target) {
  using V = Vec<Compute<To>>;
  for (int64_t j = part.first; j < part.last; j += V::kLanes) {
    const int n = part.last - j < V::kLanes ? static_cast<int>(part.last - j) : V::kLanes;
    store(target + j, source ? load(source + j, n) : V(Compute<To>(0)), n);
  }
}

// Calls f(first row, rows, first block, behind the last block) for runs that cover rows [b_begin, b_end) of blocks
// [begin, end). Steps that begin with the first and the last run in turn find the weights of the other step in the
// cache: 3 to 7 % of a pass with few rows (Zen 3, H from 64 to 512).
template <class F>
void runs(const PackedShape& shape, int64_t begin, int64_t end, int64_t b_begin, int64_t b_end, F f,
          bool last_first = false) {
  const int64_t most = shape.run_blocks, count = ceil_div(end - begin, most);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = begin + most * (last_first ? count - 1 - i : i);
    for_parts(b_begin, b_end, kMaxRunRows,
              [&](int64_t b, int64_t rows) { f(b, rows, block, end - block < most ? end : block + most); });
  }
}

#include "arrays.inl"
#include "matrix.inl"
#include "scan_backward.inl"
#include "scan_forward.inl"

// Calls f<Cell, T>() for the cell and dtype of a shape.
template <template <class, class> class Pass, class Cell, class F>
auto with_dtype(const ScanShape& a, F f) {
  switch (a.dtype) {
    case Dtype::kFloat:
      return f(static_cast<Pass<Cell, float>*>(nullptr));
    case Dtype::kDouble:
      return f(static_cast<Pass<Cell, double>*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<Pass<Cell, BFloat16>*>(nullptr));
    default:
      return f(static_cast<Pass<Cell, Half>*>(nullptr));
  }
}

template <template <class, class> class Pass, class F>
auto with_cell(const ScanShape& a, F f) {
  switch (a.cell) {
#define FASTRNN_CASE(name, Cell) \
  case CellId::name:             \
    return with_dtype<Pass, Cell>(a, f);
    FASTRNN_CELLS(FASTRNN_CASE)
#undef FASTRNN_CASE
  }
  __builtin_unreachable();
}

template <template <class, class> class Pass, class Args>
constexpr PassKernels<Args> pass_kernels() {
  return {
      [](const Args& a, const CpuPlan& p) {
        return with_cell<Pass>(a,
                               [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::scratch_bytes(a, p); });
      },
      [](const Args& a, const CpuPlan& p) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::pack_blocks(a, p); });
      },
      [](const Args& a) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::unit_blocks(a); });
      },
      [](const Args& a, const CpuPlan& p, char* scratch, const Share& share, int64_t block) {
        with_cell<Pass>(a,
                        [&](auto* pass) { std::remove_pointer_t<decltype(pass)>::pack(a, p, scratch, share, block); });
      },
      [](const Args& a, const CpuPlan& p, char* scratch, const Share& share) {
        with_cell<Pass>(a, [&](auto* pass) { std::remove_pointer_t<decltype(pass)>::run(a, p, scratch, share); });
      }};
}

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels table = {FASTRNN_ISA_NAME,
                                   pass_kernels<Forward, ScanArgs>(),
                                   pass_kernels<Backward, ScanBackwardArgs>(),
                                   from_float,
                                   matrix_bytes,
                                   matrix_panel_bytes,
                                   matrix_blocks,
                                   pack_matrix,
                                   multiply_matrix,
                                   sum_rows};
  return table;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
