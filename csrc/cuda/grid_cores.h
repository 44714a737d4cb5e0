// What multiplies in a block of a grid: the 16 rows of weights of each output with the 8 rows of the operand, for a
// block of k at a time, by a warp. A core says which row and word of the weights a thread's words are, and keeps its
// sums.
#pragma once

#include "block.h"
#include "fragments.h"

namespace fastrnn::cuda {

// Words of weights of a thread in a block of k: two times four, `half` 0 and 1, for each output.
template <int kOutputs>
using WeightWords = uint32_t[2][kOutputs][4];

FASTRNN_FN int lane_of(int thread) { return thread % kWarp; }

// Tensor cores: two products of fragments a block of k.
template <class T, int kOutputs>
struct TensorCore {
  static constexpr int kChains = kOutputs == 1 ? 4 : 1;  // sums of an output: no product waits for the one before
  static constexpr int kStageWords = 0;                  // of shared memory for a warp and a block of k
  float sums[kOutputs][kChains][4] = {};

  static FASTRNN_FN int weight_row(int thread, int, int i) { return Lane(thread).weight_row(i); }
  static FASTRNN_FN int weight_word(int thread, int half, int i) { return Lane(thread).weight_word(half, i); }
  static FASTRNN_FN uint32_t weight(uint32_t word) { return operand_of<T>(word); }

  FASTRNN_BLOCK_FN void stage(const Block&, const Lane&, uint32_t (&words)[4], uint32_t*) const {
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = operand_of<T>(words[i]);
  }
  // The j-th block of k of a batch.
  FASTRNN_BLOCK_FN void multiply(const Block& block, const Lane&, int j, const uint32_t (&words)[4],
                                 const WeightWords<kOutputs>& weights, const uint32_t*) {
    FASTRNN_UNROLL
    for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
    for (int output = 0; output < kOutputs; ++output) {
      const uint32_t operand[2] = {words[2 * half], words[2 * half + 1]};
      cuda::multiply<T>(block, sums[output][(2 * j + half) % kChains], weights[half][output], operand);
    }
  }
  // The warp's sums of an output, to their places.
  FASTRNN_BLOCK_FN void write(const Block&, const Lane& lane, int output, float* place) const {
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      float sum = sums[output][0][i];
      FASTRNN_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sum += sums[output][chain][i];
      place[sum_place(lane.sum_row(i), lane.sum_column(i))] = sum;
    }
  }
};

// Float as it is: a thread has a row of each output, and half of the block of k, for all 8 columns, whose operand it
// reads from shared memory, where the threads of the warp have put it.
template <int kOutputs>
struct ExactCore {
  static constexpr int kStageWords = kWordsOfBlock;
  float sums[kOutputs][kProductColumns] = {};

  static FASTRNN_FN int weight_row(int thread, int, int) { return lane_of(thread) % kProductRows; }
  static FASTRNN_FN int part(int thread) { return lane_of(thread) / kProductRows; }
  static FASTRNN_FN int weight_word(int thread, int half, int i) { return 8 * part(thread) + 4 * half + i; }
  static FASTRNN_FN uint32_t weight(uint32_t word) { return word; }

  FASTRNN_BLOCK_FN void stage(const Block&, const Lane& lane, uint32_t (&words)[4], uint32_t* place) const {
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) place[lane.operand_place() + i] = words[i];
  }
  FASTRNN_BLOCK_FN void multiply(const Block& block, const Lane&, int, const uint32_t (&)[4],
                                 const WeightWords<kOutputs>& weights, const uint32_t* place) {
    FASTRNN_UNROLL
    for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
    for (int column = 0; column < kProductColumns; ++column) {
      const uint32_t* const words = place + column * Fragment<float>::kRowWords + weight_word(block.thread(), half, 0);
      const Pack<uint32_t, 4> pack = *reinterpret_cast<const Pack<uint32_t, 4>*>(words);
      FASTRNN_UNROLL
      for (int output = 0; output < kOutputs; ++output) FASTRNN_UNROLL
      for (int i = 0; i < 4; ++i)
        sums[output][column] =
            fastrnn::fma(from_bits(weights[half][output][i]), from_bits(pack.unit[i]), sums[output][column]);
    }
  }
  // The two halves of k meet; each thread writes half of the columns.
  FASTRNN_BLOCK_FN void write(const Block& block, const Lane&, int output, float* place) const {
    const int row = weight_row(block.thread(), 0, 0), mine = part(block.thread());
    FASTRNN_UNROLL
    for (int column = 0; column < kProductColumns; ++column) {
      const float other = from_bits(block.swap(bits_of(sums[output][column]), kProductRows));
      // In one order, whichever thread it is.
      const float sum = mine == 0 ? sums[output][column] + other : other + sums[output][column];
      if (column / 4 == mine) place[sum_place(row, column)] = sum;
    }
  }
};

}  // namespace fastrnn::cuda
