// What the litmus tests of host_grid_test.cpp and host_memory_test.cpp are written with: kernels from lambdas, launches
// over many seeds, and a line for each test.
#pragma once

#include <array>
#include <cstdio>
#include <string>

#include "host_grid.h"

namespace fastrnn::cuda {

constexpr int kSeeds = 300;
inline int failures = 0;

inline void expect(const std::string& name, bool holds, const std::string& detail = "") {
  failures += !holds;
  std::printf("%s %s%s\n", holds ? "ok    " : "FAILED", name.c_str(), detail.empty() ? "" : (": " + detail).c_str());
}

template <int kCount, class F>
struct Body {
  static constexpr int kThreads = kCount;
  static constexpr size_t kSharedBytes = 4096;
  F body;
  size_t shared_bytes() const { return kSharedBytes; }
  void operator()(const Block& block) const { body(block); }
};
template <int kThreads = kWarp, class F>
void run(int64_t blocks, F body) {
  HostGrid::run(Body<kThreads, F>{body}, blocks, 1);
}

inline void use_seed(uint64_t seed) { host_schedule.seed = seed, host_schedule.launch = 0; }

// Of so many launches, after how many `trial` was true.
template <class F>
int count(F trial) {
  int n = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    use_seed(static_cast<uint64_t>(seed));
    n += trial();
  }
  return n;
}
template <class F>
void never(const std::string& name, F trial) {
  const int n = count(trial);
  expect(name, n == 0, "broken by " + std::to_string(n) + " of " + std::to_string(kSeeds) + " seeds");
}
template <class F>
void sometimes(const std::string& name, F trial) {
  const int n = count(trial);
  expect(name, n > 0, "broken by " + std::to_string(n) + " of " + std::to_string(kSeeds) + " seeds");
}
template <class F>
void throws(const std::string& name, const std::string& text, F body) {
  std::string got = "nothing thrown";
  try {
    body();
  } catch (const std::exception& error) {
    got = error.what();
  }
  expect(name, got.find(text) != std::string::npos, got);
}

// Words in lines of four, all 0.
template <size_t kLines>
struct Words {
  alignas(16) std::array<uint32_t, 4 * kLines> words{};
  uint32_t* line(int64_t i) { return words.data() + 4 * i; }
};
inline uint32_t load_word(const Block& block, const uint32_t* source) {
  uint32_t words[4];
  block.load(source, words);
  return words[0];
}
inline void wait_for(const Block& block, const uint32_t* flag) {
  while (load_word(block, flag) == 0) block.pause();
}
inline void wait_for_count(const Block& block, const uint32_t* counter, uint32_t count) {
  while (block.look(counter) < count) block.pause();
}

void test_memory();  // host_memory_test.cpp

}  // namespace fastrnn::cuda
