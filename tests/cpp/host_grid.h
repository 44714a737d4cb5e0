// Blocks that run at the same time and wait for each other (launch_together of csrc/cuda/block.h) on the host: one goes
// on after the other, by a schedule that is drawn from a seed and means ill, with memory that is weak (host_memory.h).
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "host_block.h"

namespace fastrnn::cuda {

// How the next launches are scheduled: each draws from the seed and its number. The same seed with `launch` set to 0
// gives the same schedules again.
struct HostSchedule {
  uint64_t seed = 0;
  std::atomic<uint64_t> launch{0};
  bool weak = true;            // otherwise memory as it is, one access after the other
  int64_t patience = 200'000;  // pauses of a thread while nothing changes anywhere, after which it throws
};
inline HostSchedule host_schedule;
inline std::atomic<int64_t> grids_run{0};

// Which block goes on, for a while by one rule and then by another: any; one ahead of all; all but one; in turn.
class HostTurns {
 public:
  explicit HostTurns(HostRandom& random) : random_(random) {}
  int64_t next(int64_t blocks) {
    if (blocks != blocks_ || --left_ < 0) {
      blocks_ = blocks, rule_ = random_.below(4), chosen_ = random_.below(blocks);
      left_ = random_.below(16 * blocks);
    }
    if (rule_ == 0 || blocks == 1) return random_.below(blocks);
    if (rule_ == 1) return chosen_;
    if (rule_ == 2) return (chosen_ + 1 + random_.below(blocks - 1)) % blocks;
    return ++last_ % blocks;
  }

 private:
  HostRandom& random_;
  int64_t blocks_ = 0, left_ = 0, rule_ = 0, chosen_ = 0, last_ = 0;
};

struct HostGrid {
  // Throws what a thread throws, and where threads wait for what does not come.
  template <class Kernel>
  static void run(const Kernel& kernel, int64_t blocks, int64_t groups) {
    ++grids_run;
    HostRandom random(HostRandom(host_schedule.seed).next() + host_schedule.launch++);
    random = HostRandom(random.next());  // so that those of neighbouring launches have nothing in common
    std::unique_ptr<HostMemory> memory = std::make_unique<PlainMemory>();
    if (host_schedule.weak) memory = std::make_unique<WeakMemory>(blocks * groups, Kernel::kThreads, random);
    memory->patience = host_schedule.patience;
    constexpr int64_t kLongest[] = {8, 256, 8192};
    const int64_t longest = kLongest[random.below(3)];
    std::vector<std::unique_ptr<HostBlock>> running;
    for (int64_t i = 0; i < blocks * groups; ++i)
      running.push_back(std::make_unique<HostBlock>(kernel, kernel.shared_bytes(), i % blocks, i / blocks,
                                                    HostShare{*memory, &random, i, longest}));
    HostTurns turns(random);
    while (!running.empty()) {
      auto& block = running[static_cast<size_t>(turns.next(static_cast<int64_t>(running.size())))];
      if (block->advance()) {
        std::swap(block, running.back());
        running.pop_back();
      }
      memory->pass_time();
    }
    memory->finish();
  }
};

}  // namespace fastrnn::cuda
