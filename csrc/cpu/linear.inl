// What surrounds the recurrence on the CPU, included by scan.inl: conversions between storage and compute types, the
// input product of a few rows, sums over rows.

// target[0..count) = source[0..count), between a 16-bit storage type and float.
template <class To, class From>
void convert(const From* source, To* target, int64_t count) {
  constexpr int kLanes = Vec<float>::kLanes;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store(target + i, load(source + i, n), n);
  }
}

inline void to_float(Dtype dtype, const void* source, float* target, int64_t count) {
  if (dtype == Dtype::kBFloat16)
    convert(static_cast<const BFloat16*>(source), target, count);
  else
    convert(static_cast<const Half*>(source), target, count);
}
inline void from_float(Dtype dtype, const float* source, void* target, int64_t count) {
  if (dtype == Dtype::kBFloat16)
    convert(source, static_cast<BFloat16*>(target), count);
  else
    convert(source, static_cast<Half*>(target), count);
}

// Computes   result [rows, columns] = input [rows, K] * weight [columns, K]^T for columns of blocks [begin, end)
// Work       kLinearBlock columns each; for few rows: every weight is read once per row, from L1 but the first time
template <class T, class W>
void linear_blocks(const T* input, const W* weight, const Compute<T>* scale, Compute<T>* result, int64_t rows,
                   int64_t columns, int64_t K, int64_t begin, int64_t end) {
  using S = Compute<T>;
  constexpr int kLanes = Vec<S>::kLanes;
  const bool cached = columns * K * static_cast<int64_t>(sizeof(W)) <= kCachedBytes;
  alignas(64) S panel[kMaxLinearRows][kLinearChunk];
  for (int64_t column = begin * kLinearBlock; column < end * kLinearBlock && column < columns; column += kLanes) {
    const int n = columns - column < kLanes ? static_cast<int>(columns - column) : kLanes;
    for (int64_t r = 0; r < rows; ++r) store(result + r * columns + column, Vec<S>(S(0)), n);
  }
  for (int64_t k = 0; k < K; k += kLinearChunk) {
    const int64_t width = K - k < kLinearChunk ? K - k : kLinearChunk;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; i += kLanes) {
        const int n = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
        store(panel[r] + i, load(input + r * K + k + i, n), n);
      }
    for (int64_t column = begin * kLinearBlock; column < end * kLinearBlock && column < columns; column += kLanes) {
      const int n = columns - column < kLanes ? static_cast<int>(columns - column) : kLanes;
      const W* row[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) row[lane] = weight + (column + (lane < n ? lane : n - 1)) * K + k;
      const Vec<S> factor = scale ? load(scale + column, n) : Vec<S>(S(1));
      for (int64_t r = 0; r < rows; ++r) {
        S* target = result + r * columns + column;
        store(target, fma(factor, dot_lanes(row, panel[r], width, cached ? 0 : kLanes * K), load(target, n)), n);
      }
    }
  }
}

inline void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  const auto run = [&](auto storage, auto weight) {
    using T = decltype(storage);
    linear_blocks(static_cast<const T*>(a.input), static_cast<const decltype(weight)*>(a.weight),
                  static_cast<const Compute<T>*>(a.scale), static_cast<Compute<T>*>(a.result), a.rows, a.columns, a.K,
                  begin, end);
  };
  if (a.weight_type == WeightType::kBFloat16)
    run(float(), BFloat16());
  else if (a.weight_type == WeightType::kInt8)
    run(float(), Int8());
  else if (a.dtype == Dtype::kFloat)
    run(float(), float());
  else if (a.dtype == Dtype::kDouble)
    run(double(), double());
  else if (a.dtype == Dtype::kBFloat16)
    run(BFloat16(), BFloat16());
  else
    run(Half(), Half());
}

// target[0..count) += source[0..count)
template <class S>
void add_of(const S* source, S* target, int64_t count) {
  constexpr int kLanes = Vec<S>::kLanes;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store(target + i, load(target + i, n) + load(source + i, n), n);
  }
}

inline void add(bool is_double, const void* source, void* target, int64_t count) {
  if (is_double)
    add_of(static_cast<const double*>(source), static_cast<double*>(target), count);
  else
    add_of(static_cast<const float*>(source), static_cast<float*>(target), count);
}

// sums [columns] of source [rows, columns] (row stride `stride`) for columns [begin, end): in parts of kSumRows rows,
// so that the error grows with the square root of the parts and not with all rows.
template <class S>
void sum_rows_of(const S* source, S* sums, int64_t rows, int64_t stride, int64_t begin, int64_t end) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes, kWide = 4;
  for (int64_t j = begin; j < end; j += kWide * kLanes) {
    V total[kWide];
    int n[kWide];
    for (int w = 0; w < kWide; ++w) {
      const int64_t left = end - j - w * kLanes;
      n[w] = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
      total[w] = V(S(0));
    }
    for (int64_t first = 0; first < rows; first += kSumRows) {
      const int64_t last = rows - first < kSumRows ? rows : first + kSumRows;
      V part[kWide];
      for (int w = 0; w < kWide; ++w) part[w] = V(S(0));
      for (int64_t r = first; r < last; ++r)
        for (int w = 0; w < kWide; ++w)
          if (n[w]) part[w] = part[w] + load(source + r * stride + j + w * kLanes, n[w]);
      for (int w = 0; w < kWide; ++w) total[w] = total[w] + part[w];
    }
    for (int w = 0; w < kWide; ++w)
      if (n[w]) store(sums + j + w * kLanes, total[w], n[w]);
  }
}

inline void sum_rows(bool is_double, const void* source, void* sums, int64_t rows, int64_t stride, int64_t begin,
                     int64_t end) {
  if (is_double)
    sum_rows_of(static_cast<const double*>(source), static_cast<double*>(sums), rows, stride, begin, end);
  else
    sum_rows_of(static_cast<const float*>(source), static_cast<float*>(sums), rows, stride, begin, end);
}
