// Rows of an array in a new order: how padded data is packed and packed data padded.
//
// Computes   made[m, j] = rows[m, index[j]], zeros where index[j] = n, for made [M, J, width] and rows [M, n, width]
// Work       every row of the result is written once
// Memory     none of its own
// Requires   arrays of M n and M J rows that do not overlap; the index [J] is compared with n here
// Order      none: rows do not depend on each other
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>

namespace fastrnn {

// Whether every index was from 0 to n; otherwise the result is not to be used.
inline bool select_rows(const char* rows, int64_t M, int64_t n, const int64_t* index, int64_t J, size_t row_bytes,
                        char* made) {
  constexpr size_t kMinBytesPerThread = size_t{1} << 18;  // as many elements as for other passes (products.cpp)
  const int64_t grain = static_cast<int64_t>(kMinBytesPerThread / (row_bytes + 1)) + 1;
  std::atomic<bool> is_inside{true};
  torch::stable::parallel_for(0, M * J, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = index[i % J];
      char* const target = made + static_cast<size_t>(i) * row_bytes;
      if (from >= 0 && from < n)
        std::memcpy(target, rows + static_cast<size_t>(i / J * n + from) * row_bytes, row_bytes);
      else if (from == n)
        std::memset(target, 0, row_bytes);
      else
        is_inside = false;
    }
  });
  return is_inside;
}

}  // namespace fastrnn
