// The threads of a block (csrc/cuda/block.h) on the host: as fibres, of which one runs until it waits. Warps run one
// after the other to the next barrier, in an order that changes there, the threads of a warp from product to product.
// Throws where the threads of a block do not all come to a barrier, or those of a warp to a product or a swap, and what
// a thread throws. A block on its own has memory as it is; for blocks that run at the same time see host_grid.h.
#pragma once

#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/block.h"
#include "fibre.h"
#include "host_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastrnn::cuda {

inline std::atomic<int64_t> blocks_run{0};

// Stacks that are kept for the next blocks of this thread of the system.
class HostStacks {
 public:
  explicit HostStacks(size_t count) {
    while (kept().size() < count) kept().push_back(std::make_unique<Stack>());
    stacks_.reserve(count);
    for (; stacks_.size() < count; kept().pop_back()) stacks_.push_back(std::move(kept().back()));
  }
  ~HostStacks() {
    for (auto& stack : stacks_) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stack->bytes, Stack::kBytes);  // a fibre that is given up marks its frames
#endif
      kept().push_back(std::move(stack));
    }
  }
  HostStacks(const HostStacks&) = delete;
  HostStacks& operator=(const HostStacks&) = delete;
  Stack& operator[](size_t i) { return *stacks_[i]; }

 private:
  static std::vector<std::unique_ptr<Stack>>& kept() {
    static thread_local std::vector<std::unique_ptr<Stack>> stacks;
    return stacks;
  }
  std::vector<std::unique_ptr<Stack>> stacks_;
};

// What a block shares with those that run at the same time.
struct HostShare {
  HostMemory& memory;
  HostRandom* random;  // null: a block on its own, in orders of its own
  int64_t place;       // of the block among them
  int64_t longest;     // accesses to that memory, at most, until another thread goes on
};

class HostBlock : public Block {
 public:
  template <class Kernel>
  static void run(const Kernel& kernel, int64_t index, int64_t group) {
    ++blocks_run;
    PlainMemory memory;
    HostBlock block(kernel, Kernel::kSharedBytes, index, group, {memory, nullptr, 0, 0});
    while (!block.advance()) continue;
  }

  template <class Kernel>
  HostBlock(const Kernel& kernel, size_t shared_bytes, int64_t index, int64_t group, const HostShare& share)
      : index_(index),
        group_(group),
        share_(share),
        stacks_(Kernel::kThreads),
        threads_(Kernel::kThreads),
        waits_(Kernel::kThreads, Waits::kNothing),
        shared_(shared_bytes / 16 + 1),
        body_([](const void* body, const Block& on) { (*static_cast<const Kernel*>(body))(on); }),
        kernel_(&kernel) {
    static_assert(Kernel::kThreads % kWarp == 0, "a block has whole warps");
    std::memset(shared_.data(), 0xFF, shared_.size() * sizeof(Line));  // NaN: nobody has written it
    for (size_t i = 0; i < threads_.size(); ++i) threads_[i].fibre.start(stacks_[i], &HostBlock::enter, this);
    draw_accesses();
  }
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;

  // Lets warps go on, each as far as it can: all, or of a block of a grid some. Whether the block is finished.
  bool advance() {
    const int warps = static_cast<int>(threads_.size()) / kWarp;
    HostRandom* const random = share_.random;
    const int first = random ? static_cast<int>(random->below(warps)) : 0;
    const bool down = random ? random->below(2) == 0 : round_ % 2 == 1;
    int64_t most = random && random->below(2) == 0 ? 1 + random->below(warps) : warps;
    // One warp goes as far as it can, then the next one: what it writes is there, or is gone, for those behind it.
    for (int i = 0; i < warps && most > 0; ++i) {
      const int warp = (first + (down ? warps - 1 - i : i)) % warps;
      if (!can_go_on(warp)) continue;
      run_warp(warp, random ? static_cast<int>(random->below(3)) : round_);
      --most;
    }
    ++round_;
    size_t barrier = 0, forever = 0;
    for (const Waits waits : waits_) {
      if (waits == Waits::kNothing || waits == Waits::kPause) return false;
      barrier += waits == Waits::kBarrier;
      forever += waits == Waits::kForever;
    }
    if (forever == waits_.size()) return true;
    if (barrier != waits_.size()) in_vain();
    share_.memory.barrier(share_.place);
    release(0, warps * kWarp);
    return false;
  }

