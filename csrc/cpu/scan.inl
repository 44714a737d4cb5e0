// The CPU pass, forward and backward, built once per instruction set (scan_base.cpp, scan_avx2.cpp, scan_avx512.cpp).
//
// Computes   the cells of csrc/cells.h along time, each step's product fused with the cell's arithmetic
// Work       one call of `run`: one group, all time steps, a range of rows or of hidden units
// Memory     weights packed once per pass, or read where they lie; state of the rows in `Compute` panels, which hold
//            exactly the values that were stored; every output written once
// Requires   what csrc/scan.h says; scratch of scratch_bytes(), aligned to 64
// Order      none between ranges of rows; a barrier after every step between ranges of units; every sum runs in an
//            order that the division of the work does not change
#include <cstddef>
#include <type_traits>

#include "kernels.h"
#include "product.h"

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

template <class S>
struct ForwardScratch {
  PackedShape hh, hr;
  int64_t h_stride, c_stride;
  S *packed_hh, *packed_hr;  // [D, hh.size()], [D, hr.size()]
  S *h[2], *c, *m;           // panels [D, B, stride]: h before and after a step, c, o tanh(c) before its projection
  size_t bytes;

  ForwardScratch(const ScanShape& a, const CpuPlan& plan, int gates, char* base)
      : hh{a.H, gates, a.P, Vec<S>::kLanes}, hr{a.P, 1, a.H, Vec<S>::kLanes} {
    Arena arena(base);
    h_stride = panel_stride<S>(a.P), c_stride = panel_stride<S>(a.H);
    packed_hh = arena.take<S>(plan.packed ? a.D * hh.size() : 0);
    packed_hr = arena.take<S>(plan.packed && a.projected ? a.D * hr.size() : 0);
    for (S*& panel : h) panel = arena.take<S>(a.D * a.B * h_stride);
    c = arena.take<S>(a.D * a.B * c_stride);
    m = arena.take<S>(a.projected ? a.D * a.B * c_stride : 0);
    bytes = arena.used();
  }
};

template <class S>
struct BackwardScratch {
  PackedShape hh, hr;
  int64_t dr_stride, dh_stride, dp_stride;
  S *packed_hh, *packed_hr;
  S *dr[2], *dh, *dc, *dp;  // panels: gradient of the recurrent pre-activations after and before a step, of h and c,
  size_t bytes;             // and of the projected h

  BackwardScratch(const ScanShape& a, int gates, char* base)
      : hh{a.P, 1, gates * a.H, Vec<S>::kLanes}, hr{a.H, 1, a.P, Vec<S>::kLanes} {
    Arena arena(base);
    dr_stride = panel_stride<S>(gates * a.H), dh_stride = panel_stride<S>(a.H), dp_stride = panel_stride<S>(a.P);
    packed_hh = arena.take<S>(a.D * hh.size());
    packed_hr = arena.take<S>(a.projected ? a.D * hr.size() : 0);
    for (S*& panel : dr) panel = arena.take<S>(a.D * a.B * dr_stride);
    dh = arena.take<S>(a.D * a.B * dh_stride);
    dc = arena.take<S>(a.D * a.B * dh_stride);
    dp = arena.take<S>(a.projected ? a.D * a.B * dp_stride : 0);
    bytes = arena.used();
  }
};

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
// [begin, end).
template <class F>
void runs(const PackedShape& shape, int64_t begin, int64_t end, int64_t b_begin, int64_t b_end, F f) {
  const int64_t most = shape.run_blocks;
  for (int64_t block = begin; block < end; block += most)
    for_parts(b_begin, b_end, kMaxRunRows,
              [&](int64_t b, int64_t rows) { f(b, rows, block, end - block < most ? end : block + most); });
}

template <class Cell, class T>
struct Forward {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn, kLanes = V::kLanes;

  static size_t scratch_bytes(const ScanShape& a, const CpuPlan& p) {
    return ForwardScratch<S>(a, p, G, nullptr).bytes;
  }

  static int64_t pack_blocks(const ScanShape& a, const CpuPlan& p) {
    const ForwardScratch<S> s(a, p, G, nullptr);
    return p.packed ? a.D * (s.hh.blocks + (a.projected ? s.hr.blocks : 0)) : 0;
  }

