// The backward kernels of step_kernels.inl, which includes this file.

template <class Cell, class T, int kUnits>
struct Backward {
  BackwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
    const StepRows rows = a.rows_of(d);
    const int64_t state = (d * a.B + b) * a.H + j;
    const bool continues = b < rows.count_next;  // took part in the step run before, whose gradients the panels hold
    if (b >= rows.count) return continues ? leave(state, (d * a.product_rows + b) * a.H + j) : void();
    const int64_t data_row = rows.row + b, row = d * a.N + data_row;
    const bool is_first = b >= rows.count_before;
    const int64_t row_before = rows.row_before + b;
    S saved[A + 1][kUnits], dh[kUnits], dc[kUnits];
    load_gates<T, kUnits, A>(at<T>(a.saved) + row * A * a.H + j, a.H, saved);
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
  static constexpr int kWidth = kUnits;
  static bool is_aligned(const BackwardArgs& a) { return are_aligned(a, kUnits); }
};

template <class T>
struct BackwardProject {
  BackwardProjectArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    const int64_t b = thread.item / a.P, j = thread.item % a.P, d = thread.group;
    const StepRows rows = a.rows_of(d);
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
};
