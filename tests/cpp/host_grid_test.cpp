// Tests of the grid on the host (host_grid.h): schedules, what the threads of a warp do together, errors; and those of
// its memory. Prints a line for each, fails if one does; built and run by tests/test_host_grid.py. No torch.
#include "litmus.h"

using namespace fastrnn::cuda;

namespace {

// What threads and blocks did, one after the other.
std::string history() {
  std::string text;
  Words<1> memory;
  run(4, [&](const Block& block) {
    for (int i = 0; i < 3; ++i) {
      block.store(memory.line(0), static_cast<uint32_t>(block.index() * 100 + block.thread()));
      text += std::to_string(block.index()) + "/" + std::to_string(load_word(block, memory.line(0))) + " ";
      block.pause();
    }
  });
  return text;
}

void test_schedule() {
  use_seed(5);
  const std::string first = history(), second = history();
  use_seed(5);
  expect("schedule: a seed gives it again", first == history() && second == history());
  expect("schedule: launches differ", first != second);
  use_seed(6);
  expect("schedule: seeds differ", first != history() && second != history());
  const int64_t before = grids_run;
  sometimes("schedule: a block is done before another begins", [] {
    std::array<int, 3> begun{};
    bool ahead = false;
    run(3, [&](const Block& block) {
      for (int i = 0; i < 4; ++i, block.pause()) begun[static_cast<size_t>(block.index())] = 1;
      ahead |= begun[0] + begun[1] + begun[2] == 1;
    });
    return ahead;
  });
  expect("schedule: launches are counted", grids_run == before + kSeeds);
  std::array<int, 6> places{};
  const auto count_place = [&](const Block& block) {
    ++places[static_cast<size_t>(block.group() * 3 + block.index())];
  };
  HostGrid::run(Body<32, decltype(count_place)>{count_place}, 3, 2);
  expect("schedule: blocks of all groups", places == std::array<int, 6>{32, 32, 32, 32, 32, 32});
  // Stacks of a large grid at once, and a loop that does not pause.
  Words<1> memory;
  run<256>(24, [&](const Block& block) {
    if (block.thread() == 255) block.arrive(memory.line(0));
    while (block.look(memory.line(0)) < 24) continue;
  });
  expect("schedule: a large grid", memory.words[0] == 24);
}

void test_warp() {
  never("swap: pairs", [] {
    bool wrong = false;
    run<64>(2, [&](const Block& block) {
      for (uint32_t i = 0; i < 3; ++i) {
        const auto thread = static_cast<uint32_t>(block.thread());
        wrong |= block.swap(10 * thread + i) != 10 * (thread ^ 1) + i;
      }
    });
    return wrong;
  });
  expect("shared memory: nobody has written it", [] {
    bool all = true;
    run(2, [&](const Block& block) { all &= block.shared<uint32_t>()[block.thread()] == 0xFFFFFFFF; });
    return all;
  }());
}

template <class T>
uint32_t half_word(float value) {
  T number;
  narrow(value, number);
  if constexpr (sizeof(T) == 2) return number.bits;
  return 0;
}

// Fragments as block.h has them, against the sum. Numbers are small integers: all sums are exact.
template <class T>
void test_product(const std::string& name) {
  constexpr int K = sizeof(T) == 4 ? 8 : 16;
  HostRandom random(3);
  float a[16][16], b[16][8], c[16][8], got[16][8];
  const auto draw = [&] { return static_cast<float>(random.below(33) - 16); };
  for (auto& row : a)
    for (float& v : row) v = draw();
  for (auto& row : b)
    for (float& v : row) v = draw();
  for (auto& row : c)
    for (float& v : row) v = draw();
  run(1, [&](const Block& block) {
    const int r = block.thread() / 4, q = block.thread() % 4;
    uint32_t a_words[4], b_words[2];
    // TF32 takes no notice of the lower 13 bits.
    const auto one = [&](float v) { return bits_of(v) | static_cast<uint32_t>(random.below(1 << 13)); };
    const auto two = [&](float low, float high) { return half_word<T>(low) | half_word<T>(high) << 16; };
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2 == 0 ? r : r + 8, k = i < 2 ? 0 : K / 2;
      a_words[i] = K == 8 ? one(a[row][q + k]) : two(a[row][2 * q + k], a[row][2 * q + k + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const int k = i * K / 2;
      b_words[i] = K == 8 ? one(b[q + k][r]) : two(b[2 * q + k][r], b[2 * q + k + 1][r]);
    }
    float sums[4] = {c[r][2 * q], c[r][2 * q + 1], c[r + 8][2 * q], c[r + 8][2 * q + 1]};
    multiply<T>(block, sums, a_words, b_words);
    got[r][2 * q] = sums[0], got[r][2 * q + 1] = sums[1], got[r + 8][2 * q] = sums[2], got[r + 8][2 * q + 1] = sums[3];
  });
  bool same = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = c[i][j];
      for (int k = 0; k < K; ++k) sum += a[i][k] * b[k][j];
      same &= got[i][j] == sum;
    }
  expect("product: " + name, same);
}

void test_errors() {
  const std::string in_vain = "wait for each other in vain", never_comes = "wait for something that does not come";
  const auto half_barrier = [](const Block& block) {
    if (block.thread() < 40) block.sync();
  };
  throws("error: a barrier that not all reach", in_vain, [&] { run<64>(2, half_barrier); });
  throws("error: the same of a block on its own", in_vain,
         [&] { HostBlock::run(Body<64, decltype(half_barrier)>{half_barrier}, 0, 0); });
  throws("error: a swap that not all reach", in_vain, [] {
    run<64>(2, [](const Block& block) {
      if (block.thread() != 33) block.swap(0);
      block.sync();
    });
  });
  throws("error: a swap for some, a product for others", in_vain, [] {
    run(1, [](const Block& block) {
      float sums[4] = {};
      if (block.thread() < 16)
        block.swap(0);
      else
        multiply<Half>(block, sums, {0, 0, 0, 0}, {0, 0});
    });
  });
  throws("error: what a thread throws", "of a thread", [] {
    run(3, [](const Block& block) {
      if (block.index() == 1 && block.thread() == 31) throw std::runtime_error("of a thread");
      block.sync();
    });
  });
  throws("error: a load across the alignment", "alignment", [] {
    Words<2> memory;
    run(1, [&](const Block& block) { load_word(block, memory.line(0) + 1); });
  });
  throws("error: words that something else writes", "something else writes", [] {
    Words<1> memory;
    run(1, [&](const Block& block) {
      load_word(block, memory.line(0));
      if (block.thread() == 0) memory.words[0] = 1;
    });
  });
  host_schedule.patience = 500;
  throws("error: what never comes", never_comes, [] {
    Words<1> memory;
    run(2, [&](const Block& block) {
      if (block.thread() == 0) wait_for_count(block, memory.line(0), 1);
      block.sync();
    });
  });
  throws("error: what never comes, without a pause", never_comes, [] {
    Words<1> memory;
    run(2, [&](const Block& block) {
      while (block.look(memory.line(0)) == 0) continue;
    });
  });
  host_schedule.patience = HostSchedule().patience;
  // A kernel's own patience is shorter; what one block tells, another then hears.
  Words<1> memory;
  uint32_t told = 0;
  run(2, [&](const Block& block) {
    int pauses = 0;
    if (block.thread() == 0)
      while (pauses < 100'000 && block.look(memory.line(0)) == 0) ++pauses, block.pause();
    if (pauses == 100'000) block.report(&told, 3);
  });
  expect("error: a kernel gives up first", told == 3);
  // Waits and memory of a block on its own.
  const auto alone = [&](const Block& block) {
    if (block.thread() == 0) wait_for_count(block, memory.line(0), 1);
    if (block.thread() == 63) block.arrive(memory.line(0)), block.fence();
    block.sync();
    if (block.thread() == 1) block.store(memory.line(0) + 1, load_word(block, memory.line(0)) + 1);
  };
  HostBlock::run(Body<64, decltype(alone)>{alone}, 0, 0);
  expect("block on its own: waits, and memory as it is", memory.words[0] == 1 && memory.words[1] == 2);
}

}  // namespace

int main() {
  try {
    test_memory();
    test_schedule();
    test_warp();
    test_product<BFloat16>("bfloat16");
    test_product<Half>("float16");
    test_product<float>("TF32");
    test_errors();
  } catch (const std::exception& error) {
    expect("all tests run", false, error.what());
  }
  return failures != 0;
}
