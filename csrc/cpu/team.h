// Threads that run one recurrence together, each its share of the hidden units, and meet after every time step.
//
// A barrier needs all its threads to be running, which no thread pool promises. So a team is whoever comes: the first
// waits for the others for a short while, then the team is closed, and who comes later finds nothing left to do. How
// many there are changes no result.
#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn {

class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}
  Team(const Team&) = delete;

  int size() const { return size_.load(std::memory_order_relaxed); }

  // Number of the calling thread in the team, or -1 if the team was closed without it. Returns when it is closed.
  int join() {
    int member;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (size() > 0) return -1;
      member = members_++;
      if (members_ == wanted_) size_.store(members_, std::memory_order_release);
    }
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (size_.load(std::memory_order_acquire) == 0) {
      pause();
      if (member == 0 && std::chrono::steady_clock::now() > deadline) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (size() == 0) size_.store(members_, std::memory_order_release);
      }
    }
    return member;
  }

  // Everything the members wrote before it is seen by all of them after it.
  void barrier() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
      if (spin < kSpins)
        pause();
      else
        std::this_thread::yield();  // a member has lost its core
    }
  }

 private:
  // Waking a sleeping thread takes up to about 60 us; a spin of 4000 pauses lasts about as long.
  static constexpr std::chrono::microseconds kPatience{100};
  static constexpr int kSpins = 4000;

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int wanted_;
  int members_ = 0;
  std::mutex mutex_;
  std::atomic<int> size_{0};  // 0 until the team is closed
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace fastrnn
