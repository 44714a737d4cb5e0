// The recurrent products of a block of a grid: weights that stay on chip times the operand in the mailbox.
#pragma once

#include "exchange.h"
#include "machine.h"

namespace fastrnn::cuda {

constexpr int kGridThreads = kWarp * kGridWarps;
static_assert(kGridUnits == kProductRows && kBlockRows == kProductColumns, "a block has the rows of a product");

// kOutputs products of 16 rows of weights each; a warp takes blocks of k `warp`, warp + 8, ..., of which kResident stay
// in its registers, the others in shared memory.
template <class T, int kOutputs, int kResident>
class GridProducts {
 public:
  static constexpr int kBatch = kResident > 12 ? 2 : 4;        // blocks of k whose operands are read at a time
  static constexpr int kChains = kOutputs == 1 ? 4 : 1;        // sums of an output: no product waits for the one before
  static constexpr int kMoreWords = 2 * kOutputs * kWarp * 4;  // of a block of k in shared memory, for a warp
  static constexpr int kPartialFloats = kGridWarps * kOutputs * kSumsOfProduct;

  // Of shared memory: partial sums, twice, and behind them the weights that registers do not hold.
  static size_t shared_bytes(int64_t k_blocks) {
    static_assert(2 * kPartialFloats * 4 == grid_sum_bytes(kOutputs), "the plan knows it");
    return static_cast<size_t>(grid_sum_bytes(kOutputs) + grid_weight_bytes(kOutputs, kResident, k_blocks));
  }

  FASTRNN_BLOCK_FN GridProducts(const Block& block, int64_t k_blocks, uint32_t* more)
      : block_(block), lane_(block.thread()) {
    count_ = static_cast<int>((k_blocks - lane_.warp + kGridWarps - 1) / kGridWarps);
    const int more_count = static_cast<int>((k_blocks + kGridWarps - 1) / kGridWarps) - kResident;
    more_ = more + lane_.warp * (more_count > 0 ? more_count : 0) * kMoreWords + block.thread() % kWarp * 4;
  }

  // `get` gives the word of an output, a row of it, a block of k and a word there.
  template <class Get>
  FASTRNN_BLOCK_FN void load_weights(Get get) {
    FASTRNN_UNROLL
    for (int i = 0; i < kResident; ++i) FASTRNN_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      FASTRNN_UNROLL
      for (int output = 0; output < kOutputs; ++output) load_fragment(get, i, tile, output, words_[i][tile][output]);
      keep_order();  // not all loads at once: their addresses would take the registers that the weights are to have
    }
    for (int i = kResident; i < count_; ++i)
      for (int tile = 0; tile < 2; ++tile)
        for (int output = 0; output < kOutputs; ++output) {
          uint32_t words[4];
          load_fragment(get, i, tile, output, words);
          uint32_t* const target = fragment_of_more(i, tile, output);
          FASTRNN_UNROLL
          for (int j = 0; j < 4; ++j) target[j] = words[j];
        }
  }

  // This warp's part of the products with publication n of a tile, whose blocks of k lie at `operand`.
  template <class Exchange>
  FASTRNN_BLOCK_FN void multiply(Exchange& exchange, const uint32_t* operand, int64_t n, int64_t tile, int64_t step,
                                 float* partials) const {
    const uint32_t* const mine = operand + lane_.warp * kWordsOfBlock + lane_.operand_place();
    const auto source = [&](int i) { return mine + i * (kGridWarps * kWordsOfBlock); };
    float sums[kOutputs][kChains][4] = {};
    uint32_t operands[2][kBatch][4] = {};
    const auto start = [&](int first, uint32_t (&of)[kBatch][4]) {
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (first + j < count_) block_.load(source(first + j), of[j]);
    };
    const auto finish = [&](int i, uint32_t (&words)[4]) {
      exchange.finish(source(i), step, words);
      FASTRNN_UNROLL
      for (int j = 0; j < 4; ++j) words[j] = operand_of<T>(words[j]);
    };
    exchange.wait(n, tile, step);
    start(0, operands[0]);
    FASTRNN_UNROLL
    for (int first = 0; first < kResident; first += kBatch) {
      uint32_t (&now)[kBatch][4] = operands[first / kBatch % 2];
      start(first + kBatch, operands[1 - first / kBatch % 2]);  // while the products of these run
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= count_) continue;
        finish(first + j, now[j]);
        FASTRNN_UNROLL
        for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
        for (int output = 0; output < kOutputs; ++output)
          product(sums[output][(2 * j + half) % kChains], words_[first + j][half][output], now[j], half);
      }
    }
    uint32_t (&now)[kBatch][4] = operands[kResident / kBatch % 2];
    for (int first = kResident; first < count_; first += kBatch) {
      if (first > kResident) start(first, now);
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= count_) continue;
        finish(first + j, now[j]);
        FASTRNN_UNROLL
        for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
        for (int output = 0; output < kOutputs; ++output) {
          uint32_t weights[4];
          memcpy(weights, __builtin_assume_aligned(fragment_of_more(first + j, half, output), 16), sizeof weights);
          product(sums[output][(2 * j + half) % kChains], weights, now[j], half);
        }
      }
    }
    exchange.end_reading(n);
    FASTRNN_UNROLL
    for (int output = 0; output < kOutputs; ++output) {
      float* const place = partials + (lane_.warp * kOutputs + output) * kSumsOfProduct;
      FASTRNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        float sum = sums[output][0][i];
        FASTRNN_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum += sums[output][chain][i];
        place[sum_place(lane_.sum_row(i), lane_.sum_column(i))] = sum;
      }
    }
  }

  // The whole sum of an output, when all warps have come to a barrier.
  static FASTRNN_FN float sum_of(const float* partials, int output, int row, int column) {
    float sum = 0.0f;
    FASTRNN_UNROLL
    for (int warp = 0; warp < kGridWarps; ++warp)
      sum += partials[(warp * kOutputs + output) * kSumsOfProduct + sum_place(row, column)];
    return sum;
  }

 private:
  FASTRNN_FN int k_block(int i) const { return lane_.warp + i * kGridWarps; }
  FASTRNN_FN uint32_t* fragment_of_more(int i, int tile, int output) const {
    return more_ + (i - kResident) * kMoreWords + (tile * kOutputs + output) * kWarp * 4;
  }

  template <class Get>
  FASTRNN_BLOCK_FN void load_fragment(Get get, int i, int tile, int output, uint32_t (&words)[4]) const {
    FASTRNN_UNROLL
    for (int j = 0; j < 4; ++j)
      words[j] =
          i < count_ ? operand_of<T>(get(output, lane_.weight_row(j), k_block(i), lane_.weight_word(tile, j))) : 0;
  }
  FASTRNN_BLOCK_FN void product(float (&sums)[4], const uint32_t (&weights)[4], const uint32_t (&words)[4],
                                int half) const {
    const uint32_t operand[2] = {words[2 * half], words[2 * half + 1]};
    cuda::multiply<T>(block_, sums, weights, operand);
  }

  const Block& block_;
  const Lane lane_;
  int count_;       // blocks of k of this warp
  uint32_t* more_;  // weights in shared memory, from this lane's words on
  uint32_t words_[kResident][2][kOutputs][4];
};

}  // namespace fastrnn::cuda
