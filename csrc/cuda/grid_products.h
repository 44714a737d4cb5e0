// The recurrent products of a block of a grid: weights that stay on chip times the operand in the mailbox.
#pragma once

#include "exchange.h"
#include "grid_cores.h"

namespace fastrnn::cuda {

constexpr int kGridThreads = kWarp * kGridWarps;
static_assert(kGridUnits == kProductRows && kBlockRows == kProductColumns, "a block has the rows of a product");

// Where the words of packed weights belong, uint32 [unit blocks, warps, blocks of k of a warp, 2, outputs, 32, 4]: what
// a thread reads as one.
struct WeightPlace {
  int unit_block, k_block, output;
  int thread, half, i;  // of the warp, of the words of the block of k, of these four: the core knows which they are

  FASTRNN_FN WeightPlace(int64_t item, int k_blocks, int outputs) {
    i = static_cast<int>(item % 4), thread = static_cast<int>(item / 4 % kWarp);
    item /= 4 * kWarp, output = static_cast<int>(item % outputs);
    item /= outputs;
    half = static_cast<int>(item % 2);
    const int most = (k_blocks + kGridWarps - 1) / kGridWarps;
    item /= 2, k_block = static_cast<int>(item % most) * kGridWarps;
    item /= most, k_block += static_cast<int>(item % kGridWarps), unit_block = static_cast<int>(item / kGridWarps);
  }
  static constexpr int64_t words(int unit_blocks, int k_blocks, int outputs) {
    return int64_t{unit_blocks} * ((k_blocks + kGridWarps - 1) / kGridWarps) * kGridWarps * 2 * outputs * kWarp * 4;
  }
};

// kOutputs products of 16 rows of weights each; a warp takes blocks of k `warp`, warp + 8, ..., of which kResident stay
// in its registers, the others in shared memory.
template <class T, int kOutputs, int kResident, class Core>
class GridProducts {
 public:
  static constexpr bool kIsStaged = Core::kStageWords > 0;
  static constexpr int kBatch = kIsStaged || kResident > 12 ? 2 : 4;  // blocks of k whose operands are read at a time
  static_assert(kResident % kBatch == 0, "a batch lies in registers or in shared memory");
  static constexpr int kMoreWords = 2 * kOutputs * kWarp * 4;  // of a block of k in shared memory, for a warp
  static constexpr int kStride = kGridWarps * kWordsOfBlock;   // of the blocks of k of a warp, in words
  static constexpr int kPartialFloats = kGridWarps * kOutputs * kSumsOfProduct;

  // Of shared memory: partial sums, twice; operands where the core wants them; the weights that registers do not hold.
  static constexpr int kStageWords = kGridWarps * kBatch * Core::kStageWords;
  static size_t shared_bytes(int64_t k_blocks) {
    static_assert(2 * kPartialFloats * 4 == grid_sum_bytes(kOutputs), "the plan knows it");
    static_assert(kStageWords * 4 == (kIsStaged ? kGridStageBytes : 0), "the plan knows it");
    return static_cast<size_t>(grid_sum_bytes(kOutputs) + kStageWords * 4 +
                               grid_weight_bytes(kOutputs, kResident, k_blocks));
  }

  // `memory` is behind the partial sums.
  FASTRNN_BLOCK_FN GridProducts(const Block& block, int k_blocks, uint32_t* memory)
      : block_(block), lane_(block.thread()) {
    stage_ = memory + lane_.warp * kBatch * Core::kStageWords;
    uint32_t* const more = memory + kStageWords;
    count_ = (k_blocks - lane_.warp + kGridWarps - 1) / kGridWarps;
    place_ = lane_.warp * kWordsOfBlock + lane_.operand_place();
    most_ = (k_blocks + kGridWarps - 1) / kGridWarps;
    const int more_count = most_ - kResident;
    more_ = more + lane_.warp * (more_count > 0 ? more_count : 0) * kMoreWords + block.thread() % kWarp * 4;
  }

  // From the weights of all blocks that share the units of a group, in the order of WeightPlace.
  FASTRNN_BLOCK_FN void load_weights(const uint32_t* packed, int unit_block) {
    const uint32_t* const mine =
        packed + (static_cast<int64_t>(unit_block) * kGridWarps + lane_.warp) * (most_ * kMoreWords) + lane_place();
    FASTRNN_UNROLL
    for (int i = 0; i < kResident; ++i) FASTRNN_UNROLL
    for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
    for (int output = 0; output < kOutputs; ++output) {
      uint32_t (&words)[4] = words_[i][half][output];
      words[0] = words[1] = words[2] = words[3] = 0;
      if (i < count_) take(words, mine + fragment(i, half, output));
    }
    FASTRNN_ROLLED
    for (int i = kResident * kFragments; i < count_ * kFragments; ++i)
      four(more_ + (i - kResident * kFragments) * kFragmentWords) =
          four(const_cast<uint32_t*>(mine) + i * kFragmentWords);
  }

