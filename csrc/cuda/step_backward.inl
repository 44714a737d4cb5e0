// The backward kernels of step_kernels.inl, which includes this file.

// kOfPanel: the c that entered the step lies in c_before.
template <class Cell, class T, int kUnits, bool kOfPanel>
FASTRNN_FN void backward_step(const BackwardArgs& a, Thread thread) {
  using S = Compute<T>;
  const int64_t H = a.H / kUnits, b = thread.item / H, j = thread.item % H * kUnits, d = thread.group;
  const StepRows rows = a.rows_of(d);
  const BackwardCell<Cell, T, kUnits> cell(a, rows, {d, b, j});
  const bool is_active = b < rows.count;
  if (!is_active && !cell.continues) return;
  S product[kUnits] = {};
  if (a.projected || cell.continues) load<S, kUnits>(at<S>(a.product) + (d * a.product_rows + b) * a.H + j, product);
  if (!is_active) return cell.leave(product);
  auto given = cell.fetch();
  if constexpr (kOfPanel) given.c_before = fetch<S, kUnits>(at<S>(a.c_before) + cell.state());
  const auto result = cell.compute(given, product);
  cell.store(given, result);
  FASTRNN_UNROLL
  for (int k = 0; k < Cell::kGates; ++k)
    store<T, kUnits>(at<T>(a.dr) + ((d * a.B + b) * Cell::kGates + k) * a.H + j, result.dr(k));
}

template <class Cell, class T, int kUnits>
struct Backward {
  BackwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const { backward_step<Cell, T, kUnits, false>(a, thread); }
  static constexpr int kWidth = kUnits;
  static bool is_aligned(const BackwardArgs& a) { return are_aligned(a, kUnits); }
};

// Behind BackwardBoundary, which has left everything in panels: for it every row continues, and the step is its first.
// h0 is the panel of the h that entered; that of c is not in the dtype of c0, so cells with c read it from c_before.
template <class Cell, class T, int kUnits>
struct BackwardOfC {
  BackwardArgs a;

  FASTRNN_FN void operator()(Thread thread) const { backward_step<Cell, T, kUnits, true>(a, thread); }
  static constexpr int kWidth = kUnits;
  static bool is_aligned(const BackwardArgs& a) { return are_aligned(a, kUnits); }
};
template <class Cell, class T, int kUnits>
using BackwardOfPanels = std::conditional_t<Cell::kHasC, BackwardOfC<Cell, T, kUnits>, Backward<Cell, T, kUnits>>;

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
