// What blocks that run at the same time tell each other (csrc/cuda/block.h) on the host: through memory as it is, or
// through one that is as weak as that of a GPU may be, where stores arrive late and in any order, and loads give old
// words, unless fences, counts or barriers forbid it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastrnn::cuda {

// Numbers that look random, the same for a seed (splitmix64).
class HostRandom {
 public:
  explicit HostRandom(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
  }
  int64_t below(int64_t n) {
    return static_cast<int64_t>((next() >> 32) * static_cast<uint64_t>(n) >> 32);
  }  // n < 2^31

 private:
  uint64_t state_;
};

// A thread of a grid: its block, counted over all groups, and its place there.
struct HostPlace {
  int64_t block;
  int thread;
};

inline uint32_t read_word(const uint32_t* source) {
  uint32_t word;
  std::memcpy(&word, source, sizeof word);
  return word;
}

class HostMemory {
 public:
  virtual ~HostMemory() = default;
  virtual uint32_t load(HostPlace place, const uint32_t* source) = 0;
  virtual void store(HostPlace place, uint32_t* target, uint32_t word) = 0;
  virtual void fence(HostPlace place) = 0;
  virtual void arrive(HostPlace place, uint32_t* counter) = 0;
  virtual uint32_t look(HostPlace place, const uint32_t* counter) = 0;
  virtual void barrier(int64_t block) = 0;  // all threads of the block have come to it
  virtual void pass_time() = 0;             // some stores arrive
  virtual void finish() = 0;                // all stores arrive

  int64_t changes = 0;         // grows with all that may end the waiting of a thread
  int64_t patience = 200'000;  // pauses of a thread without a change, after which it waits in vain
};

// Memory as it is.
class PlainMemory : public HostMemory {
 public:
  uint32_t load(HostPlace, const uint32_t* source) override { return read_word(source); }
  void store(HostPlace, uint32_t* target, uint32_t word) override {
    std::memcpy(target, &word, sizeof word);
    ++changes;
  }
  void fence(HostPlace) override {}
  void arrive(HostPlace place, uint32_t* counter) override { store(place, counter, read_word(counter) + 1); }
  uint32_t look(HostPlace, const uint32_t* counter) override { return read_word(counter); }
  void barrier(int64_t) override {}
  void pass_time() override {}
  void finish() override {}
};

// A store is pending in its block until it is committed: it gets the next time, and memory the word. That comes to
// pass at any time; stores to one address keep their order. A thread's own stores, and those that threads of its block
// made before the last barrier, are there for it at once; of committed words it reads the newest one or an older one.
// How old is bounded
//   by its floor: words that were replaced at this time, or before, are gone. fence() raises it to the time of the
//     latest word that the thread has read, look() to that of the count; at a barrier all of a block have the highest
//   for each address (coherence) by what the thread has read or stored there, or others of its block had before the
//     last barrier
// fence() and arrive() commit what the thread has stored, and what its block had stored before the last barrier.
// A thread's loads and stores begin in the order of the program: that a load takes place after a later store (load
// buffering) is not modelled.
class WeakMemory : public HostMemory {
 public:
  WeakMemory(int64_t blocks, int threads, HostRandom& random) : random_(random), blocks_(static_cast<size_t>(blocks)) {
    for (BlockView& block : blocks_) block.threads.resize(static_cast<size_t>(threads));
    constexpr int kNewest[] = {95, 70, 40}, kHold[] = {1, 4, 16};
    newest_ = kNewest[random_.below(3)], hold_ = kHold[random_.below(3)];
  }

  uint32_t load(HostPlace place, const uint32_t* source) override { return read(place, source, false); }
  uint32_t look(HostPlace place, const uint32_t* counter) override { return read(place, counter, true); }
  void store(HostPlace place, uint32_t* target, uint32_t word) override {
    BlockView& block = view(place);
    Word& at = word_at(target);
    at.pending.push_back({place, block.epoch, word});
    block.pending.push_back(&at);
    ++changes;
  }
  void fence(HostPlace place) override {
    release(place);
    ThreadView& thread = thread_view(place);
    thread.raise(thread.latest_read);
  }
  void arrive(HostPlace place, uint32_t* counter) override {
    release(place);
    Word& at = word_at(counter);
    commit(at, at.values.back().word + 1);
    note(thread_view(place).seen, at, clock_);
  }
  void barrier(int64_t index) override {
    BlockView& block = blocks_[static_cast<size_t>(index)];
    ++block.epoch;
    int64_t floor = 0;
    for (const ThreadView& thread : block.threads) floor = std::max(floor, thread.floor);
    forget(block.seen, floor);
    for (ThreadView& thread : block.threads) {
      thread.floor = floor;
      for (const auto& [word, time] : thread.seen)
        if (time > floor) note(block.seen, *word, time);
      if (!thread.seen.empty()) thread.seen.clear();
    }
  }
  void pass_time() override {
    for (BlockView& block : blocks_) {
      if (block.pending.empty() || random_.below(hold_) != 0) continue;
      for (int64_t n = random_.below(size(block.pending) + 1); n > 0; --n) commit_any(block);
    }
  }
  void finish() override {
    for (BlockView& block : blocks_)
      while (!block.pending.empty()) commit_any(block);
  }

