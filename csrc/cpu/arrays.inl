// What surrounds the recurrence on the CPU, included by scan.inl: conversion to the storage types, sums.

// target[0..count) = source[0..count), between a 16-bit storage type and float.
template <class To, class From>
void convert(const From* source, To* target, int64_t count) {
  constexpr int kLanes = Vec<float>::kLanes;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store(target + i, load(source + i, n), n);
  }
}

inline void from_float(Dtype dtype, const float* source, void* target, int64_t count) {
  if (dtype == Dtype::kBFloat16)
    convert(source, static_cast<BFloat16*>(target), count);
  else
    convert(source, static_cast<Half*>(target), count);
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
