// The machine that kernels run on: a GPU (nvcc), or the host, where the threads of a grid run one after the other. A
// kernel is a struct with its arguments and `operator()(Thread)`, written on this header alone, so that the same source
// is proven without a GPU. No torch headers.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sizes.h"
#include "step_kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTRNN_UNROLL _Pragma("unroll")  // arrays of registers need their loops unrolled
#define FASTRNN_ROLLED _Pragma("unroll 1")
#else
#define FASTRNN_UNROLL
#define FASTRNN_ROLLED
#endif

namespace fastrnn::cuda {

// One thread of a grid: x over the items of a group, y the group.
struct Thread {
  int64_t item;
  int64_t group;
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// An array of arguments, whose type the dtype tells.
template <class T>
FASTRNN_FN const T* at(const void* array) {
  return static_cast<const T*>(array);
}
template <class T>
FASTRNN_FN T* at(void* array) {
  return static_cast<T*>(array);
}

// The type that computes for a storage type.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Storage -> compute and back; rounding to nearest even, NaN stays NaN.
FASTRNN_FN float widen(float v) { return v; }
FASTRNN_FN double widen(double v) { return v; }
FASTRNN_FN void narrow(float v, float& out) { out = v; }
FASTRNN_FN void narrow(double v, double& out) { out = v; }

FASTRNN_FN float from_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
FASTRNN_FN uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

FASTRNN_FN float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }

#if defined(__CUDA_ARCH__)
FASTRNN_FN void narrow(float v, BFloat16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
FASTRNN_FN float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
FASTRNN_FN void narrow(float v, Half& out) { out.bits = __half_as_ushort(__float2half_rn(v)); }
#else
FASTRNN_FN void narrow(float v, BFloat16& out) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(v == v ? rounded : (bits >> 16) | 0x40);
}
FASTRNN_FN float widen(Half v) {
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7FFF) << 13;
  const uint32_t value =
      (v.bits & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000 : bits_of(from_bits(magnitude) * 0x1p112f);
  return from_bits(value | static_cast<uint32_t>(v.bits & 0x8000) << 16);
}
FASTRNN_FN void narrow(float v, Half& out) {
  const uint32_t bits = bits_of(v), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  uint32_t value;
  if (magnitude > 0x7F800000)
    value = 0x7E00;
  else if (magnitude >= 0x477FF000)  // rounds to more than the largest
    value = 0x7C00;
  else if (magnitude < 0x38800000)  // subnormal: the adder rounds at 2^-24
    value = bits_of(from_bits(magnitude) + 0.5f) - 0x3F000000;
  else
    value = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  out.bits = static_cast<uint16_t>(value | sign >> 16);
}
#endif

// kUnits neighbours in memory, moved at once: aligned to their size.
template <class T, int kUnits>
struct alignas(sizeof(T) * kUnits) Pack {
  T unit[kUnits];
};

// A GPU stops at a pack that is not aligned; the host looks, so that tests see it there.
template <class T, int kUnits>
FASTRNN_FN void check_alignment([[maybe_unused]] const T* pack) {
#if !defined(__CUDA_ARCH__)
  if (reinterpret_cast<uintptr_t>(pack) % sizeof(Pack<T, kUnits>) != 0)
    throw std::runtime_error("fastrnn: a kernel reads or writes across the alignment of a pack");
#endif
}

// The units of a pack as numbers.
template <class T, int kUnits>
FASTRNN_FN void load(const T* source, Compute<T>* target) {
  check_alignment<T, kUnits>(source);
  const Pack<T, kUnits> pack = *reinterpret_cast<const Pack<T, kUnits>*>(source);
  FASTRNN_UNROLL
  for (int i = 0; i < kUnits; ++i) target[i] = widen(pack.unit[i]);
}
// The same where the array may be null: zeros.
template <class T, int kUnits>
FASTRNN_FN void load_or_zero(const T* array, int64_t index, Compute<T>* target) {
  if (array) return load<T, kUnits>(array + index, target);
  FASTRNN_UNROLL
  for (int i = 0; i < kUnits; ++i) target[i] = Compute<T>(0);
}
template <class T, int kUnits>
FASTRNN_FN void store(T* target, const Compute<T>* source) {
  check_alignment<T, kUnits>(target);
  Pack<T, kUnits> pack;
  FASTRNN_UNROLL
  for (int i = 0; i < kUnits; ++i) narrow(source[i], pack.unit[i]);
  *reinterpret_cast<Pack<T, kUnits>*>(target) = pack;
}

// Calls f(a null pointer to the type) for a cell.
template <class F>
void with_cell(CellId cell, F f) {
  switch (cell) {
#define FASTRNN_CASE(name, Cell) \
  case CellId::name:             \
    return f(static_cast<Cell*>(nullptr));
    FASTRNN_CELLS(FASTRNN_CASE)
#undef FASTRNN_CASE
  }
}

inline void check_blocks(int64_t blocks, int64_t groups) {
  if (blocks < 0 || blocks > kMostBlocks || groups < 0 || groups > kMostGroups)
    throw std::runtime_error("fastrnn: a kernel of " + std::to_string(blocks) + " blocks for " +
                             std::to_string(groups) + " groups is too large for a GPU");
}
inline void check_grid(int64_t items, int64_t groups) {
  check_blocks(items < 0 ? items : items / kBlockThreads + (items % kBlockThreads != 0), groups);
}

// A thread for each of `items` of each of `groups`, in blocks of kBlockThreads. Defined by what compiles the kernels;
// throws where the grid is too large or the launch failed.
template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue queue);

}  // namespace fastrnn::cuda
