#include "products.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/scan_cpu.h"

namespace fastrnn {
namespace {

// Elements or multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kMinElementsPerThread = 1 << 16;
// Rows of one product of a long sum. A small product of MKL's adds row after row to one accumulator: over 64,000 rows
// that is an error of 1e-5, and 1.8e-7 if each 512 rows are added up on their own. Large ones are cut by MKL itself.
constexpr int64_t kSmallProduct = 1 << 16, kSmallProductRows = 512, kProductRows = 8192;

template <class F>
void in_parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain)
    f(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

bool is_16_bit(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kHalf; }

}  // namespace

Tensor to_compute(const Tensor& t, Dtype dtype) {
  if (!is_16_bit(dtype)) return t;
  const Tensor result = make(sizes_of(t), ScalarType::Float);
  const char* source = static_cast<const char*>(t.const_data_ptr());
  float* target = static_cast<float*>(result.mutable_data_ptr());
  in_parallel(t.numel(), kMinElementsPerThread, [&](int64_t begin, int64_t end) {
    cpu_kernels().to_float(dtype, source + 2 * begin, target + begin, end - begin);
  });
  return result;
}

Tensor to_storage(const Tensor& t, Dtype dtype, ScalarType storage) {
  if (!is_16_bit(dtype)) return t;
  const Tensor result = make(sizes_of(t), storage);
  const float* source = static_cast<const float*>(t.const_data_ptr());
  char* target = static_cast<char*>(result.mutable_data_ptr());
  in_parallel(t.numel(), kMinElementsPerThread, [&](int64_t begin, int64_t end) {
    cpu_kernels().from_float(dtype, source + begin, target + 2 * begin, end - begin);
  });
  return result;
}

void outer_product(const Tensor& result, int64_t target_row, int64_t target_rows, int64_t K, const Rows& a,
                   int64_t column, int64_t a_first, const Rows& b, int64_t b_first, int64_t rows, bool add) {
  const Tensor target = matrix(result, target_rows, K, K, 1, target_row * K);
  if (rows == 0 && !add) torch::stable::zero_(const_cast<Tensor&>(target));
  const int64_t most = target_rows * K <= kSmallProduct ? kSmallProductRows : kProductRows;
  OptionalTensor part;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    const Tensor x = a.block(a_first + first, count, column, target_rows, true),
                 y = b.block(b_first + first, count, 0, K);
    if (first == 0 && !add) {
      multiply(target, x, y);
      continue;
    }
    if (!part) part = make({target_rows, K}, result.scalar_type());
    multiply(*part, x, y);
    const size_t item = static_cast<size_t>(item_size(result.scalar_type()));
    char* sum = static_cast<char*>(result.mutable_data_ptr()) + static_cast<size_t>(target_row * K) * item;
    const char* summand = static_cast<const char*>(part->const_data_ptr());
    in_parallel(target_rows * K, kMinElementsPerThread, [&](int64_t begin, int64_t end) {
      const size_t offset = static_cast<size_t>(begin) * item;
      cpu_kernels().add(item == 8, summand + offset, sum + offset, end - begin);
    });
  }
}

void sum_over_rows(const Tensor& array, int64_t d, int64_t N, int64_t columns, const Tensor& sums, int64_t first,
                   int64_t source_column, int64_t count, bool is_double) {
  const size_t size = is_double ? 8 : 4;
  const char* source =
      static_cast<const char*>(array.const_data_ptr()) + static_cast<size_t>(d * N * columns + source_column) * size;
  char* target = static_cast<char*>(sums.mutable_data_ptr()) + static_cast<size_t>(first) * size;
  const int64_t grain = std::max<int64_t>(64, 4 * kMinElementsPerThread / std::max<int64_t>(N, 1));
  in_parallel(count, grain, [&](int64_t begin, int64_t end) {
    cpu_kernels().sum_rows(is_double, source, target, N, columns, begin, end);
  });
}

}  // namespace fastrnn