 private:
  static constexpr size_t kKept = 8;  // values of a word, the newest ones
  struct Value {
    int64_t time;
    uint32_t word;
  };
  struct Store {
    HostPlace place;
    int64_t epoch;
    uint32_t word;
  };
  struct Word {
    uint32_t* address;
    std::vector<Value> values;   // committed, the oldest first
    std::vector<Store> pending;  // of any block, the oldest first
  };
  using Seen = std::unordered_map<const Word*, int64_t>;  // the time of what was read or stored, if above the floor

  static int64_t seen_at(const Seen& seen, const Word& word) {
    if (seen.empty()) return 0;
    const auto found = seen.find(&word);
    return found == seen.end() ? 0 : found->second;
  }
  static void note(Seen& seen, const Word& word, int64_t time) {
    int64_t& known = seen[&word];
    known = std::max(known, time);
  }
  static void forget(Seen& seen, int64_t floor) {
    for (auto i = seen.begin(); i != seen.end();) i = i->second <= floor ? seen.erase(i) : std::next(i);
  }
  template <class T>
  static int64_t size(const std::vector<T>& items) {
    return static_cast<int64_t>(items.size());
  }

  struct ThreadView {
    int64_t floor = 0, latest_read = 0;
    Seen seen;  // since the last barrier
    void raise(int64_t time) {
      if (time <= floor) return;
      floor = time;
      forget(seen, floor);
    }
  };
  struct BlockView {
    int64_t epoch = 0;  // barriers so far
    std::vector<ThreadView> threads;
    std::vector<Word*> pending;  // one for each store of the block that is, in no order
    Seen seen;                   // before the last barrier
  };

  BlockView& view(HostPlace place) { return blocks_[static_cast<size_t>(place.block)]; }
  ThreadView& thread_view(HostPlace place) { return view(place).threads[static_cast<size_t>(place.thread)]; }

  // What memory holds when a word is first met was there at the launch, as nothing else writes it.
  Word& word_at(const uint32_t* address) {
    const auto [found, is_new] = words_.try_emplace(address);
    Word& word = found->second;
    if (is_new) {
      word.address = const_cast<uint32_t*>(address);
      word.values.push_back({0, read_word(address)});
    } else if (read_word(address) != word.values.back().word) {
      throw std::runtime_error("fastrnn: something else writes a word that blocks tell each other");
    }
    return word;
  }

  uint32_t read(HostPlace place, const uint32_t* source, bool acquires) {
    Word& word = word_at(source);
    BlockView& block = view(place);
    ThreadView& thread = thread_view(place);
    for (size_t i = word.pending.size(); i-- > 0;) {
      const Store& store = word.pending[i];
      if (store.place.block == place.block && (store.place.thread == place.thread || store.epoch < block.epoch))
        return store.word;
    }
    const std::vector<Value>& values = word.values;
    const int64_t floor = std::max({thread.floor, seen_at(thread.seen, word), seen_at(block.seen, word)});
    int64_t oldest = size(values) - 1;
    while (oldest > 0 && values[static_cast<size_t>(oldest)].time > floor) --oldest;
    int64_t chosen = size(values) - 1;
    if (chosen > oldest && random_.below(100) >= newest_) chosen = oldest + random_.below(chosen - oldest);
    const Value value = values[static_cast<size_t>(chosen)];
    thread.latest_read = std::max(thread.latest_read, value.time);
    if (chosen > oldest) note(thread.seen, word, value.time);
    if (acquires) thread.raise(value.time);
    return value.word;
  }

  void release(HostPlace place) {
    BlockView& block = view(place);
    std::vector<Word*>& pending = block.pending;
    const auto is_due = [&](const Store& store) {
      return store.place.block == place.block && (store.place.thread == place.thread || store.epoch < block.epoch);
    };
    const auto has_due = [&](const Word* word) {
      return std::any_of(word->pending.begin(), word->pending.end(), is_due);
    };
    const auto due = std::partition(pending.begin(), pending.end(), [&](const Word* word) { return !has_due(word); });
    for (auto n = pending.end() - due; n > 1; --n) std::swap(due[n - 1], due[random_.below(n)]);
    // Of a word with several stores of the block, those before the last one that is due.
    pending.erase(std::remove_if(due, pending.end(),
                                 [&](Word* word) {
                                   const bool commits = has_due(word);
                                   if (commits) commit_oldest(*word, place.block);
                                   return commits;
                                 }),
                  pending.end());
  }

  void commit_any(BlockView& block) {
    std::swap(block.pending[static_cast<size_t>(random_.below(size(block.pending)))], block.pending.back());
    Word* const word = block.pending.back();
    block.pending.pop_back();
    commit_oldest(*word, &block - blocks_.data());
  }
  void commit_oldest(Word& word, int64_t block) {
    const auto first = std::find_if(word.pending.begin(), word.pending.end(),
                                    [&](const Store& store) { return store.place.block == block; });
    const Store store = *first;
    word.pending.erase(first);
    commit(word, store.word);
    BlockView& by = view(store.place);
    note(store.epoch < by.epoch ? by.seen : thread_view(store.place).seen, word, clock_);
  }
  void commit(Word& word, uint32_t value) {
    if (word.values.size() == kKept) word.values.erase(word.values.begin());
    word.values.push_back({++clock_, value});
    std::memcpy(word.address, &value, sizeof value);
    ++changes;
  }

  HostRandom& random_;
  std::vector<BlockView> blocks_;
  std::unordered_map<const uint32_t*, Word> words_;
  int64_t clock_ = 0;
  int newest_, hold_;  // how often, of 100, the newest word is read; one in how many times stores arrive
};

}  // namespace fastrnn::cuda
