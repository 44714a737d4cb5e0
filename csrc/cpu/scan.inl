// The CPU pass, forward and backward, built once per instruction set (scan_base.cpp, scan_avx2.cpp, scan_avx512.cpp).
//
// Computes   the cells of csrc/cells.h along time, each step's product fused with the cell's arithmetic
// Work       one call of `rows`: one group, a range of rows, all time steps
// Memory     weights packed once per pass; state of the rows in `Compute` panels, which hold exactly the values that
//            were stored; every output written once
// Requires   what csrc/scan.h says; scratch of scratch_bytes(), aligned to 64
// Order      none between ranges of rows; within a row every sum runs in a fixed order
#include <cstddef>

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

  ForwardScratch(const ScanShape& a, int gates, char* base)
      : hh{a.H, gates, a.P, Vec<S>::kLanes}, hr{a.P, 1, a.H, Vec<S>::kLanes} {
    Arena arena(base);
    h_stride = panel_stride<S>(a.P), c_stride = panel_stride<S>(a.H);
    packed_hh = arena.take<S>(a.D * hh.size());
    packed_hr = arena.take<S>(a.projected ? a.D * hr.size() : 0);
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

// target[0..width) = source[0..width), or zeros; panels take and give storage values.
template <class To, class From>
void copy_row(const From* source, int64_t width, To* target) {
  using V = Vec<Compute<To>>;
  for (int64_t j = 0; j < width; j += V::kLanes) {
    const int n = width - j < V::kLanes ? static_cast<int>(width - j) : V::kLanes;
    store(target + j, source ? load(source + j, n) : V(Compute<To>(0)), n);
  }
}

template <class Cell, class T>
struct Forward {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn, kLanes = V::kLanes;

  static size_t scratch_bytes(const ScanShape& a) { return ForwardScratch<S>(a, G, nullptr).bytes; }

  static int64_t pack_blocks(const ScanShape& a) {
    const ForwardScratch<S> s(a, G, nullptr);
    return a.D * (s.hh.blocks() + (a.projected ? s.hr.blocks() : 0));
  }

  static void pack(const ScanArgs& a, char* scratch, int64_t index) {
    const ForwardScratch<S> s(a, G, scratch);
    const int64_t d = index % a.D, block = index / a.D;
    if (block < s.hh.blocks())
      pack_rows(at<T>(a.weight_hh, d * G * a.H * a.P), s.hh, block, s.packed_hh + d * s.hh.size());
    else
      pack_rows(at<T>(a.weight_hr, d * a.P * a.H), s.hr, block - s.hh.blocks(), s.packed_hr + d * s.hr.size());
  }

  const ScanArgs& a;
  const ForwardScratch<S> s;
  const int64_t d;
  int now = 0;  // h[now] enters the step, h[1 - now] leaves it
  alignas(64) S acc[kMaxRows * kMaxColumns * kLanes];

  Forward(const ScanArgs& args, char* scratch, int64_t group) : a(args), s(args, G, scratch), d(group) {}

  static void rows(const ScanArgs& args, char* scratch, int64_t d, int64_t b_begin, int64_t b_end) {
    Forward(args, scratch, d).run(b_begin, b_end);
  }

  S* h_row(int panel, int64_t b) const { return s.h[panel] + (d * a.B + b) * s.h_stride; }
  S* c_row(int64_t b) const { return s.c + (d * a.B + b) * s.c_stride; }
  S* m_row(int64_t b) const { return s.m + (d * a.B + b) * s.c_stride; }

  void run(int64_t b_begin, int64_t b_end) {
    int64_t n = b_begin;  // rows [b_begin, n) are in the recurrence
    for (int64_t step = 0; step < a.T; ++step) {
      const int64_t t = a.reversed(d) ? a.T - 1 - step : step;
      const int64_t active = a.active(t) < b_end ? a.active(t) : b_end;
      for (; n < active; ++n) enter(n);
      for (; n > active && n > b_begin; --n) leave(n - 1);
      if (n == b_begin) continue;
      for (int64_t block = 0; block < s.hh.blocks(); ++block)
        for_tiles(b_begin, n, [&](int64_t b, int64_t rows) {
          product(h_row(now, b), s.h_stride, rows, s.packed_hh + d * s.hh.size(), s.hh, block, acc);
          cell_tile(t, b, rows, block);
        });
      for (int64_t block = 0; a.projected && block < s.hr.blocks(); ++block)
        for_tiles(b_begin, n, [&](int64_t b, int64_t rows) {
          product(m_row(b), s.c_stride, rows, s.packed_hr + d * s.hr.size(), s.hr, block, acc);
          projection_tile(t, b, rows, block);
        });
      now = 1 - now;
    }
    for (; n > b_begin; --n) leave(n - 1);
  }

  void enter(int64_t b) {
    copy_row(at<T>(a.h0, (d * a.B + b) * a.P), a.P, h_row(now, b));
    if (Cell::kHasC) copy_row(at<T>(a.c0, (d * a.B + b) * a.H), a.H, c_row(b));
  }

  void leave(int64_t b) {
    copy_row<T, S>(h_row(now, b), a.P, at<T>(a.h_n, (d * a.B + b) * a.P));
    if (Cell::kHasC) copy_row<T, S>(c_row(b), a.H, at<T>(a.c_n, (d * a.B + b) * a.H));
  }

  void cell_tile(int64_t t, int64_t b0, int64_t rows, int64_t block) {
    const int64_t vectors = s.hh.vectors_in(block);
    for (int64_t u = 0; u < vectors; ++u) {
      const int64_t j = (s.hh.first_vector(block) + u) * kLanes;
      const int n = a.H - j < kLanes ? static_cast<int>(a.H - j) : kLanes;
      V bias[R + 1];
      for (int k = 0; k < R; ++k) bias[k] = a.bias_own ? load(at<T>(a.bias_own, (d * R + k) * a.H + j), n) : V(S(0));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = b0 + i, row = a.row(t, b) * a.D + d;
        V x[G], r[G], saved[A + 1];
        const T* gates = at<T>(a.gates, row * G * a.H + j);
        for (int k = 0; k < G; ++k) {
          x[k] = load(gates + k * a.H, n);
          r[k] = load(acc + ((i * vectors + u) * G + k) * kLanes, kLanes);
        }
        for (int k = 0; k < R; ++k) r[G - R + k] = r[G - R + k] + bias[k];
        V h = a.projected ? V(S(0)) : load(h_row(now, b) + j, kLanes);
        V c = load(c_row(b) + j, kLanes);
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
          store(h_row(1 - now, b) + j, store(at<T>(a.output, row * a.H + j), h, n), kLanes);
      }
    }
  }

  void projection_tile(int64_t t, int64_t b0, int64_t rows, int64_t block) {
    const int64_t vectors = s.hr.vectors_in(block);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t b = b0 + i, row = a.row(t, b) * a.D + d, j = (s.hr.first_vector(block) + u) * kLanes;
        const int n = a.P - j < kLanes ? static_cast<int>(a.P - j) : kLanes;
        const V h = load(acc + (i * vectors + u) * kLanes, kLanes);
        store(h_row(1 - now, b) + j, store(at<T>(a.output, row * a.P + j), h, n), kLanes);
      }
  }
};

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
      [](const ScanShape& a) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::scratch_bytes(a); });
      },
      [](const ScanShape& a) {
        return with_cell<Pass>(a, [&](auto* pass) { return std::remove_pointer_t<decltype(pass)>::pack_blocks(a); });
      },
      [](const Args& a, char* scratch, int64_t block) {
        with_cell<Pass>(a, [&](auto* pass) { std::remove_pointer_t<decltype(pass)>::pack(a, scratch, block); });
      },
      [](const Args& a, char* scratch, int64_t d, int64_t b_begin, int64_t b_end) {
        with_cell<Pass>(
            a, [&](auto* pass) { std::remove_pointer_t<decltype(pass)>::rows(a, scratch, d, b_begin, b_end); });
      }};
}

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels table = {FASTRNN_ISA_NAME, pass_kernels<Forward, ScanArgs>(),
                                   pass_kernels<Backward, ScanBackwardArgs>()};
  return table;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
