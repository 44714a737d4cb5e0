// The matrix products behind a backward scan, included by scan.inl: the gradients of weights and input.
//
// Computes   target [rows, columns] (+)= a [rows, K] * b [K, columns]; b may be a list of where its rows lie
// Work       the tiles of `product`: b is packed, a copied (or turned) into a panel of kMaxRunRows rows at a time.
//            Where K is at most kFewTerms, or target has at most kFewRows rows, neither pays: b is read where it lies,
//            kFewTerms of its rows at a time, and their sum written, or added, to a row of target
// Memory     packed b; a panel per thread; target read and written once
// Requires   the caller cuts K so that a panel stays in the second cache
// Order      of a sum: k ascending, and its total added to target at the end, whatever rows a thread has; of few rows:
//            kFewTerms terms at a time, kChunk of them added up on their own

inline PackedShape shape_of(const ProductArgs& p, int lanes) { return {p.columns, 1, p.K, lanes}; }

constexpr int64_t kFewTerms = 4, kFewRows = 2;
static_assert(kMatrixRows == kMaxRunRows, "a panel is one run");

inline bool is_small(const ProductArgs& p) { return p.K <= kFewTerms || p.rows <= kFewRows; }

inline size_t matrix_bytes(const ProductArgs& p) {
  if (is_small(p)) return 0;
  return p.is_double ? static_cast<size_t>(shape_of(p, Vec<double>::kLanes).size()) * sizeof(double)
                     : static_cast<size_t>(shape_of(p, Vec<float>::kLanes).size()) * sizeof(float);
}
inline size_t matrix_panel_bytes(const ProductArgs& p) {
  if (is_small(p)) return static_cast<size_t>(p.columns) * (p.is_double ? sizeof(double) : sizeof(float));
  return p.is_double ? static_cast<size_t>(kMaxRunRows * panel_stride<double>(p.K)) * sizeof(double)
                     : static_cast<size_t>(kMaxRunRows * panel_stride<float>(p.K)) * sizeof(float);
}
inline int64_t matrix_blocks(const ProductArgs& p) {
  if (is_small(p)) return 0;
  return shape_of(p, p.is_double ? Vec<double>::kLanes : Vec<float>::kLanes).blocks;
}

// Calls f(a value of the type of b).
template <class F>
void with_b_type(const ProductArgs& p, F f) {
  switch (p.b_dtype) {
    case Dtype::kFloat:
      return f(float());
    case Dtype::kDouble:
      return f(double());
    case Dtype::kBFloat16:
      return f(BFloat16());
    default:
      return f(Half());
  }
}

inline void pack_matrix(const ProductArgs& p, void* packed, int64_t block) {
  with_b_type(p, [&](auto type) {
    using T = decltype(type);
    pack_columns<T>({p.b, p.b_row, p.b_is_list}, shape_of(p, Vec<Compute<T>>::kLanes), block,
                    static_cast<Compute<T>*>(packed));
  });
}

// target [columns] = sum of `terms` rows of b from row `first` on, each times its a; or added to target.
template <int terms, class T, class S>
void add_terms(const S* a, int64_t a_k, const MatrixRows<T>& b, int64_t first, S* target, int64_t columns, bool add) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  V factor[terms];
  const T* row[terms];
  for (int k = 0; k < terms; ++k) factor[k] = V(a[(first + k) * a_k]), row[k] = b[first + k];
  const auto column = [&](int64_t j, int n) {
    V sum = factor[0] * load(row[0] + j, n);
    for (int k = 1; k < terms; ++k) sum = fma(factor[k], load(row[k] + j, n), sum);
    store(target + j, add ? load(target + j, n) + sum : sum, n);
  };
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) column(j, kLanes);
  if (j < columns) column(j, static_cast<int>(columns - j));
}

// target [columns] = sum of at most kFewTerms rows of b from row `first` on, each times its a; or added to target.
template <class T, class S>
void add_few_terms(const S* a, int64_t a_k, const MatrixRows<T>& b, int64_t first, int64_t terms, S* target,
                   int64_t columns, bool add) {
  switch (terms) {
    case 1:
      return add_terms<1>(a, a_k, b, first, target, columns, add);
    case 2:
      return add_terms<2>(a, a_k, b, first, target, columns, add);
    case 3:
      return add_terms<3>(a, a_k, b, first, target, columns, add);
    default:
      return add_terms<kFewTerms>(a, a_k, b, first, target, columns, add);
  }
}

