// Ways to tell each other the operand of the next step (csrc/cuda/exchange.h) that lack something, or do it in another
// order; blocks whose stores come late, or not at all. For grid_protocol_test.cpp.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "cuda/exchange.h"

namespace fastrnn::cuda {

// Counts itself in before all of its threads have published.
class FlagWithoutBarrier : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void end_publishing(int n, int tile) const {
    if (block_.thread() == 0) block_.arrive(mail_.flag(d_, n, tile));
  }
};
// ... before any has.
class FlagBeforeWords : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void wait(int n, int tile, int step) { FlagExchange::wait(n, tile, step), tile_ = tile; }
  template <class EachPlace>
  void begin_publishing(int n, EachPlace) const {
    if (block_.thread() % kSumsOfProduct == 0) block_.arrive(mail_.flag(d_, n, tile_));
  }
  void end_publishing(int n, int tile) const {
    block_.sync();
    if (n == 0 && block_.thread() == 0) block_.arrive(mail_.flag(d_, n, tile));  // the first one begins without reading
  }

 private:
  int tile_ = 0;
};
// Each block stores a flag of its own, with a fence before it or without.
template <bool kFence>
class StoredFlag : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void wait(int n, int tile, int step) {
    for (int member = 0; member < mail_.members; ++member)
      for (int spins = 0; block_.look(mail_.flag(d_, n * mail_.members + member, tile)) == 0 && !gives_up(spins, step);)
        ++spins;
  }
  void end_publishing(int n, int tile) const {
    block_.sync();
    if (block_.thread() != 0) return;
    if (kFence) block_.fence();
    block_.store(mail_.flag(d_, n * mail_.members + static_cast<int>(block_.index()) % mail_.members, tile), 1);
  }
};
// Waits for all but one.
class FlagOfFewer : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void wait(int n, int tile, int step) {
    for (int spins = 0;
         block_.look(mail_.flag(d_, n, tile)) + 1 < static_cast<uint32_t>(mail_.members) && !gives_up(spins, step);)
      ++spins;
  }
};
class FlagLookedAtOnce : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void wait(int n, int tile, int) { block_.look(mail_.flag(d_, n, tile)); }
};
// One thread of each warp waits, the others go on.
class FlagSeenByOne : public FlagExchange {
 public:
  using FlagExchange::FlagExchange;
  void wait(int n, int tile, int step) {
    if (block_.thread() % kWarp == 0) FlagExchange::wait(n, tile, step);
  }
};

// As WordExchange, with what is different.
struct WordRules {
  bool clears = true;
  int too_many = 0;  // publications that are cleared
  bool fence = true, reader_fence = true;
  int fence_at = -1;  // of the publications of a window: -1 the last one
  int looked_at = 4;  // words
  bool waits = true, reserves = true;
};
inline WordRules word_rules;

class WordVariant : public WordExchange {
 public:
  using WordExchange::WordExchange;

  template <class T>
  static uint32_t not_reserved(uint32_t word) {
    return word_rules.reserves ? WordExchange::not_reserved<T>(word) : word;
  }
  bool is_missing(const uint32_t (&words)[4]) const {
    const uint32_t* const end = words + word_rules.looked_at;
    return word_rules.waits && std::find(words, end, kNotThere) != end;
  }
  void end_reading(int n) const {
    if (word_rules.reader_fence && (n - word_rules.fence_at) % mail_.window == 0) block_.fence();
  }
  template <class EachPlace>
  void begin_publishing(int n, EachPlace each_place) const {
    if (!word_rules.clears || n % mail_.window != 1 || n <= mail_.window) return;
    for (int old = n - 1 - mail_.window; old < n - 1 + word_rules.too_many; ++old)
      each_place(old, [&](uint32_t* word) { block_.store(word, kNotThere); });
    if (word_rules.fence) block_.fence();
  }
};