  static int64_t unit_blocks(const ScanShape& a) { return PackedShape(a.H, G, a.P, kLanes).blocks; }

  static void pack(const ScanArgs& a, const CpuPlan& p, char* scratch, int64_t index) {
    const ForwardScratch<S> s(a, p, G, scratch);
    const int64_t d = index % a.D, block = index / a.D;
    if (block < s.hh.blocks)
      pack_rows(static_cast<const T*>(a.weight_hh[d]), s.hh, block, s.packed_hh + d * s.hh.size());
    else
      pack_rows(static_cast<const T*>(a.weight_hr[d]), s.hr, block - s.hh.blocks, s.packed_hr + d * s.hr.size());
  }

  static void run(const ScanArgs& args, const CpuPlan& p, char* scratch, const Share& share) {
    Forward(args, p, scratch, share).run();
  }

  const ScanArgs& a;
  const CpuPlan& plan;
  const Share& share;
  const ForwardScratch<S> s;
  const int64_t d;
  const Part units;  // this thread's blocks of units, and the units
  int now = 0;       // h[now] enters the step, h[1 - now] leaves it
  RunSums<S> sums;

  Forward(const ScanArgs& args, const CpuPlan& p, char* scratch, const Share& part)
      : a(args), plan(p), share(part), s(args, p, G, scratch), d(part.d), units(s.hh, part) {}

  T* output_row(int64_t t, int64_t b) const { return at<T>(a.output, (a.row(t, b) * a.D + d) * a.P); }
  S* h_row(int panel, int64_t b) const { return s.h[panel] + (d * a.B + b) * s.h_stride; }
  S* c_row(int64_t b) const { return s.c + (d * a.B + b) * s.c_stride; }
  S* m_row(int64_t b) const { return s.m + (d * a.B + b) * s.c_stride; }

