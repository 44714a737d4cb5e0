// The bodies of block_kernels.h, and the choice of their instance. Included by block_kernels.cu for GPUs, and by the
// tests for the host.
//
// Computes   the cells of csrc/cells.h along time, of kBlockRows rows of a group in a block
// Work       a warp: 16 hidden units, for which it keeps its rows of weight_hh as fragments of the tensor cores; a
//            thread: two neighbouring units of two rows, whose gates all end up with it (block.h). Per step kTiles * G
//            products of a warp, and one barrier
// Memory     registers: weights kTiles * G * 4, states; shared: the operand of the next step, twice in turns, so that
//            nobody writes what another still reads, and forward the biases: 6 to 17 KiB. All else is read and written
//            once, beside one another in pairs
// Requires   a GPU of compute capability 8.0; T of 16 bits; H <= 16 kTiles, filled up with zeros; no projection
// Order      the rows of a block are one after the other in time; blocks do not depend on each other. Sums over k go in
//            the order of the tensor cores, the same in every call
#include "block_kernels.h"

#include "block.h"
#include "fragments.h"
#include "quick.h"

namespace fastrnn::cuda {
namespace {

template <int kTiles>
struct BlockShape {
  static constexpr int kUnits = 16 * kTiles;       // of h, the last ones may be zeros
  static constexpr int kThreads = kWarp * kTiles;  // a warp for 16 units
};

template <class T>
FASTRNN_FN T zero_of() {
  T zero;
  narrow(0.0f, zero);
  return zero;
}

template <class T>
FASTRNN_FN uint32_t word_of(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
// Two neighbours in shared memory, of which the first has an even index.
template <class T>
FASTRNN_FN uint32_t word_at(const T* pair) {
  uint32_t word;
  check_alignment<T, 2>(pair);
  memcpy(&word, __builtin_assume_aligned(pair, 4), sizeof word);
  return word;
}
template <class T>
FASTRNN_FN void put(T* pair, const float (&values)[2]) {
  store<T, 2>(pair, values);
}

// Two numbers of 16 bits as they lie in memory: taken apart where they are used, so that nothing waits for a load
// before.
template <class T>
struct Two {
  uint32_t word = 0;

  FASTRNN_FN float operator[](int j) const { return widen(T{static_cast<uint16_t>(j ? word >> 16 : word)}); }
};

// Two neighbouring hidden units, those of a thread: rows r and r + 8 of a product are units 2r and 2r + 1 of the warp.
// kPairs: H is even, and arrays begin at an even element, so that both are there or none, and move at once.
template <bool kPairs>
struct Units {
  int warp_unit, first, H;

  FASTRNN_FN Units(const Lane& lane, int width)
      : warp_unit(16 * lane.warp), first(16 * lane.warp + 2 * lane.r), H(width) {}

  FASTRNN_FN bool has(int j) const { return first + j < H; }

  // From, and to, a row of H units; of units that are not there zeros, nothing.
  template <class F>
  FASTRNN_FN void load(const F* row, float (&values)[2]) const {
    if constexpr (kPairs) {
      values[0] = values[1] = 0.0f;
      if (has(0)) fastrnn::cuda::load<F, 2>(row + first, values);
    } else {
      FASTRNN_UNROLL
      for (int j = 0; j < 2; ++j) values[j] = has(j) ? widen(row[first + j]) : 0.0f;
    }
  }
  template <class F>
  FASTRNN_FN void store(F* row, const float (&values)[2]) const {
    if constexpr (kPairs) {
      if (has(0)) fastrnn::cuda::store<F, 2>(row + first, values);
    } else {
      FASTRNN_UNROLL
      for (int j = 0; j < 2; ++j)
        if (has(j)) narrow(values[j], row[first + j]);
    }
  }
  // The same without a look at the numbers.
  template <class T>
  FASTRNN_FN Two<T> fetch(const T* row) const {
    Two<T> two;
    if constexpr (kPairs) {
      if (has(0)) two.word = word_at(row + first);
    } else {
      const T zero = zero_of<T>();
      two.word = word_of(has(0) ? row[first] : zero, has(1) ? row[first + 1] : zero);
    }
    return two;
  }
  template <class T>
  FASTRNN_FN void put_back(T* row, Two<T> two) const {
    const float values[2] = {two[0], two[1]};
    store(row, values);
  }
};

// The fragments of weights of a warp, for kGates gates.
template <int kGates, int kTiles>
struct Weights {
  uint32_t words[kGates][kTiles][4];

  // `get` gives the word of a gate, a unit of the warp, and a column of the matrix and the one after it.
  template <class Get>
  FASTRNN_FN void load(const Lane& lane, Get get) {
    FASTRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) FASTRNN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTRNN_UNROLL
      for (int i = 0; i < 4; ++i)
        words[gate][tile][i] = get(gate, 2 * lane.r + i % 2, 16 * tile + 2 * lane.q + i / 2 * 8);
      // Not all loads at once: their addresses would take the registers that the weights are to have.
      if (tile % 2 == 1) keep_order();
    }
  }
};

// Steps [begin, end).
struct Range {
  int64_t begin, end;

  // Those that have a row: as rows leave, and never enter again, they are the first ones, in reverse the last ones.
  FASTRNN_FN void keep_active(const Steps& steps, bool reversed, int64_t row) {
    const auto active = [&](int64_t step) { return steps.count(reversed ? steps.T - 1 - step : step) > row; };
    int64_t low = begin, high = end;  // the first step of which `active` differs from that of the first ones
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (active(middle) != reversed)
        low = middle + 1;
      else
        high = middle;
    }
    if (reversed)
      begin = low;
    else
      end = low;
  }
};

#include "block_backward.inl"
#include "block_forward.inl"

struct Offsets {
  OffsetsArgs a;

  FASTRNN_FN void operator()(Thread thread) const { a.target[thread.item] = a.values[thread.item]; }
};

// Launches the instance of a kernel <Cell, T, kTiles, kPairs> for these arguments.
template <template <class, class, int, bool> class Kernel, class Args>
void launch_instance(const Args& a, Queue queue) {
  with_cell(a.cell.cell, [&](auto* cell) {
    using Cell = std::remove_pointer_t<decltype(cell)>;
    const int64_t blocks = (a.cell.B + kBlockRows - 1) / kBlockRows;
    const auto run = [&](auto* dtype) {
      using T = std::remove_pointer_t<decltype(dtype)>;
      if (block_tiles(a.cell.H, a.pairs) == 4)
        launch_blocks(Kernel<Cell, T, 4, true>{{}, a}, blocks, a.cell.D, queue);
      else if (a.pairs)
        launch_blocks(Kernel<Cell, T, 8, true>{{}, a}, blocks, a.cell.D, queue);
      else
        launch_blocks(Kernel<Cell, T, 8, false>{{}, a}, blocks, a.cell.D, queue);
    };
    if (a.cell.dtype == Dtype::kHalf)
      run(static_cast<Half*>(nullptr));
    else
      run(static_cast<BFloat16*>(nullptr));
  });
}

}  // namespace

const BlockKernels& block_kernels() {
  static const BlockKernels table = {
      launch_instance<BlockForward, BlockForwardArgs>,
      launch_instance<BlockBackward, BlockBackwardArgs>,
      [](const OffsetsArgs& a, Queue queue) { launch(Offsets{a}, a.count, 1, queue); },
  };
  return table;
}

}  // namespace fastrnn::cuda
