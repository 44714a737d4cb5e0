// A step of a cell for kUnits neighbouring hidden units of one row, by one thread: what it reads, what it computes,
// what it writes. Forward: csrc/scan.h of ScanArgs; backward of ScanBackwardArgs. Pointers and rows as in
// step_kernels.h.
//
// In three parts, as a kernel may have something to wait for between them: `fetch` starts all reads that do not depend
// on the recurrent products and looks at no number; `compute` takes them with the products; `store` writes the results.
#pragma once

#include "machine.h"

namespace fastrnn::cuda {

// kUnits neighbours as they lie in memory.
template <class F, int kUnits>
FASTRNN_FN Pack<F, kUnits> fetch(const F* source) {
  check_alignment<F, kUnits>(source);
  return *reinterpret_cast<const Pack<F, kUnits>*>(source);
}
template <class F, int kUnits>
FASTRNN_FN Pack<F, kUnits> zeros() {
  Pack<F, kUnits> pack;
  FASTRNN_UNROLL
  for (int i = 0; i < kUnits; ++i) narrow(Compute<F>(0), pack.unit[i]);
  return pack;
}
template <class F, int kUnits>
FASTRNN_FN Pack<F, kUnits> fetch_or_zeros(const F* array, int64_t index) {
  if (array) return fetch<F, kUnits>(array + index);
  return zeros<F, kUnits>();
}

template <class Cell, class T, int kUnits>
struct ForwardCell {
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
  const StepRows& rows;
  int64_t d, b, j;

  FASTRNN_FN int64_t state() const { return (d * a.B + b) * a.H + j; }

  FASTRNN_FN Given fetch() const {
    Given given;
    const S* const gates = at<S>(a.gates) + (d * a.gates_rows + rows.gates_row + b) * G * a.H + j;
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) given.x[k] = cuda::fetch<S, kUnits>(gates + k * a.H);
    given.h = fetch_or_zeros<T, kUnits>(a.projected ? nullptr : at<T>(a.h), state());
    given.c = fetch_or_zeros<S, kUnits>(Cell::kHasC ? at<S>(a.c) : nullptr, state());
    return given;
  }

  // The same in all steps.
  FASTRNN_FN Bias bias() const {
    Bias bias;
    FASTRNN_UNROLL
    for (int k = 0; k < G + R; ++k) bias.of[k] = fetch_or_zeros<S, kUnits>(at<S>(a.bias), (d * (G + R) + k) * a.H + j);
    return bias;
  }

  // r: recurrent products, without bias.
  FASTRNN_FN Result compute(const Given& given, const Bias& bias, const S (&r)[G][kUnits]) const {
    Result result;
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      S xi[G], ri[G], si[A + 1], h = widen(given.h.unit[i]), c = given.c.unit[i];
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
    const int64_t data_row = rows.row + b, row = d * a.N + data_row;
    const bool is_last = b >= rows.count_next;
    if (Cell::kHasC) {
      cuda::store<S, kUnits>(at<S>(a.c) + state(), result.c);
      if (a.cells) cuda::store<S, kUnits>(at<S>(a.cells) + row * a.H + j, result.c);
      if (is_last) cuda::store<T, kUnits>(at<T>(a.c_n) + state(), result.c);
    }
    if (a.saved) FASTRNN_UNROLL
    for (int k = 0; k < A; ++k) cuda::store<T, kUnits>(at<T>(a.saved) + (row * A + k) * a.H + j, result.saved[k]);
    if (a.projected) return cuda::store<S, kUnits>(at<S>(a.m) + (d * a.product_rows + b) * a.H + j, result.h);
    cuda::store<T, kUnits>(at<T>(a.h) + state(), result.h);
    cuda::store<T, kUnits>(at<T>(a.output) + (data_row * a.D + d) * a.H + j, result.h);
    if (is_last) cuda::store<T, kUnits>(at<T>(a.h_n) + state(), result.h);
  }
};