  void run() {
    int64_t n = share.b_begin;  // rows [b_begin, n) are in the recurrence
    for (int64_t step = 0; step < a.T; ++step) {
      const int64_t t = a.reversed(d) ? a.T - 1 - step : step;
      const int64_t active = a.active(t) < share.b_end ? a.active(t) : share.b_end;
      for (; n < active; ++n) enter(n);
      for (; n > active && n > share.b_begin; --n) leave(n - 1);
      if (n == share.b_begin) continue;
      if (share.team) share.team->barrier();  // every unit of h[now] is there, and nobody reads h[1 - now] any more
      runs(s.hh, units.begin, units.end, share.b_begin, n, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
        multiply_hh(h_row(now, b), rows, begin, end);
        cell_run(t, b, rows, begin, end);
      });
      if (a.projected)
        runs(s.hr, 0, s.hr.blocks, share.b_begin, n, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          multiply(m_row(b), s.c_stride, rows, a.weight_hr[d], s.packed_hr, s.hr, begin, end);
          projection_run(t, b, rows, begin, end);
        });
      now = 1 - now;
    }
    for (; n > share.b_begin; --n) leave(n - 1);
  }

  void multiply_hh(const S* panel, int64_t rows, int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, float>) {
      const auto direct = [&](auto type, const float* scale) {
        product_direct(panel, s.h_stride, rows, static_cast<const decltype(type)*>(a.weight_hh[d]), scale, s.hh, begin,
                       end, sums.data);
      };
      if (a.weight_type == WeightType::kBFloat16) return direct(BFloat16(), nullptr);
      if (a.weight_type == WeightType::kInt8) return direct(Int8(), a.scale_hh[d]);
    }
    multiply(panel, s.h_stride, rows, a.weight_hh[d], s.packed_hh, s.hh, begin, end);
  }

  void multiply(const S* panel, int64_t stride, int64_t rows, const void* weight, const S* packed,
                const PackedShape& shape, int64_t begin, int64_t end) {
    if (plan.packed)
      product(panel, stride, rows, packed + d * shape.size(), shape, begin, end, sums.data);
    else
      product_direct(panel, stride, rows, static_cast<const T*>(weight), static_cast<const S*>(nullptr), shape, begin,
                     end, sums.data);
  }

  void enter(int64_t b) {
    const Part h = a.projected ? Part(a.P) : units;
    copy_row(at<T>(a.h0, (d * a.B + b) * a.P), h, h_row(now, b));
    if (Cell::kHasC) copy_row(at<T>(a.c0, (d * a.B + b) * a.H), units, c_row(b));
  }

  void leave(int64_t b) {
    const Part h = a.projected ? Part(a.P) : units;
    copy_row<T, S>(h_row(now, b), h, at<T>(a.h_n, (d * a.B + b) * a.P));
    if (Cell::kHasC) copy_row<T, S>(c_row(b), units, at<T>(a.c_n, (d * a.B + b) * a.H));
  }

  V bias_of(const void* const* bias, int k, int64_t j, int n) const {
    return bias ? load(static_cast<const T*>(bias[d]) + k * a.H + j, n) : V(S(0));
  }

  void cell_run(int64_t t, int64_t b0, int64_t rows, int64_t begin, int64_t end) {
    const int64_t vectors = s.hh.vectors_in(begin, end), row_sums = s.hh.columns(begin, end) * kLanes;
    for (int64_t u = 0; u < vectors; ++u) {
      const int64_t j = (s.hh.first_vector(begin) + u) * kLanes;
      const int n = a.H - j < kLanes ? static_cast<int>(a.H - j) : kLanes;
      V bias[G], bias_own[R + 1];  // of x, and of r in the last R gates
      for (int k = 0; k < G; ++k) {
        bias[k] = bias_of(a.bias_ih, k, j, n);
        const V recurrent = bias_of(a.bias_hh, k, j, n);
        if (k < G - R)
          bias[k] = bias[k] + recurrent;
        else
          bias_own[k - (G - R)] = recurrent;
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = b0 + i, row = d * a.N + a.row(t, b);
        V x[G], r[G], saved[A + 1];
        const S* gates = at<S>(a.gates, row * G * a.H + j);
        for (int k = 0; k < G; ++k) {
          x[k] = load(gates + k * a.H, n) + bias[k];
          r[k] = load(sums.data + i * row_sums + (u * G + k) * kLanes, kLanes);
        }
        for (int k = 0; k < R; ++k) r[G - R + k] = r[G - R + k] + bias_own[k];
        V h = a.projected ? V(S(0)) : load(h_row(now, b) + j, kLanes);
        V c = Cell::kHasC ? load(c_row(b) + j, kLanes) : V(S(0));
        Cell::forward(x, r, h, c, saved);
        if (Cell::kHasC) {
          store(c_row(b) + j, c, kLanes);
          if (a.cells) store(at<S>(a.cells, row * a.H + j), c, n);
        }
        if (a.saved)
          for (int k = 0; k < A; ++k) store(at<T>(a.saved, (row * A + k) * a.H + j), saved[k], n);
        if (a.projected)
          store(m_row(b) + j, h, kLanes);
        else
          store(h_row(1 - now, b) + j, store(output_row(t, b) + j, h, n), kLanes);
      }
    }
  }

  void projection_run(int64_t t, int64_t b0, int64_t rows, int64_t begin, int64_t end) {
    const int64_t vectors = s.hr.vectors_in(begin, end), row_sums = s.hr.columns(begin, end) * kLanes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t b = b0 + i, j = (s.hr.first_vector(begin) + u) * kLanes;
        const int n = a.P - j < kLanes ? static_cast<int>(a.P - j) : kLanes;
        const V h = load(sums.data + i * row_sums + u * kLanes, kLanes);
        store(h_row(1 - now, b) + j, store(output_row(t, b) + j, h, n), kLanes);
      }
  }
};

#include "linear.inl"
#include "scan_backward.inl"

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
      [](const ScanShape& a, const CpuPlan& p) {
        return with_cell<Pass>(a,
                               [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::scratch_bytes(a, p); });
      },
      [](const ScanShape& a, const CpuPlan& p) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::pack_blocks(a, p); });
      },
      [](const ScanShape& a) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::unit_blocks(a); });
      },
      [](const Args& a, const CpuPlan& p, char* scratch, int64_t block) {
        with_cell<Pass>(a, [&](auto* pass) { std::remove_pointer_t<decltype(pass)>::pack(a, p, scratch, block); });
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
                                   to_float,
                                   from_float,
                                   linear,
                                   add,
                                   sum_rows};
  return table;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
