// A block of threads that work together on a GPU: a barrier, shared memory, and products of a warp on the tensor cores;
// and what blocks that run at the same time tell each other through memory. Kernels written on this run on the host
// too, where tests/cpp/host_block.h keeps the threads of a block as fibres. No torch headers.
#pragma once

#include "machine.h"

namespace fastrnn::cuda {

constexpr int kWarp = 32;

// What the operands of a product are.
enum class Operand { kBFloat16, kHalf, kTf32 };

// The words that `load`, `store`, `arrive` and `look` are given are read and written by nothing else while the kernel
// runs. load and store are relaxed: a word is whole, and nothing else is said. arrive releases, look acquires; fence()
// does both: it releases with a store behind it, and acquires with a load before it, of the same thread (PTX, scope
// gpu). A release covers what other threads of the block did before a barrier that this thread came to, too.
#if defined(__CUDACC__)
#define FASTRNN_BLOCK_FN __device__  // what runs in a block only
class Block {
 public:
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t group() const { return blockIdx.y; }
  __device__ void sync() const { __syncthreads(); }
  // The word that the other thread of a pair gives, `apart` (a power of two) from it: all threads of a warp take part.
  // This, and a product, orders no memory.
  __device__ uint32_t swap(uint32_t word, int apart = 1) const { return __shfl_xor_sync(0xFFFFFFFFu, word, apart); }
  // A barrier of a warp, for its shared memory.
  __device__ void sync_warp() const { __syncwarp(); }

  // Four words at a multiple of 16 bytes.
  __device__ void load(const uint32_t* source, uint32_t (&words)[4]) const {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(source)
                 : "memory");
  }
  __device__ void store(uint32_t* target, uint32_t word) const {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(word) : "memory");
  }
  __device__ void fence() const { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
  __device__ void arrive(uint32_t* counter) const {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
  __device__ uint32_t look(const uint32_t* counter) const {
    uint32_t count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
  }
  // In a loop that waits for another block.
  __device__ void pause() const { __nanosleep(20); }
  // To memory of the host.
  __device__ void report(uint32_t* target, uint32_t word) const {
    *static_cast<volatile uint32_t*>(target) = word;
    __threadfence_system();
  }
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
  virtual uint32_t swap(uint32_t word, int apart = 1) const = 0;
  virtual void sync_warp() const = 0;
  virtual void load(const uint32_t* source, uint32_t (&words)[4]) const = 0;
  virtual void store(uint32_t* target, uint32_t word) const = 0;
  virtual void fence() const = 0;
  virtual void arrive(uint32_t* counter) const = 0;
  virtual uint32_t look(const uint32_t* counter) const = 0;
  virtual void pause() const = 0;
  virtual void report(uint32_t* target, uint32_t word) const = 0;
  template <class T>
  T* shared() const {
    return static_cast<T*>(shared_memory());
  }
  // sums += a b of the warp's fragments, below.
  virtual void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand operand) const = 0;

 private:
  virtual void* shared_memory() const = 0;
};
#endif

// sums += a b, by all threads of a warp together: a [16, K], b [K, 8]. Thread l of the warp, with r = l / 4 and
// q = l % 4, holds of numbers of 16 bits, K = 16, two in each word, the one with the lower index in the lower half,
//   a[0..3]     rows r, r + 8, r, r + 8 at columns 2q, 2q, 2q + 8, 2q + 8 and the next one
//   b[0..1]     rows 2q, 2q + 8 and the next one, of column r
// of float, of which the product takes 10 bits after the first (TF32), K = 8, one in each word,
//   a[0..3]     rows r, r + 8, r, r + 8 at columns q, q, q + 4, q + 4
//   b[0..1]     rows q, q + 4, of column r
// and of either
//   sums[0..3]  rows r, r, r + 8, r + 8 at columns 2q, 2q + 1, 2q, 2q + 1
// (PTX, mma.m16n8k16 and mma.m16n8k8). T: BFloat16, Half or float.
#define FASTRNN_MULTIPLY(shape, types)                                      \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types              \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
FASTRNN_FN void multiply([[maybe_unused]] const Block& block, float (&sums)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2]) {
  constexpr bool kHalf = std::is_same_v<T, Half>, kFloat = std::is_same_v<T, float>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kFloat)
    FASTRNN_MULTIPLY("m16n8k8", "tf32.tf32");
  else if constexpr (kHalf)
    FASTRNN_MULTIPLY("m16n8k16", "f16.f16");
  else
    FASTRNN_MULTIPLY("m16n8k16", "bf16.bf16");
#elif defined(__CUDA_ARCH__)
  __trap();  // the plan refuses GPUs that run this
#elif !defined(__CUDACC__)
  block.multiply(sums, a, b, kFloat ? Operand::kTf32 : kHalf ? Operand::kHalf : Operand::kBFloat16);
#endif
}
#undef FASTRNN_MULTIPLY

// A word of an operand as the product takes it: of float rounded to 10 bits after the first, halves away from zero.
template <class T>
FASTRNN_FN uint32_t operand_of(uint32_t word) {
  if constexpr (!std::is_same_v<T, float>) {
    return word;
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(from_bits(word)));
    return word;
#else
    return (word & 0x7F800000) == 0x7F800000 ? word : (word + 0x1000) & 0xFFFFE000;
#endif
  }
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

// The same where all blocks run at the same time, as they wait for each other; shared memory as much as
// kernel.shared_bytes() says.
template <class Kernel>
void launch_together(const Kernel& kernel, int64_t blocks, int64_t groups, Queue queue);

}  // namespace fastrnn::cuda