  // The operand of a thread, in batches of blocks of k: one is on its way while the products of the other run.
  struct Operands {
    uint32_t words[2][kBatch][4];
  };

  // Starts to read the first ones; the blocks of k of the publication lie at `operand`.
  FASTRNN_BLOCK_FN void start(const uint32_t* operand, Operands& operands) const {
    read(operand, 0, operands.words[0]);
  }

  // This warp's part of the products with publication n of a tile, that was started.
  template <class Exchange>
  FASTRNN_BLOCK_FN void multiply(Exchange& exchange, const uint32_t* operand, int n, int tile, int step,
                                 Operands& operands, float* partials) const {
    Core core;
    if (Exchange::kWaitsFirst) {
      exchange.wait(n, tile, step);
      block_.sync_warp();
      start(operand, operands);
    }
    FASTRNN_UNROLL
    for (int first = 0; first < kResident; first += kBatch) {
      uint32_t (&now)[kBatch][4] = operands.words[first / kBatch % 2];
      read(operand, first + kBatch, operands.words[1 - first / kBatch % 2]);  // while the products of these run
      complete(exchange, core, operand, first, step, now);
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (first + j < count_) core.multiply(block_, lane_, j, now[j], words_[first + j], stage_of(j));
    }
    uint32_t (&now)[kBatch][4] = operands.words[kResident / kBatch % 2];
    FASTRNN_ROLLED
    for (int first = kResident; first < count_; first += kBatch) {
      complete(exchange, core, operand, first, step, now);
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= count_) continue;
        WeightWords<kOutputs> weights;
        FASTRNN_UNROLL
        for (int half = 0; half < 2; ++half) FASTRNN_UNROLL
        for (int output = 0; output < kOutputs; ++output)
          take(weights[half][output], more_ + fragment(first + j - kResident, half, output));
        core.multiply(block_, lane_, j, now[j], weights, stage_of(j));
      }
      read(operand, first + kBatch, now);
    }
    exchange.end_reading(n);
    FASTRNN_UNROLL
    for (int output = 0; output < kOutputs; ++output)
      core.write(block_, lane_, output, partials + (lane_.warp * kOutputs + output) * kSumsOfProduct);
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
  using Batch = uint32_t[kBatch][4];

  FASTRNN_FN const uint32_t* source(const uint32_t* operand, int i) const { return operand + place_ + i * kStride; }
  FASTRNN_BLOCK_FN void read(const uint32_t* operand, int first, Batch& words) const {
    FASTRNN_UNROLL
    for (int j = 0; j < kBatch; ++j)
      if (first + j < count_) block_.load(source(operand, first + j), words[j]);
  }
  FASTRNN_FN uint32_t* stage_of(int j) const { return stage_ + j * Core::kStageWords; }
  // Goes on when all that was read is there, and where the core wants it.
  template <class Exchange>
  FASTRNN_BLOCK_FN void complete(Exchange& exchange, const Core& core, const uint32_t* operand, int first, int step,
                                 Batch& words) const {
    for (int spins = 0;; ++spins) {
      bool missing = false;
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j) missing = missing || (first + j < count_ && exchange.is_missing(words[j]));
      if (!missing || exchange.gives_up(spins, step)) break;
      FASTRNN_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (first + j < count_ && exchange.is_missing(words[j])) block_.load(source(operand, first + j), words[j]);
    }
    // Threads that waited longer; and nobody reads the batch before.
    if (kIsStaged || !Exchange::kWaitsFirst) block_.sync_warp();
    FASTRNN_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      exchange.taken(words[j]);
      core.stage(block_, lane_, words[j], stage_of(j));
    }
    if (kIsStaged) block_.sync_warp();
  }
  static constexpr int kFragments = 2 * kOutputs, kFragmentWords = kWarp * 4;
  static FASTRNN_FN int fragment(int i, int half, int output) {
    return ((i * 2 + half) * kOutputs + output) * kFragmentWords;
  }
  FASTRNN_BLOCK_FN int lane_place() const { return lane_of(block_.thread()) * 4; }
  // 16 bytes at once.
  static FASTRNN_FN Pack<uint32_t, 4>& four(uint32_t* words) {
    check_alignment<uint32_t, 4>(words);
    return *reinterpret_cast<Pack<uint32_t, 4>*>(words);
  }
  static FASTRNN_FN void take(uint32_t (&words)[4], const uint32_t* source) {
    const Pack<uint32_t, 4> pack = four(const_cast<uint32_t*>(source));
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = pack.unit[i];
  }
  const Block& block_;
  const Lane lane_;
  int count_;        // blocks of k of this warp
  int most_;         // of any warp
  int place_;        // of the thread's words of the first of them
  uint32_t* stage_;  // of this warp
  uint32_t* more_;   // weights in shared memory, from this thread's words on
  WeightWords<kOutputs> words_[kResident];
};

}  // namespace fastrnn::cuda
