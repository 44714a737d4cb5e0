// A step of a cell for kUnits neighbouring hidden units of one row, by one thread: what it reads, what it computes,
// what it writes. Forward: csrc/scan.h of ScanArgs; backward of ScanBackwardArgs. Pointers and rows as in
// step_kernels.h.
//
// In three parts, as a kernel may have something to wait for between them: `fetch` starts all reads that do not depend
// on the recurrent products and looks at no number; `compute` takes them with the products; `store` writes the results.
//
// V is what computes; Index what counts rows, and elements of a row: int where a plan has seen that it is enough.
#pragma once

#include "quick.h"

namespace fastrnn::cuda {

// kUnits neighbours as they lie in memory.
template <class F, int kUnits>
FASTRNN_FN Pack<F, kUnits> fetch(const F* source) {
  check_alignment<F, kUnits>(source);
  return *reinterpret_cast<const Pack<F, kUnits>*>(source);
}
template <class F, int kUnits>
FASTRNN_FN Pack<F, kUnits> fetch_or_zeros(const F* array, int64_t index) {
  if (array) return fetch<F, kUnits>(array + index);
  Pack<F, kUnits> pack;
  FASTRNN_UNROLL
  for (int i = 0; i < kUnits; ++i) narrow(Compute<F>(0), pack.unit[i]);
  return pack;
}

// The unit of a thread: of group d, row b of the batch, hidden units from j on.
template <class Index>
struct Unit {
  Index d, b, j;

  // The element of a row as wide as said.
  static FASTRNN_FN int64_t element(Index row, Index width, Index column) {
    return static_cast<int64_t>(row) * width + column;
  }
  // In an array of states [D, B, H].
  FASTRNN_FN int64_t state(const StepShape& s) const {
    return element(d * static_cast<Index>(s.B) + b, static_cast<Index>(s.H), j);
  }
};

template <class Cell, class T, int kUnits, class V = Value<T>, class Index = int64_t>
struct ForwardCell : Unit<Index> {
  using S = Compute<T>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;

  struct Given {
    Pack<S, kUnits> x[G], c;
    Pack<T, kUnits> h;
  };
  struct Bias {
    Pack<S, kUnits> of[G + R];
  };
  struct Result {
    S h[kUnits], c[kUnits], saved[A + 1][kUnits];
  };

  const ForwardArgs& a;
  Index data_row, gates_row;  // of this row
  bool is_last;               // its last step

  FASTRNN_FN ForwardCell(const ForwardArgs& args, const StepRows& rows, const Unit<Index>& unit)
      : Unit<Index>(unit),
        a(args),
        data_row(static_cast<Index>(rows.row) + unit.b),
        gates_row(static_cast<Index>(rows.gates_row) + unit.b),
        is_last(unit.b >= static_cast<Index>(rows.count_next)) {}

  FASTRNN_FN Index H() const { return static_cast<Index>(a.H); }
  FASTRNN_FN int64_t state() const { return Unit<Index>::state(a); }
  // In row `row` of group d of an array [D, rows, count, H], of the first of them.
  FASTRNN_FN int64_t element(Index rows, Index row, int count) const {
    return Unit<Index>::element(this->d * rows + row, count * H(), this->j);
  }

  FASTRNN_FN Given fetch() const {
    Given given;
    const S* const gates = at<S>(a.gates) + element(static_cast<Index>(a.gates_rows), gates_row, G);
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) given.x[k] = cuda::fetch<S, kUnits>(gates + k * H());
    given.h = fetch_or_zeros<T, kUnits>(a.projected ? nullptr : at<T>(a.h), state());
    given.c = fetch_or_zeros<S, kUnits>(Cell::kHasC ? at<S>(a.c) : nullptr, state());
    return given;
  }

  // The same in all steps.
  static FASTRNN_FN Bias bias(const ForwardArgs& a, const Unit<Index>& unit) {
    Bias bias;
    const int64_t first = Unit<Index>::element(unit.d * (G + R), static_cast<Index>(a.H), unit.j);
    FASTRNN_UNROLL
    for (int k = 0; k < G + R; ++k) bias.of[k] = fetch_or_zeros<S, kUnits>(at<S>(a.bias), first + k * a.H);
    return bias;
  }