// A thread's block as it is, to be changed.
class BlockBehind : public Block {
 public:
  explicit BlockBehind(const Block& block) : block_(block) {}
  int thread() const override { return block_.thread(); }
  int64_t index() const override { return block_.index(); }
  int64_t group() const override { return block_.group(); }
  void sync() const override { block_.sync(); }
  uint32_t swap(uint32_t word, int apart) const override { return block_.swap(word, apart); }
  void sync_warp() const override { block_.sync_warp(); }
  void load(const uint32_t* source, uint32_t (&words)[4]) const override { block_.load(source, words); }
  void store(uint32_t* target, uint32_t word) const override { block_.store(target, word); }
  void fence() const override { block_.fence(); }
  void arrive(uint32_t* counter) const override { block_.arrive(counter); }
  uint32_t look(const uint32_t* counter) const override { return block_.look(counter); }
  void pause() const override { block_.pause(); }
  void report(uint32_t* target, uint32_t word) const override { block_.report(target, word); }
  void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand operand) const override {
    block_.multiply(sums, a, b, operand);
  }

 private:
  void* shared_memory() const override { return block_.shared<void>(); }

  const Block& block_;
};

// A thread's block whose stores of kNotThere arrive as late as they may: with the thread's next fence, or before its
// next store to the word. For threads of the block they are there at once.
class BlockWithLateClears : public BlockBehind {
 public:
  using Latest = std::map<const uint32_t*, uint32_t>;  // what the block has stored where it has cleared
  BlockWithLateClears(const Block& block, Latest& latest) : BlockBehind(block), latest_(latest) {}

  void load(const uint32_t* source, uint32_t (&words)[4]) const override {
    BlockBehind::load(source, words);
    for (int i = 0; i < 4; ++i)
      if (const auto found = latest_.find(source + i); found != latest_.end() && words[i] != found->second)
        words[i] = kNotThere;
  }
  void store(uint32_t* target, uint32_t word) const override {
    if (word == kNotThere) {
      latest_[target] = word, held_.insert(target);
      return;
    }
    if (held_.erase(target)) BlockBehind::store(target, kNotThere);
    BlockBehind::store(target, word);
    if (const auto found = latest_.find(target); found != latest_.end()) found->second = word;
  }
  void fence() const override {
    for (uint32_t* const target : held_) BlockBehind::store(target, kNotThere);
    held_.clear();
    BlockBehind::fence();
  }

 private:
  Latest& latest_;
  mutable std::set<uint32_t*> held_;
};
template <class Kernel>
struct OnLateClears {
  static constexpr int kThreads = Kernel::kThreads;
  const Kernel& kernel;
  std::map<int64_t, BlockWithLateClears::Latest>& latest;  // of each block
  size_t shared_bytes() const { return kernel.shared_bytes(); }
  void operator()(const Block& block) const { kernel(BlockWithLateClears(block, latest[block.index()])); }
};

// What is known of waits; and which block publishes nothing, when.
struct Watch {
  int64_t silent_block = -1;
  std::function<bool(int64_t d, int64_t tile, int64_t step)> is_silent;
  std::set<std::tuple<int64_t, int64_t, int64_t>> waits = {};  // group, tile, step
};

// A thread's block, whose stores and arrivals do not take place while it is silent.
class WatchedBlock : public BlockBehind {
 public:
  WatchedBlock(const Block& block, const uint32_t* failed, Watch& watch)
      : BlockBehind(block), failed_(failed), watch_(watch) {}
  void note(int64_t d, int64_t tile, int64_t step) const {
    watch_.waits.insert({d, tile, step});
    is_silent_ = index() == watch_.silent_block && watch_.is_silent(d, tile, step);
  }
  void store(uint32_t* target, uint32_t word) const override {
    if (!is_silent_) BlockBehind::store(target, word);
  }
  void arrive(uint32_t* counter) const override {
    if (!is_silent_ || counter == failed_) BlockBehind::arrive(counter);
  }

 private:
  const uint32_t* const failed_;
  Watch& watch_;
  mutable bool is_silent_ = false;
};
// An exchange that tells its block which step it is in: before it reads, which then does not begin earlier.
template <class Base>
class Watched : public Base {
 public:
  using Base::Base;
  static constexpr bool kWaitsFirst = true;
  void wait(int n, int tile, int step) {
    static_cast<const WatchedBlock&>(this->block_).note(this->d_, tile, step);
    Base::wait(n, tile, step);
  }
};
template <class Kernel>
struct OnWatchedBlock {
  static constexpr int kThreads = Kernel::kThreads;
  const Kernel& kernel;
  Watch& watch;
  size_t shared_bytes() const { return kernel.shared_bytes(); }
  void operator()(const Block& block) const { kernel(WatchedBlock(block, kernel.args.mailbox.failed, watch)); }
};

}  // namespace fastrnn::cuda