template <class Cell, class T, int kUnits>
struct BackwardCell {
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
  const StepRows& rows;
  int64_t d, b, j;

  FASTRNN_FN int64_t state() const { return (d * a.B + b) * a.H + j; }
  // Took part in the step run before, whose gradients the panels hold.
  FASTRNN_FN bool continues() const { return b < rows.count_next; }
  // Whether the h before the step is needed, or kept.
  FASTRNN_FN bool has_h() const { return !a.projected && (!Cell::kHasC || a.before); }

  FASTRNN_FN Given fetch() const {
    Given given = {};
    const int64_t data_row = rows.row + b, row = d * a.N + data_row, row_before = rows.row_before + b;
    const bool is_first = b >= rows.count_before;
    FASTRNN_UNROLL
    for (int k = 0; k < A; ++k) given.saved[k] = cuda::fetch<T, kUnits>(at<T>(a.saved) + (row * A + k) * a.H + j);
    if (Cell::kHasC) {
      given.c_after = cuda::fetch<S, kUnits>(at<S>(a.cells) + row * a.H + j);
      if (is_first)
        load_or_zero<T, kUnits>(at<T>(a.c0), state(), given.c_before.unit);
      else
        given.c_before = cuda::fetch<S, kUnits>(at<S>(a.cells) + (d * a.N + row_before) * a.H + j);
      if (continues())
        given.dc = cuda::fetch<S, kUnits>(at<S>(a.dc) + state());
      else
        load_or_zero<T, kUnits>(at<T>(a.dc_n), state(), given.dc.unit);
    }
    if (has_h()) {
      given.h_after = cuda::fetch<T, kUnits>(at<T>(a.output) + (data_row * a.D + d) * a.H + j);
      given.h_before = is_first ? fetch_or_zeros<T, kUnits>(at<T>(a.h0), state())
                                : cuda::fetch<T, kUnits>(at<T>(a.output) + (row_before * a.D + d) * a.H + j);
    }
    if (a.projected) return given;  // the product is the whole gradient of h
    if (continues())
      given.dh = cuda::fetch<S, kUnits>(at<S>(a.dh) + state());
    else
      given.dh_n = fetch_or_zeros<T, kUnits>(at<T>(a.dh_n), state());
    given.doutput = fetch_or_zeros<T, kUnits>(at<T>(a.doutput), (data_row * a.D + d) * a.H + j);
    return given;
  }

  // product: the gradient of h that comes through the recurrent products of the step run before.
  FASTRNN_FN Result compute(const Given& given, const S (&product)[kUnits]) const {
    Result result;
    FASTRNN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      S si[A + 1], xi[G], ri[R + 1], dc = given.dc.unit[i];
      S dh = a.projected ? product[i] : continues() ? product[i] + given.dh.unit[i] : widen(given.dh_n.unit[i]);
      if (!a.projected) dh += widen(given.doutput.unit[i]);
      FASTRNN_UNROLL
      for (int k = 0; k < A; ++k) si[k] = widen(given.saved[k].unit[i]);
      const S c_after = given.c_after.unit[i];
      if constexpr (Cell::kHasC) result.hidden[i] = Cell::hidden(si, c_after);
      Cell::backward(si, S(widen(given.h_before.unit[i])), given.c_before.unit[i], S(widen(given.h_after.unit[i])),
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
    const int64_t row = d * a.N + rows.row + b;
    if (has_h() && a.before) *reinterpret_cast<Pack<T, kUnits>*>(at<T>(a.before) + row * a.H + j) = given.h_before;
    if (Cell::kHasC && a.projected) cuda::store<T, kUnits>(at<T>(a.unprojected) + row * a.H + j, result.hidden);
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) cuda::store<T, kUnits>(at<T>(a.dgates) + (row * G + k) * a.H + j, result.dx[k]);
    FASTRNN_UNROLL
    for (int k = 0; k < R; ++k) cuda::store<T, kUnits>(at<T>(a.drecurrent) + (row * R + k) * a.H + j, result.own[k]);
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
