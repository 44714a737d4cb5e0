// How the blocks of a grid tell each other the operand of the next step: through a mailbox in global memory, which
// stays in the L2 cache. What is published n-th, for the 8 rows of a tile, lies in slot n % slots, in the order of the
// fragments (fragments.h): one load of 16 bytes brings a thread what it needs of a block of k.
//
// Two ways to know that a word is there, of which a kernel takes one:
//   WordExchange   the word says so itself: what has not been published is kNotThere, a NaN which is never published.
//                  One trip through L2. Slots are made kNotThere again, half of them at a time, by who publishes there:
//                  before publication n = k window + 1 those of the window before, [n - 1 - window, n - 2], of which
//                  the next ones to be used are those of publication (k + 1) window.
//                  Nobody loses a word: who clears has seen all of n - 1, each word of it published by a block that had
//                  looked at all its words of n - 2 before (the store depends on what was loaded: a word is compared,
//                  then multiplied, before the barrier behind which the block publishes).
//                  Nobody finds an old word: clear, fence, store of n | load of n or later, fence (at the end of each
//                  window), load from the slot. A fence for a reader and a writer in each window, none in other steps
//   FlagExchange   each block counts itself in when it has published, and waits for all: a barrier
// Waiting ends after kMostSpins: from then on the operand of that thread is NaN, and the host is told the step.
//
// Requires that all blocks run at the same time.
#pragma once

#include "block.h"
#include "fragments.h"

namespace fastrnn::cuda {

constexpr uint32_t kNotThere = 0xFFFFFFFFu;
constexpr uint32_t kNaN16 = 0x7FFF7FFFu, kNaN32 = 0x7FFFFFFFu;

#if !defined(FASTRNN_MOST_SPINS)
#define FASTRNN_MOST_SPINS (1 << 24)  // of some 0.5 us: several seconds
#endif
constexpr int kMostSpins = FASTRNN_MOST_SPINS;
constexpr int kSpinsOfLook = FASTRNN_MOST_SPINS < 1024 ? 1 : 1024;  // until a thread looks whether others gave up

struct Mailbox {
  uint32_t* words;    // [D, slots, tiles, k_blocks, 8, 16]
  uint32_t* flags;    // [D, tiles, publications] blocks that have published, FlagExchange only
  uint32_t* failed;   // not 0: somebody gave up
  uint32_t* report;   // host memory: step + 1, times 2, and 1 of a backward pass
  int slots, window;  // powers of two
  int tiles, k_blocks, publications;
  int members;  // blocks that publish a tile

  FASTRNN_FN int64_t words_of_slot() const { return static_cast<int64_t>(tiles) * k_blocks * kWordsOfBlock; }
  // The blocks of k of publication n of a tile.
  FASTRNN_FN uint32_t* operand(int d, int n, int tile) const {
    return words + static_cast<int64_t>((d * slots + (n & (slots - 1))) * tiles + tile) * (k_blocks * kWordsOfBlock);
  }
  FASTRNN_FN uint32_t* flag(int d, int n, int tile) const {
    return flags + static_cast<int64_t>(d * tiles + tile) * publications + n;
  }
};

// What both have: a thread's view of the mailbox.
class Exchange {
 public:
  FASTRNN_BLOCK_FN Exchange(const Block& block, const Mailbox& mailbox, int group, bool is_backward)
      : block_(block), mail_(mailbox), d_(group), is_backward_(is_backward) {}

  // Words that were waited for, or given up.
  FASTRNN_FN void taken(uint32_t (&words)[4]) const {
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = gave_up_ ? kNotThere : words[i];
  }

  template <class T>
  static FASTRNN_FN uint32_t not_reserved(uint32_t word) {
    return word != kNotThere ? word : sizeof(T) == 4 ? kNaN32 : kNaN16;
  }

  // After so many looks at what is not there: whether to give up.
  FASTRNN_BLOCK_FN bool gives_up(int spins, int step) {
    if (gave_up_) return true;
    if (spins % kSpinsOfLook == kSpinsOfLook - 1 && (spins >= kMostSpins || block_.look(mail_.failed) != 0)) {
      if (spins >= kMostSpins) {
        block_.arrive(mail_.failed);
        block_.report(mail_.report, static_cast<uint32_t>(step + 1) * 2 + (is_backward_ ? 1 : 0));
      }
      gave_up_ = true;
    }
    if (!gave_up_) block_.pause();
    return gave_up_;
  }

 protected:
  const Block& block_;
  const Mailbox& mail_;
  const int d_;
  const bool is_backward_;
  bool gave_up_ = false;
};

class WordExchange : public Exchange {
 public:
  using Exchange::Exchange;
  static constexpr bool kWaitsFirst = false;

  FASTRNN_BLOCK_FN void wait(int, int, int) {}
  FASTRNN_FN bool is_missing(const uint32_t (&words)[4]) const {
    return words[0] == kNotThere || words[1] == kNotThere || words[2] == kNotThere || words[3] == kNotThere;
  }
  // All reads of publication n are done.
  FASTRNN_BLOCK_FN void end_reading(int n) const {
    if ((n & (mail_.window - 1)) == mail_.window - 1) block_.fence();
  }

  // Before a thread publishes words of publication n, at the places that each_place goes through.
  template <class EachPlace>
  FASTRNN_BLOCK_FN void begin_publishing(int n, EachPlace each_place) const {
    if ((n & (mail_.window - 1)) != 1 || n <= mail_.window) return;
    for (int old = n - 1 - mail_.window; old < n - 1; ++old)
      each_place(old, [&](uint32_t* word) { block_.store(word, kNotThere); });
    block_.fence();
  }
  FASTRNN_BLOCK_FN void end_publishing(int, int) const {}
};

class FlagExchange : public Exchange {
 public:
  using Exchange::Exchange;
  static constexpr bool kWaitsFirst = true;

  // Until all blocks have published.
  FASTRNN_BLOCK_FN void wait(int n, int tile, int step) {
    const uint32_t* const flag = mail_.flag(d_, n, tile);
    for (int spins = 0; block_.look(flag) < static_cast<uint32_t>(mail_.members) && !gives_up(spins, step);) ++spins;
  }
  FASTRNN_FN bool is_missing(const uint32_t (&)[4]) const { return false; }
  FASTRNN_BLOCK_FN void end_reading(int) const {}

  template <class EachPlace>
  FASTRNN_BLOCK_FN void begin_publishing(int, EachPlace) const {}
  FASTRNN_BLOCK_FN void end_publishing(int n, int tile) const {
    block_.sync();
    if (block_.thread() == 0) block_.arrive(mail_.flag(d_, n, tile));
  }
};

}  // namespace fastrnn::cuda