  // r: recurrent products, without bias.
  FASTRNN_FN Result compute(const Given& given, const Bias& bias, const S (&r)[G][kUnits]) const {
    Result result;
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      V xi[G], ri[G], si[A + 1], h = widen(given.h.unit[i]), c = given.c.unit[i];
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) {
        xi[k] = given.x[k].unit[i] + bias.of[k].unit[i];
        ri[k] = k < G - R ? r[k][i] : r[k][i] + bias.of[k + R].unit[i];
      }
      Cell::forward(xi, ri, h, c, si);
      result.h[i] = h, result.c[i] = c;
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) result.saved[k][i] = si[k];
    }
    return result;
  }

  FASTRNN_FN void store(const Result& result) const {
    const Index N = static_cast<Index>(a.N);
    if (Cell::kHasC) {
      cuda::store<S, kUnits>(at<S>(a.c) + state(), result.c);
      if (a.cells) cuda::store<S, kUnits>(at<S>(a.cells) + element(N, data_row, 1), result.c);
      if (is_last) cuda::store<T, kUnits>(at<T>(a.c_n) + state(), result.c);
    }
    if (A > 0 && a.saved) {
      T* const saved = at<T>(a.saved) + element(N, data_row, A);
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) cuda::store<T, kUnits>(saved + k * H(), result.saved[k]);
    }
    if (a.projected)
      return cuda::store<S, kUnits>(at<S>(a.m) + element(static_cast<Index>(a.product_rows), this->b, 1), result.h);
    const Index D = static_cast<Index>(a.D);
    cuda::store<T, kUnits>(at<T>(a.h) + state(), result.h);
    cuda::store<T, kUnits>(at<T>(a.output) + Unit<Index>::element(data_row, D * H(), this->d * H() + this->j),
                           result.h);
    if (is_last) cuda::store<T, kUnits>(at<T>(a.h_n) + state(), result.h);
  }
};

template <class Cell, class T, int kUnits, class V = Value<T>, class Index = int64_t>
struct BackwardCell : Unit<Index> {
  using S = Compute<T>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;

  struct Given {
    Pack<T, kUnits> saved[A + 1], h_before, h_after, doutput, dh_n;
    Pack<S, kUnits> c_before, c_after, dh, dc;
  };
  struct Result {
    S dx[G][kUnits], own[R + 1][kUnits], dh[kUnits], dc[kUnits], hidden[kUnits];

    // The gradient of the recurrent products of a gate.
    FASTRNN_FN const S (&dr(int k) const)[kUnits] { return k < G - R ? dx[k] : own[k - (G - R)]; }
  };

  const BackwardArgs& a;
  Index data_row, row_before;  // of this row, in this step and the one before
  bool continues;              // took part in the step run before, whose gradients the panels hold
  bool is_first;               // its first step

  FASTRNN_FN BackwardCell(const BackwardArgs& args, const StepRows& rows, const Unit<Index>& unit)
      : Unit<Index>(unit),
        a(args),
        data_row(static_cast<Index>(rows.row) + unit.b),
        row_before(static_cast<Index>(rows.row_before) + unit.b),
        continues(unit.b < static_cast<Index>(rows.count_next)),
        is_first(unit.b >= static_cast<Index>(rows.count_before)) {}

  FASTRNN_FN Index H() const { return static_cast<Index>(a.H); }
  FASTRNN_FN int64_t state() const { return Unit<Index>::state(a); }
  FASTRNN_FN int64_t element(Index row, int count) const {  // of an array over time [D, N, count, H]
    return Unit<Index>::element(this->d * static_cast<Index>(a.N) + row, count * H(), this->j);
  }
  FASTRNN_FN int64_t output_element(Index row) const {  // [N, D, H]
    return Unit<Index>::element(row, static_cast<Index>(a.D) * H(), this->d * H() + this->j);
  }
  // Whether the h before the step is needed, or kept.
  FASTRNN_FN bool has_h() const { return !a.projected && (!Cell::kHasC || a.before); }

