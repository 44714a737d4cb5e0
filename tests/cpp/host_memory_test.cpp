// Litmus tests of the weak memory (host_memory.h): what it has to keep is kept, and what it need not keep is broken for
// some seed.
#include "litmus.h"

namespace fastrnn::cuda {
namespace {

// Whether a reader that has seen the flag misses the word that was stored before it.
bool misses_message(bool writer_fence, bool reader_fence) {
  Words<2> memory;
  bool missed = false;
  run(2, [&](const Block& block) {
    if (block.thread() != 0) return;
    if (block.index() == 0) {
      block.store(memory.line(0), 1);
      if (writer_fence) block.fence();
      block.store(memory.line(1), 1);
    } else {
      wait_for(block, memory.line(1));
      if (reader_fence) block.fence();
      missed = load_word(block, memory.line(0)) != 1;
    }
  });
  if (memory.words[0] != 1 || memory.words[4] != 1) throw std::runtime_error("a store has not arrived");
  return missed;
}
// The same with a count in place of the flag.
bool misses_counted_message(bool arrives, bool looks) {
  Words<2> memory;
  bool missed = false;
  run(2, [&](const Block& block) {
    if (block.thread() != 0) return;
    if (block.index() == 0) {
      block.store(memory.line(0), 1);
      if (arrives)
        block.arrive(memory.line(1));
      else
        block.store(memory.line(1), 1);
    } else {
      if (looks)
        wait_for_count(block, memory.line(1), 1);
      else
        wait_for(block, memory.line(1));
      missed = load_word(block, memory.line(0)) != 1;
    }
  });
  return missed;
}

void test_messages() {
  never("message: fences on both sides", [] { return misses_message(true, true); });
  sometimes("message: no fence of the writer", [] { return misses_message(false, true); });
  sometimes("message: no fence of the reader", [] { return misses_message(true, false); });
  never("message: arrive and look", [] { return misses_counted_message(true, true); });
  sometimes("message: a store in place of arrive", [] { return misses_counted_message(false, true); });
  sometimes("message: a load in place of look", [] { return misses_counted_message(true, false); });
  sometimes("message: a fence of the reader too early", [] {
    Words<2> memory;
    bool missed = false;
    run(2, [&](const Block& block) {
      if (block.thread() != 0) return;
      if (block.index() == 0) return block.store(memory.line(0), 1), block.arrive(memory.line(1));
      block.fence();
      wait_for(block, memory.line(1));
      missed = load_word(block, memory.line(0)) != 1;
    });
    return missed;
  });
  host_schedule.weak = false;
  never("message: no fences, memory as it is", [] { return misses_message(false, false); });
  host_schedule.weak = true;
  never("message: by way of a third block", [] {
    Words<3> memory;
    bool missed = false;
    run(3, [&](const Block& block) {
      if (block.thread() != 0) return;
      if (block.index() != 0) wait_for_count(block, memory.line(block.index()), 1);
      if (block.index() == 0) block.store(memory.line(0), 1);
      if (block.index() == 2) missed = load_word(block, memory.line(0)) != 1;
      if (block.index() != 2) block.arrive(memory.line(block.index() + 1));
    });
    return missed;
  });
}

// A word counts up, while others read it: does a thread, or one after another behind a barrier, see it go back?
bool goes_back(bool barriers) {
  Words<1> memory;
  bool back = false;
  run<64>(3, [&](const Block& block) {
    if (block.index() == 0) {
      for (uint32_t i = 1; block.thread() == 0 && i <= 12; ++i) {
        block.store(memory.line(0), i);
        if (i % 3 == 0) block.pause();
      }
      return;
    }
    uint32_t* const latest = block.shared<uint32_t>();
    if (block.thread() == 0) *latest = 0;
    block.sync();
    for (int i = 0; i < 24; ++i) {
      if (barriers) {
        if (block.thread() == 7 * i % 64) {
          const uint32_t seen = load_word(block, memory.line(0));
          back |= seen < *latest;
          *latest = seen;
        }
        block.sync();
      } else if (block.thread() == 5) {
        const uint32_t seen = load_word(block, memory.line(0));
        back |= seen < *latest;
        *latest = seen;
        block.pause();
      }
    }
  });
  if (memory.words[0] != 12) throw std::runtime_error("the stores have not arrived in order");
  return back;
}

void test_coherence() {
  never("coherence: of a thread", [] { return goes_back(false); });
  never("coherence: of a block, across barriers", [] { return goes_back(true); });
  never("coherence: own stores are seen", [] {
    Words<1> memory;
    bool missed = false;
    run(2, [&](const Block& block) {
      for (uint32_t i = 1; block.thread() == 0 && i <= 8; ++i) {
        block.store(memory.line(0) + block.index(), i);
        if (i % 2 == 0) block.pause();
        uint32_t words[4];
        block.load(memory.line(0), words);
        missed |= words[block.index()] != i || words[1 - block.index()] > 8;
      }
      block.sync();
      if (block.thread() == 9) {
        uint32_t words[4];
        block.load(memory.line(0), words);
        missed |= words[block.index()] != 8;
      }
    });
    return missed;
  });
  sometimes("coherence: stores of others of the block need a barrier", [] {
    Words<1> memory;
    bool stored = false, missed = false;
    run(1, [&](const Block& block) {
      if (block.thread() == 0) block.store(memory.line(0), 1), stored = true;
      while (!stored) block.pause();
      missed |= load_word(block, memory.line(0)) != 1 && memory.words[0] == 0;  // not just one that is old
    });
    return missed;
  });
  never("coherence: own arrivals are counted", [] {
    Words<1> memory;
    bool missed = false;
    run(2, [&](const Block& block) {
      for (uint32_t i = 1; block.thread() < 4 && i <= 4; ++i) {
        block.arrive(memory.line(0));
        missed |= block.look(memory.line(0)) < i;
      }
    });
    return missed || memory.words[0] != 32;
  });
  never("coherence: what one has read, the next one it tells reads", [] {
    Words<2> memory;
    bool back = false;
    uint32_t read = 0;
    run(3, [&](const Block& block) {
      if (block.thread() != 0) return;
      if (block.index() == 0)
        for (uint32_t i = 1; i <= 8; ++i) block.store(memory.line(0), i), block.pause();
      if (block.index() == 1) read = load_word(block, memory.line(0)), block.fence(), block.store(memory.line(1), 1);
      if (block.index() != 2) return;
      wait_for_count(block, memory.line(1), 1);
      back = load_word(block, memory.line(0)) < read;
    });
    return back;
  });
  sometimes("coherence: words of one load are read one by one", [] {
    Words<1> memory;
    bool mixed = false;
    run(2, [&](const Block& block) {
      if (block.thread() != 0) return;
      if (block.index() == 0)
        for (int i = 0; i < 4; ++i) block.store(memory.line(0) + i, 1);
      for (int i = 0; block.index() == 1 && i < 8; ++i, block.pause()) {
        uint32_t words[4];
        block.load(memory.line(0), words);
        mixed |= words[0] + words[1] + words[2] + words[3] == 2;
      }
    });
    return mixed;
  });
}

enum class By { kFence, kArrive };
// All threads of a block store a word, one tells it, all of another block read them.
bool misses_block(By by, bool writer_barrier, bool reader_fence, bool reader_barrier) {
  constexpr int kThreads = 64;
  Words<kThreads + 1> memory;
  uint32_t* const flag = memory.line(kThreads);
  bool missed = false;
  int stored = 0;  // what the test knows, and the block does not
  run<kThreads>(2, [&](const Block& block) {
    const int thread = block.thread();
    if (block.index() == 0) {
      block.store(memory.line(thread), 7);
      ++stored;
      if (writer_barrier) block.sync();
      if (thread != 40) return;
      while (stored < kThreads) block.pause();
      if (by == By::kArrive) return block.arrive(flag);
      block.fence();
      block.store(flag, 1);
    } else {
      if (thread == 3) {
        wait_for(block, flag);
        if (reader_fence) block.fence();
      }
      if (reader_barrier) block.sync();
      if (reader_barrier || thread == 3) missed |= load_word(block, memory.line(kThreads - 1 - thread)) != 7;
    }
  });
  return missed;
}

void test_cumulativity() {
  never("barrier: one fence covers the block", [] { return misses_block(By::kFence, true, true, true); });
  never("barrier: one arrive covers the block", [] { return misses_block(By::kArrive, true, true, true); });
  sometimes("barrier: none of the writer", [] { return misses_block(By::kFence, false, true, true); });
  sometimes("barrier: none before arrive", [] { return misses_block(By::kArrive, false, true, true); });
  sometimes("barrier: no fence of the reader", [] { return misses_block(By::kFence, true, false, true); });
  never("barrier: the reader by itself", [] { return misses_block(By::kFence, true, true, false); });
}

// Blocks exchange a word of each thread in every step, as a recurrent layer does, with a barrier of all blocks. Whether
// one reads a word of another step.
bool misses_step(int slots, bool all_wait, int extra_arrivals = 0) {
  constexpr int kThreads = 64, kBlocks = 3, kSteps = 5;
  alignas(16) static std::array<uint32_t, 2 * kBlocks * kThreads> words;
  words.fill(0);
  Words<1> memory;
  bool missed = false;
  run<kThreads>(kBlocks, [&](const Block& block) {
    for (uint32_t step = 0; step < kSteps; ++step) {
      uint32_t* const slot = words.data() + static_cast<int>(step) % slots * kBlocks * kThreads;
      block.store(slot + block.index() * kThreads + block.thread(), step + 1);
      block.sync();
      if (block.thread() == 0) {
        block.arrive(memory.line(0));
        for (int i = 0; step == 0 && block.index() == 0 && i < extra_arrivals; ++i) block.arrive(memory.line(0));
      }
      if (block.thread() == 0 || all_wait) wait_for_count(block, memory.line(0), kBlocks * (step + 1));
      block.sync();
      for (int i = block.thread() * 4; i < kBlocks * kThreads; i += kThreads * 4) {
        uint32_t got[4];
        block.load(slot + i, got);
        for (const uint32_t word : got) missed |= word != step + 1;
      }
    }
  });
  return missed;
}

void test_steps() {
  never("steps: two slots", [] { return misses_step(2, false); });
  never("steps: two slots, every thread looks", [] { return misses_step(2, true); });
  sometimes("steps: one slot, written over", [] { return misses_step(1, false); });
  sometimes("steps: a count too many", [] { return misses_step(2, false, 1); });
}

}  // namespace

void test_memory() {
  test_messages();
  test_coherence();
  test_cumulativity();
  test_steps();
}

}  // namespace fastrnn::cuda
