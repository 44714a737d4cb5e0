// The kernels at boundaries of step_kernels.inl, which includes this file.

template <class T>
struct ForwardBoundary {
  ForwardBoundaryArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    const int64_t width = a.H > a.P ? a.H : a.P, d = thread.group, b = thread.item / width, j = thread.item % width;
    const StepRows rows = a.rows_of(d);
    if (b >= rows.count) return;
    const int64_t k = a.entering(rows, d, b), row = d * a.B + b, source = d * a.K + k;
    if (k < 0) return;
    S unit;
    if (j < a.P) {
      load_or_zero<T, 1>(at<T>(a.h0), source * a.P + j, &unit);
      store<T, 1>(at<T>(a.h) + row * a.P + j, &unit);
    }
    if (j >= a.H || !a.c) return;
    load_or_zero<T, 1>(at<T>(a.c0), source * a.H + j, &unit);
    store<S, 1>(at<S>(a.c) + row * a.H + j, &unit);
  }
};

template <class T>
struct BackwardBoundary {
  using S = Compute<T>;
  BackwardBoundaryArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const int64_t width = a.H > a.P ? a.H : a.P, d = thread.group, b = thread.item / width, j = thread.item % width;
    const StepRows rows = a.rows_of(d);
    const bool is_active = b < rows.count, continues = b < rows.count_next;
    if (!is_active && !continues) return;
    const int64_t k_behind = continues ? a.entering(a.behind_of(d), d, b) : -1;
    const int64_t k = is_active ? a.entering(rows, d, b) : -1;
    const int64_t row = d * a.B + b, sum = d * a.K + k_behind, source = d * a.K + k;
    if (j < a.P) {
      S& product = at<S>(a.product)[(d * a.product_rows + b) * a.P + j];
      S* const direct = a.dh ? at<S>(a.dh) + row * a.P + j : nullptr;
      if (k_behind >= 0) {
        if (a.dh_sum) at<S>(a.dh_sum)[sum * a.P + j] += direct ? product + *direct : product;
        product = 0;
      }
      if (!continues) load_or_zero<T, 1>(at<T>(a.dh_n), row * a.P + j, &product);
      if (direct && (!continues || k_behind >= 0)) *direct = 0;
      if (is_active && a.h_before) {
        T& h = at<T>(a.h_before)[row * a.P + j];
        if (k < 0)
          h = at<T>(a.output)[((rows.row_before + b) * a.D + d) * a.P + j];
        else if (a.h0)
          h = at<T>(a.h0)[source * a.P + j];
        else
          narrow(S(0), h);
      }
    }
    if (j >= a.H || !a.dc) return;
    S& dc = at<S>(a.dc)[row * a.H + j];
    if (k_behind >= 0) {
      if (a.dc_sum) at<S>(a.dc_sum)[sum * a.H + j] += dc;
      dc = 0;
    }
    if (!continues) load_or_zero<T, 1>(at<T>(a.dc_n), row * a.H + j, &dc);
    if (!is_active) return;
    if (a.dcells) dc += at<S>(a.dcells)[(d * a.N + rows.row + b) * a.H + j];
    S& c = at<S>(a.c_before)[row * a.H + j];
    if (k < 0)
      c = at<S>(a.cells)[(d * a.N + rows.row_before + b) * a.H + j];
    else
      load_or_zero<T, 1>(at<T>(a.c0), source * a.H + j, &c);
  }
};