  FASTRNN_FN Given fetch() const {
    Given given = {};
    const T* const saved = at<T>(a.saved) + element(data_row, A);
    FASTRNN_UNROLL
    for (int k = 0; k < A; ++k) given.saved[k] = cuda::fetch<T, kUnits>(saved + k * H());
    if (Cell::kHasC) {
      given.c_after = cuda::fetch<S, kUnits>(at<S>(a.cells) + element(data_row, 1));
      if (is_first)
        load_or_zero<T, kUnits>(at<T>(a.c0), state(), given.c_before.unit);
      else
        given.c_before = cuda::fetch<S, kUnits>(at<S>(a.cells) + element(row_before, 1));
      if (continues)
        given.dc = cuda::fetch<S, kUnits>(at<S>(a.dc) + state());
      else
        load_or_zero<T, kUnits>(at<T>(a.dc_n), state(), given.dc.unit);
    }
    if (has_h()) {
      given.h_after = cuda::fetch<T, kUnits>(at<T>(a.output) + output_element(data_row));
      given.h_before = is_first ? fetch_or_zeros<T, kUnits>(at<T>(a.h0), state())
                                : cuda::fetch<T, kUnits>(at<T>(a.output) + output_element(row_before));
    }
    if (a.projected) return given;  // the product is the whole gradient of h
    if (continues)
      given.dh = cuda::fetch<S, kUnits>(at<S>(a.dh) + state());
    else
      given.dh_n = fetch_or_zeros<T, kUnits>(at<T>(a.dh_n), state());
    given.doutput = fetch_or_zeros<T, kUnits>(at<T>(a.doutput), output_element(data_row));
    return given;
  }

  // product: the gradient of h that comes through the recurrent products of the step run before.
  FASTRNN_FN Result compute(const Given& given, const S (&product)[kUnits]) const {
    Result result;
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      S gradient = a.projected ? product[i] : continues ? product[i] + given.dh.unit[i] : widen(given.dh_n.unit[i]);
      if (!a.projected) gradient += widen(given.doutput.unit[i]);
      V si[A + 1], xi[G], ri[R + 1], dh = gradient, dc = given.dc.unit[i];
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) si[k] = widen(given.saved[k].unit[i]);
      const V c_after = given.c_after.unit[i];
      if constexpr (Cell::kHasC) result.hidden[i] = Cell::hidden(si, c_after);
      Cell::backward(si, V(widen(given.h_before.unit[i])), V(given.c_before.unit[i]), V(widen(given.h_after.unit[i])),
                     c_after, dh, dc, xi, ri);
      result.dh[i] = dh, result.dc[i] = dc;
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) result.dx[k][i] = xi[k];
      FASTRNN_UNROLL
      for (int k = 0; k < R; ++k) result.own[k][i] = ri[k];
    }
    return result;
  }

  FASTRNN_FN void store(const Given& given, const Result& result) const {
    if (has_h() && a.before)
      *reinterpret_cast<Pack<T, kUnits>*>(at<T>(a.before) + element(data_row, 1)) = given.h_before;
    if (Cell::kHasC && a.projected) cuda::store<T, kUnits>(at<T>(a.unprojected) + element(data_row, 1), result.hidden);
    T *const dgates = at<T>(a.dgates) + element(data_row, G), *const own = at<T>(a.drecurrent) + element(data_row, R);
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) cuda::store<T, kUnits>(dgates + k * H(), result.dx[k]);
    FASTRNN_UNROLL
    for (int k = 0; k < R; ++k) cuda::store<T, kUnits>(own + k * H(), result.own[k]);
    if (!a.projected) cuda::store<S, kUnits>(at<S>(a.dh) + state(), result.dh);
    if (Cell::kHasC) cuda::store<S, kUnits>(at<S>(a.dc) + state(), result.dc);
  }

  // The gradients of the initial states of a row that has run its first step.
  FASTRNN_FN void leave(const S (&product)[kUnits]) const {
    S unit[kUnits];
    if (a.dh0 && !a.projected) {
      load<S, kUnits>(at<S>(a.dh) + state(), unit);
      FASTRNN_UNROLL
      for (int i = 0; i < kUnits; ++i) unit[i] += product[i];
      cuda::store<T, kUnits>(at<T>(a.dh0) + state(), unit);
    }
    if (!Cell::kHasC || !a.dc0) return;
    load<S, kUnits>(at<S>(a.dc) + state(), unit);
    cuda::store<T, kUnits>(at<T>(a.dc0) + state(), unit);
  }
};

}  // namespace fastrnn::cuda