  int thread() const override { return current_; }
  int64_t index() const override { return index_; }
  int64_t group() const override { return group_; }
  void sync() const override { wait(Waits::kBarrier); }
  void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand operand) const override {
    HostThread& thread = self();
    thread.sums = sums, thread.a = a, thread.b = b, thread.operand = operand;
    wait(Waits::kProduct);
  }
  uint32_t swap(uint32_t word, int apart) const override {
    self().word = word, self().apart = apart;
    wait(Waits::kSwap);
    return self().word;
  }
  void sync_warp() const override { swap(0, 0); }

  void load(const uint32_t* source, uint32_t (&words)[4]) const override {
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0)
      throw std::runtime_error("fastrnn: a kernel loads four words across the alignment of 16 bytes");
    access();
    for (int i = 0; i < 4; ++i) words[i] = share_.memory.load(place(), source + i);
  }
  void store(uint32_t* target, uint32_t word) const override { access().store(place(), target, word); }
  void fence() const override { access().fence(place()); }
  void arrive(uint32_t* counter) const override { access().arrive(place(), counter); }
  uint32_t look(const uint32_t* counter) const override { return access().look(place(), counter); }
  void report(uint32_t* target, uint32_t word) const override {
    std::memcpy(target, &word, sizeof word);
    ++share_.memory.changes;
  }
  // Others go on. Throws where nothing has changed for so long that nothing will.
  void pause() const override {
    HostThread& thread = self();
    if (std::exchange(thread.changes, share_.memory.changes) != share_.memory.changes) thread.pauses = 0;
    if (++thread.pauses > share_.memory.patience)
      throw std::runtime_error("fastrnn: the threads of a grid wait for something that does not come");
    wait(Waits::kPause);
  }

 private:
  enum class Waits : uint8_t { kNothing, kPause, kBarrier, kProduct, kSwap, kForever };
  struct HostThread {
    Fibre fibre;
    float* sums;
    const uint32_t *a, *b;
    Operand operand;
    uint32_t word;
    int apart;
    int64_t changes = -1, pauses = 0;
  };

  void* shared_memory() const override { return shared_.data(); }
  HostThread& self() const { return threads_[static_cast<size_t>(current_)]; }
  HostPlace place() const { return {share_.place, current_}; }

  // The memory of the grid, before a thread uses it: every now and then others go on first.
  HostMemory& access() const {
    if (--accesses_ <= 0) {
      draw_accesses();
      pause();
    }
    return share_.memory;
  }
  void draw_accesses() const {
    accesses_ = share_.random ? 1 + share_.random->below(share_.longest) : std::numeric_limits<int64_t>::max();
  }

  bool can_go_on(int warp) const {
    for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
      if (waits_[static_cast<size_t>(i)] <= Waits::kPause) return true;
    return false;
  }

  // Until its threads wait for others, or are done.
  void run_warp(int warp, int round) {
    const int first = warp * kWarp;
    for (int i = first; i < first + kWarp; ++i)
      if (waits_[static_cast<size_t>(i)] == Waits::kPause) waits_[static_cast<size_t>(i)] = Waits::kNothing;
    for (;; ++round) {
      for (int i = 0; i < kWarp; ++i) {
        // From the first thread on, the last one on, and odd ones before even ones.
        const int other = i < kWarp / 2 ? 2 * i + 1 : 2 * (i - kWarp / 2);
        current_ = first + (round % 3 == 0 ? kWarp - 1 - i : round % 3 == 1 ? i : other);
        if (waits_[static_cast<size_t>(current_)] != Waits::kNothing) continue;
        scheduler_.switch_to(self().fibre);
        if (error_) std::rethrow_exception(error_);
      }
      if (count(Waits::kProduct, first) == kWarp)
        multiply_warp(first);
      else if (count(Waits::kSwap, first) == kWarp)
        swap_warp(first);
      else
        break;
      release(first, kWarp);
    }
    if (count(Waits::kPause, first) == 0 && count(Waits::kProduct, first) + count(Waits::kSwap, first) != 0) in_vain();
  }

  // Words go to the partners; all threads of the warp mean the same ones.
  void swap_warp(int first) {
    const int apart = threads_[static_cast<size_t>(first)].apart;
    for (int i = first; i < first + kWarp; ++i) {
      if (threads_[static_cast<size_t>(i)].apart != apart) in_vain();
      if ((i & apart) == 0)
        std::swap(threads_[static_cast<size_t>(i)].word, threads_[static_cast<size_t>(i + apart)].word);
    }
  }

  static void enter(void* argument) {
    auto* const block = static_cast<HostBlock*>(argument);
    try {
      block->body_(block->kernel_, *block);
    } catch (...) {
      block->error_ = std::current_exception();
    }
    ++block->share_.memory.changes;
    block->wait(Waits::kForever);
  }
  void wait(Waits what) const {
    waits_[static_cast<size_t>(current_)] = what;
    self().fibre.switch_to(scheduler_);
  }
  int count(Waits what, int first) const {
    int n = 0;
    for (int i = first; i < first + kWarp; ++i) n += waits_[static_cast<size_t>(i)] == what;
    return n;
  }
  void release(int first, int count) {
    for (int i = first; i < first + count; ++i) waits_[static_cast<size_t>(i)] = Waits::kNothing;
  }
  [[noreturn]] static void in_vain() {
    throw std::runtime_error("fastrnn: the threads of a block wait for each other in vain");
  }

  static double number(uint32_t word, int half, Operand operand) {
    const auto bits = static_cast<uint16_t>(half ? word >> 16 : word & 0xFFFF);
    return operand == Operand::kHalf ? widen(Half{bits}) : widen(BFloat16{bits});
  }

  // As PTX has the fragments of mma.m16n8k16 and mma.m16n8k8.
  void multiply_warp(int first) {
    HostThread* const lanes = threads_.data() + first;
    const Operand operand = lanes[0].operand;
    const int K = operand == Operand::kTf32 ? 8 : 16;
    double a[16][16], b[16][8];
    for (int l = 0; l < kWarp; ++l) {
      if (lanes[l].operand != operand) in_vain();
      const int r = l / 4, q = l % 4;
      for (int i = 0; operand == Operand::kTf32 && i < 4; ++i) {
        // The product takes the upper 19 bits.
        a[r + (i % 2 ? 8 : 0)][q + (i >= 2 ? 4 : 0)] = from_bits(lanes[l].a[i] & 0xFFFFE000);
        if (i < 2) b[q + 4 * i][r] = from_bits(lanes[l].b[i] & 0xFFFFE000);
      }
      for (int half = 0; operand != Operand::kTf32 && half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[r + (i % 2 ? 8 : 0)][2 * q + half + (i >= 2 ? 8 : 0)] = number(lanes[l].a[i], half, operand);
        for (int i = 0; i < 2; ++i) b[2 * q + half + 8 * i][r] = number(lanes[l].b[i], half, operand);
      }
    }
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i >= 2 ? 8 : 0), column = 2 * (l % 4) + i % 2;
        double sum = lanes[l].sums[i];
        for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
        lanes[l].sums[i] = static_cast<float>(sum);
      }
  }

  struct alignas(16) Line {
    char bytes[16];
  };

  const int64_t index_, group_;
  const HostShare share_;
  HostStacks stacks_;
  mutable std::vector<HostThread> threads_;
  mutable std::vector<Waits> waits_;  // of each thread
  mutable std::vector<Line> shared_;
  mutable Fibre scheduler_;
  mutable int64_t accesses_ = 0;  // until another thread goes on
  int current_ = 0, round_ = 0;
  void (*const body_)(const void*, const Block&);
  const void* const kernel_;
  std::exception_ptr error_;
};

}  // namespace fastrnn::cuda
