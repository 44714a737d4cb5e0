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

// Adds sums to others, and begins them anew.
template <class V, size_t count>
FASTRNN_INLINE void flush(V (&from)[count], V (&to)[count]) {
  for (size_t w = 0; w < count; ++w) to[w] = to[w] + from[w], from[w] = V(0.0);
}

// sums [columns] of source [rows, columns] (row stride `stride`) for columns [begin, end): in parts of kSumRows rows,
// and the parts again in groups of kSumRows, so that the longest chain of additions is of kSumRows for up to 262,144
// rows.
template <class S>
void sum_rows_of(const S* source, S* sums, int64_t rows, int64_t stride, int64_t begin, int64_t end) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes, kWide = 4;
  constexpr int64_t kGroupRows = kSumRows * kSumRows;
  for (int64_t j = begin; j < end; j += kWide * kLanes) {
    V total[kWide], group[kWide], part[kWide];
    int n[kWide];
    for (int w = 0; w < kWide; ++w) {
      const int64_t left = end - j - w * kLanes;
      n[w] = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
      total[w] = group[w] = part[w] = V(S(0));
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int w = 0; w < kWide; ++w)
        if (n[w]) part[w] = part[w] + load(source + r * stride + j + w * kLanes, n[w]);
      if ((r + 1) % kSumRows == 0) flush(part, group);
      if ((r + 1) % kGroupRows == 0) flush(group, total);
    }
    flush(part, group), flush(group, total);
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
