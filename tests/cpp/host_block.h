// The threads of a block (csrc/cuda/block.h) on the host: as fibres, of which one runs until it waits. Warps run one
// after the other to the next barrier, in an order that changes there, the threads of a warp from product to product.
// Throws where the threads of a block do not all come to a barrier, or those of a warp to a product, and what a thread
// throws.
#pragma once

#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/block.h"
#include "fibre.h"

namespace fastrnn::cuda {

inline std::atomic<int64_t> blocks_run{0};

class HostBlock : public Block {
 public:
  template <class Kernel>
  static void run(const Kernel& kernel, int64_t index, int64_t group) {
    ++blocks_run;
    HostBlock block(Kernel::kThreads, Kernel::kSharedBytes, index, group);
    block.body_ = [](const void* body, const Block& on) { (*static_cast<const Kernel*>(body))(on); };
    block.kernel_ = &kernel;
    block.run_threads();
  }

  int thread() const override { return current_; }
  int64_t index() const override { return index_; }
  int64_t group() const override { return group_; }
  void sync() const override { wait(Waits::kBarrier); }
  void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half) const override {
    HostThread& thread = threads_[static_cast<size_t>(current_)];
    thread.sums = sums, thread.a = a, thread.b = b, thread.is_half = is_half;
    wait(Waits::kProduct);
  }

 private:
  enum class Waits { kNothing, kBarrier, kProduct, kForever };
  struct HostThread {
    Fibre fibre;
    Waits waits = Waits::kNothing;
    float* sums;
    const uint32_t *a, *b;
    bool is_half;
  };

  HostBlock(int threads, size_t shared_bytes, int64_t index, int64_t group)
      : index_(index), group_(group), threads_(static_cast<size_t>(threads)), shared_(shared_bytes / 16 + 1) {
    std::memset(shared_.data(), 0xFF, shared_.size() * sizeof(Line));  // NaN: nobody has written it
  }
  void* shared_memory() const override { return shared_.data(); }

  void run_threads() {
    static thread_local std::vector<std::unique_ptr<Stack>> stacks;
    while (stacks.size() < threads_.size()) stacks.push_back(std::make_unique<Stack>());
    for (size_t i = 0; i < threads_.size(); ++i) threads_[i].fibre.start(*stacks[i], &HostBlock::enter, this);
    const int warps = static_cast<int>(threads_.size()) / kWarp;
    for (int round = 0;; ++round) {
      // One warp goes as far as it can, then the next one: what it writes is there, or is gone, for those behind it.
      for (int i = 0; i < warps; ++i) run_warp(round % 2 == 0 ? i : warps - 1 - i, round);
      if (all(Waits::kForever, 0, warps * kWarp)) return;
      if (!all(Waits::kBarrier, 0, warps * kWarp))
        throw std::runtime_error("fastrnn: the threads of a block wait for each other in vain");
      release(0, warps * kWarp);
    }
  }

  // Until its threads wait for others, or are done.
  void run_warp(int warp, int round) {
    for (;; ++round) {
      for (int i = 0; i < kWarp; ++i) {
        // From the first thread on, the last one on, and odd ones before even ones.
        const int other = i < kWarp / 2 ? 2 * i + 1 : 2 * (i - kWarp / 2);
        current_ = warp * kWarp + (round % 3 == 0 ? kWarp - 1 - i : round % 3 == 1 ? i : other);
        HostThread& thread = threads_[static_cast<size_t>(current_)];
        if (thread.waits != Waits::kNothing) continue;
        scheduler_.switch_to(thread.fibre);
        if (error_) std::rethrow_exception(error_);
      }
      if (!all(Waits::kProduct, warp * kWarp, kWarp)) return;
      multiply_warp(warp);
      release(warp * kWarp, kWarp);
    }
  }

  static void enter(void* argument) {
    auto* const block = static_cast<HostBlock*>(argument);
    try {
      block->body_(block->kernel_, *block);
    } catch (...) {
      block->error_ = std::current_exception();
    }
    block->wait(Waits::kForever);
  }
  void wait(Waits what) const {
    HostThread& thread = threads_[static_cast<size_t>(current_)];
    thread.waits = what;
    thread.fibre.switch_to(scheduler_);
  }
  bool all(Waits what, int first, int count) const {
    for (int i = first; i < first + count; ++i)
      if (threads_[static_cast<size_t>(i)].waits != what) return false;
    return true;
  }
  void release(int first, int count) {
    for (int i = first; i < first + count; ++i) threads_[static_cast<size_t>(i)].waits = Waits::kNothing;
  }

  static double number(uint32_t word, int half, bool is_half) {
    const auto bits = static_cast<uint16_t>(half ? word >> 16 : word & 0xFFFF);
    return is_half ? widen(Half{bits}) : widen(BFloat16{bits});
  }

  // As PTX has the fragments of mma.m16n8k16.
  void multiply_warp(int warp) {
    HostThread* const lanes = threads_.data() + warp * kWarp;
    double a[16][16], b[16][8];
    for (int l = 0; l < kWarp; ++l) {
      const int r = l / 4, q = l % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[r + (i % 2 ? 8 : 0)][2 * q + half + (i >= 2 ? 8 : 0)] = number(lanes[l].a[i], half, lanes[l].is_half);
        for (int i = 0; i < 2; ++i) b[2 * q + half + 8 * i][r] = number(lanes[l].b[i], half, lanes[l].is_half);
      }
    }
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i >= 2 ? 8 : 0), column = 2 * (l % 4) + i % 2;
        double sum = lanes[l].sums[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[l].sums[i] = static_cast<float>(sum);
      }
  }

  struct alignas(16) Line {
    char bytes[16];
  };

  const int64_t index_, group_;
  mutable std::vector<HostThread> threads_;
  mutable std::vector<Line> shared_;
  mutable Fibre scheduler_;
  int current_ = 0;
  void (*body_)(const void*, const Block&) = nullptr;
  const void* kernel_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace fastrnn::cuda
