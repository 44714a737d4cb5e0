#include "products.h"

#include <algorithm>

#include "../scratch.h"
#include "kernels.h"
#include "scan_cpu.h"

namespace fastrnn::cpu {
namespace {

// Elements, and multiply-adds, below which a second thread costs more than it brings.
constexpr int64_t kMinElementsPerThread = 1 << 16, kMinWorkPerThread = 1 << 19;
// Terms of a sum that are added up on their own. They bound its error (64,000 in a row would bring 1e-5, and blocks of
// 512 1.8e-7), and the panel of a product: 48 rows of 512 floats, turned from columns, are 96 KiB.
constexpr int64_t kSumBlock = 512;
// The same of products whose rows lie as they are used: 384 KiB.
constexpr int64_t kRowBlock = 2048;

template <class F>
void in_parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain)
    f(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

bool is_16_bit(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kHalf; }
bool is_double(const Rows& rows) { return rows.array.dtype == ScalarType::Double; }

}  // namespace

Tensor to_storage(const Tensor& t, ScalarType storage) {
  const Dtype dtype = dtype_of(storage);
  if (!is_16_bit(dtype)) return t;
  const Tensor result = make(sizes_of(t), storage);
  const float* source = static_cast<const float*>(t.const_data_ptr());
  char* target = static_cast<char*>(result.mutable_data_ptr());
  in_parallel(t.numel(), kMinElementsPerThread, [&](int64_t begin, int64_t end) {
    cpu_kernels().from_float(dtype, source + begin, target + 2 * begin, end - begin);
  });
  return result;
}

namespace {

// All of K, `most` of it at a time.
void multiply(ProductArgs p, int64_t most) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t K = p.K;
  const size_t a_item = p.is_double ? 8 : 4;
  const size_t b_item = p.b_is_list ? sizeof(void*) : is_16_bit(p.b_dtype) ? 2 : a_item;
  const int64_t step = std::max<int64_t>(1, kMinWorkPerThread / (std::min(K, most) * p.columns + 1) / kMatrixRows);
  PassScratch<3> scratch;
  int64_t k = 0;
  do {  // also once where K is 0, which makes target 0
    p.K = std::min(most, K - k);
    char* packed = scratch.get(kernels.matrix_bytes(p));
    in_parallel(kernels.matrix_blocks(p), 1 + kMinElementsPerThread / (16 * p.K + 1), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) kernels.pack_matrix(p, packed, block);
    });
    in_parallel((p.rows + kMatrixRows - 1) / kMatrixRows, step, [&](int64_t begin, int64_t end) {
      PassScratch<4> panel;
      kernels.multiply_matrix(p, packed, panel.get(kernels.matrix_panel_bytes(p)), begin * kMatrixRows,
                              std::min(p.rows, end * kMatrixRows));
    });
    k += p.K;
    p.a = static_cast<const char*>(p.a) + static_cast<size_t>(p.K * p.a_k) * a_item;
    p.b = static_cast<const char*>(p.b) + static_cast<size_t>(p.K * p.b_row) * b_item;
    p.add = true;
  } while (k < K);
}

}  // namespace

void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b, int64_t rows,
                   bool add) {
  if (rows == 0 && add) return;
  multiply({is_double(a), a.data(), 1, a.row_stride, dtype_of(b.array.dtype), b.data(), b.row_stride, b.is_list,
            result.data(), result.row_stride, target_rows, K, rows, add},
           kSumBlock);
}

void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K, bool add) {
  multiply({is_double(a), a.data(), a.row_stride, 1, dtype_of(b.array.dtype), b.data(), b.row_stride, false,
            result.data(), result.row_stride, rows, columns, K, add},
           kRowBlock);
}

void sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) {
  const int64_t grain = std::max<int64_t>(64, 4 * kMinElementsPerThread / std::max<int64_t>(rows, 1));
  in_parallel(columns, grain, [&](int64_t begin, int64_t end) {
    cpu_kernels().sum_rows(is_double(array), array.data(), sums.data(), rows, array.row_stride, begin, end);
  });
}

}  // namespace fastrnn::cpu
