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
    constexpr int G = Cell::kGates;
    const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
    const StepRows rows = a.rows_of(d);
    if (b >= rows.count) return;
    const ForwardCell<Cell, T, kUnits> cell(a, rows, {d, b, j});
    const auto given = cell.fetch();
    S r[G][kUnits];
    FASTRNN_UNROLL
    for (int k = 0; k < G; ++k) load<S, kUnits>(at<S>(a.product) + ((d * a.product_rows + b) * G + k) * a.H + j, r[k]);
    cell.store(cell.compute(given, cell.bias(a, cell), r));
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