// target [columns] = sum of K rows of b, each times its a; or added to target. part: memory for `columns` elements.
template <class T, class S>
void sum_terms(const S* a, int64_t a_k, const MatrixRows<T>& b, int64_t K, S* target, int64_t columns, bool add,
               S* part) {
  for (int64_t j = 0; K == 0 && !add && j < columns; ++j) target[j] = 0;
  for (int64_t first = 0; first < K; first += kChunk, add = true) {
    const int64_t last = K - first < kChunk ? K : first + kChunk;
    S* sum = add ? part : target;
    for (int64_t k = first; k < last; k += kFewTerms) add_few_terms(a, a_k, b, k, last - k, sum, columns, k > first);
    if (add) {
      const S one = 1;
      add_terms<1>(&one, 0, MatrixRows<S>(part, 0), 0, target, columns, true);
    }
  }
}

template <class T>
void multiply_small(const ProductArgs& p, void* part, int64_t first, int64_t last) {
  using S = Compute<T>;
  for (int64_t r = first; r < last; ++r)
    sum_terms(static_cast<const S*>(p.a) + r * p.a_row, p.a_k, MatrixRows<T>(p.b, p.b_row, p.b_is_list), p.K,
              static_cast<S*>(p.target) + r * p.target_row, p.columns, p.add, static_cast<S*>(part));
}

// panel = rows [first, first + rows) of a
template <class S>
void fill_panel(const ProductArgs& p, int64_t first, int64_t rows, S* panel, int64_t stride) {
  constexpr int kLanes = Vec<S>::kLanes;
  const auto lanes_left = [](int64_t left) { return left < kLanes ? static_cast<int>(left) : kLanes; };
  const S* a = static_cast<const S*>(p.a) + first * p.a_row;
  if (p.a_k == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < p.K; k += kLanes) {
        const int n = lanes_left(p.K - k);
        store(panel + r * stride + k, load(a + r * p.a_row + k, n), n);
      }
    return;
  }
  for (int64_t k = 0; k < p.K; k += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int width = lanes_left(p.K - k), height = lanes_left(rows - r);
      Vec<S> square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = i < width ? load(a + (k + i) * p.a_k + r, height) : Vec<S>(S(0));
      transpose<S>(square);
      for (int i = 0; i < height; ++i) store(panel + (r + i) * stride + k, square[i], kLanes);
    }
}

template <class S>
void multiply_panels(const ProductArgs& p, const S* packed, S* panel, int64_t first, int64_t last) {
  constexpr int kLanes = Vec<S>::kLanes;
  const PackedShape shape = shape_of(p, kLanes);
  const int64_t stride = panel_stride<S>(p.K);
  RunSums<S> sums;
  for_parts(first, last, kMaxRunRows, [&](int64_t row, int64_t rows) {
    fill_panel(p, row, rows, panel, stride);
    runs(shape, 0, shape.blocks, 0, rows, [&](int64_t part, int64_t count, int64_t begin, int64_t end) {
      S* target = static_cast<S*>(p.target) + (row + part) * p.target_row;
      const int64_t vectors = shape.vectors_in(begin, end), row_sums = shape.columns(begin, end) * kLanes;
      const int64_t column = shape.first_vector(begin) * kLanes;
      for (int64_t i = 0; p.add && i < count; ++i)
        for (int64_t j = 0; j < vectors * kLanes && column + j < p.columns; j += 64 / static_cast<int>(sizeof(S)))
          __builtin_prefetch(target + i * p.target_row + column + j, 1);
      product(panel + part * stride, stride, count, packed, shape, begin, end, sums.data);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t u = 0; u < vectors; ++u) {
          const int64_t j = column + u * kLanes;
          const int n = p.columns - j < kLanes ? static_cast<int>(p.columns - j) : kLanes;
          Vec<S> sum = load(sums.data + i * row_sums + u * kLanes, kLanes);
          if (p.add) sum = load(target + i * p.target_row + j, n) + sum;
          store(target + i * p.target_row + j, sum, n);
        }
    });
  });
}

// Rows [first, last) of target.
inline void multiply_matrix(const ProductArgs& p, const void* packed, void* panel, int64_t first, int64_t last) {
  if (is_small(p))
    with_b_type(p, [&](auto type) { multiply_small<decltype(type)>(p, panel, first, last); });
  else if (p.is_double)
    multiply_panels(p, static_cast<const double*>(packed), static_cast<double*>(panel), first, last);
  else
    multiply_panels(p, static_cast<const float*>(packed), static_cast<float*>(panel), first, last);
}
