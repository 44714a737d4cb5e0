// Memory for the length of a pass, aligned to a cache line: what a thread needs again and again it keeps.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "tensors.h"

namespace fastrnn {

// One piece of memory that grows as it is asked for more; what was in it is lost then.
class Scratch {
 public:
  char* get(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset();
      const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
      const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(alignment, rounded)));
      if (!memory_) throw std::bad_alloc();
      if (bytes >= kHugePage) advise_huge_pages(memory_.get(), rounded);
      size_ = bytes;
    }
    if (poison() && bytes > 0) std::memset(memory_.get(), 0xFF, bytes);
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// Scratch memory of one pass, or of a thread's part of it: up to kMostKept bytes it is the thread's own, which stays
// for the next pass. A pass may have several, each with a slot of its own: 0 for packed weights and 5 for the gradients
// of gates may be large, the others are small.
template <int kSlot = 0>
class PassScratch {
 public:
  char* get(size_t bytes) {
    static thread_local Scratch kept;
    return bytes <= kMostKept ? kept.get(bytes) : own_.get(bytes);
  }

 private:
  static constexpr size_t kMostKept = size_t{1} << (kSlot == 0 || kSlot == 5 ? 26 : 24);
  Scratch own_;
};

}  // namespace fastrnn
