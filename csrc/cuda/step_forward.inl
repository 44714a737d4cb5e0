// The forward kernels of step_kernels.inl, which includes this file.

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

template <class Cell, class T, int kUnits>
struct Forward {
  ForwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using S = Compute<T>;
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
    const StepRows rows = a.rows_of(d);
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
  static constexpr int kWidth = kUnits;
  static bool is_aligned(const ForwardArgs&) { return true; }  // all of its arrays are our own
};

template <class T>
struct Project {
  ProjectArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const int64_t b = thread.item / a.P, j = thread.item % a.P, d = thread.group;
    const StepRows rows = a.rows_of(d);
    if (b >= rows.count) return;
    const int64_t state = (d * a.B + b) * a.P + j;
    T h;
    narrow(at<Compute<T>>(a.product)[(d * a.product_rows + b) * a.P + j], h);
    at<T>(a.h)[state] = h;
    at<T>(a.output)[((rows.row + b) * a.D + d) * a.P + j] = h;
    if (b >= rows.count_next) at<T>(a.h_n)[state] = h;
  }
};
