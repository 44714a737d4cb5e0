// The matrix products behind a backward scan, included by scan.inl: the gradients of weights and input.
//
// Computes   target [rows, columns] (+)= a [rows, K] * b [K, columns]
// Work       the tiles of `product`: b is packed, a copied (or turned) into a panel of kMaxRunRows rows at a time.
// Where
//            K is at most kFewTerms neither pays: a row of target is a sum of so many rows of b
// Memory     packed b; a panel per thread; target read and written once
// Requires   the caller cuts K so that a panel stays in the second cache
// Order      of a sum: k ascending, and its total added to target at the end, whatever rows a thread has

inline PackedShape shape_of(const ProductArgs& p, int lanes) { return {p.columns, 1, p.K, lanes}; }

constexpr int64_t kFewTerms = 4;
static_assert(kMatrixRows == kMaxRunRows, "a panel is one run");

inline size_t matrix_bytes(const ProductArgs& p) {
  if (p.K <= kFewTerms) return 0;
  return p.is_double ? static_cast<size_t>(shape_of(p, Vec<double>::kLanes).size()) * sizeof(double)
                     : static_cast<size_t>(shape_of(p, Vec<float>::kLanes).size()) * sizeof(float);
}
inline size_t matrix_panel_bytes(const ProductArgs& p) {
  return p.is_double ? static_cast<size_t>(kMaxRunRows * panel_stride<double>(p.K)) * sizeof(double)
                     : static_cast<size_t>(kMaxRunRows * panel_stride<float>(p.K)) * sizeof(float);
}
inline int64_t matrix_blocks(const ProductArgs& p) {
  if (p.K <= kFewTerms) return 0;
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
    pack_columns(static_cast<const T*>(p.b), p.b_row, shape_of(p, Vec<Compute<T>>::kLanes), block,
                 static_cast<Compute<T>*>(packed));
  });
}

template <class T>
void multiply_few_terms(const ProductArgs& p, int64_t first, int64_t last) {
  using V = Vec<Compute<T>>;
  using S = Compute<T>;
  for (int64_t r = first; r < last; ++r) {
    const S* a = static_cast<const S*>(p.a) + r * p.a_row;
    S* target = static_cast<S*>(p.target) + r * p.target_row;
    for (int64_t j = 0; j < p.columns; j += V::kLanes) {
      const int n = p.columns - j < V::kLanes ? static_cast<int>(p.columns - j) : V::kLanes;
      V sum(S(0));
      for (int64_t k = 0; k < p.K; ++k)
        sum = fma(V(a[k * p.a_k]), load(static_cast<const T*>(p.b) + k * p.b_row + j, n), sum);
      store(target + j, p.add ? load(target + j, n) + sum : sum, n);
    }
  }
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
  if (p.K <= kFewTerms)
    with_b_type(p, [&](auto type) { multiply_few_terms<decltype(type)>(p, first, last); });
  else if (p.is_double)
    multiply_panels(p, static_cast<const double*>(packed), static_cast<double*>(panel), first, last);
  else
    multiply_panels(p, static_cast<const float*>(packed), static_cast<float*>(panel), first, last);
}
