// A block of threads that work together on a GPU: a barrier, shared memory, and products of a warp on the tensor cores.
// Kernels written on this run on the host too, where tests/cpp/host_block.h keeps the threads of a block as fibres. No
// torch headers.
#pragma once

#include "machine.h"

namespace fastrnn::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)
#define FASTRNN_BLOCK_FN __device__  // what runs in a block only
class Block {
 public:
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t group() const { return blockIdx.y; }
  __device__ void sync() const { __syncthreads(); }
  // Memory of the block, as much as was asked for at the launch, aligned to 16 bytes.
  template <class T>
  __device__ T* shared() const {
    extern __shared__ __align__(16) char memory[];
    return reinterpret_cast<T*>(memory);
  }
};
#else
#define FASTRNN_BLOCK_FN
class Block {
 public:
  virtual ~Block() = default;
  virtual int thread() const = 0;
  virtual int64_t index() const = 0;
  virtual int64_t group() const = 0;
  virtual void sync() const = 0;
  template <class T>
  T* shared() const {
    return static_cast<T*>(shared_memory());
  }
  // sums += a b of the warp's fragments, below; is_half: of Half, otherwise of BFloat16.
  virtual void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half) const = 0;

 private:
  virtual void* shared_memory() const = 0;
};
#endif

// sums += a b, by all threads of a warp together: a [16, 16], b [16, 8], two numbers of 16 bits in each word, the one
// with the lower index in the lower half. Thread l of the warp, with r = l / 4 and q = l % 4, holds
//   a[0..3]     rows r, r + 8, r, r + 8 at columns 2q, 2q, 2q + 8, 2q + 8 and the next one
//   b[0..1]     rows 2q, 2q + 8 and the next one, of column r
//   sums[0..3]  rows r, r, r + 8, r + 8 at columns 2q, 2q + 1, 2q, 2q + 1
// (PTX, mma.m16n8k16). T: BFloat16 or Half.
template <class T>
FASTRNN_FN void multiply([[maybe_unused]] const Block& block, float (&sums)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  block.multiply(sums, a, b, std::is_same_v<T, Half>);
#endif
}

// The compiler moves nothing past this.
FASTRNN_FN void keep_order() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// A block of kernel.kThreads threads, with kernel.kSharedBytes of shared memory, for each of `blocks` of each of
// `groups`. Defined by what compiles the kernels; throws where the grid is too large or the launch failed.
template <class Kernel>
void launch_blocks(const Kernel& kernel, int64_t blocks, int64_t groups, Queue queue);

}  // namespace fastrnn::cuda
