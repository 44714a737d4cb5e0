// Tests of the kernels of a grid (csrc/cuda/grid_kernels.h) under schedules and memory that mean ill (host_grid.h): the
// results are those in float64, bit for bit the same for every seed and either exchange; exchanges that are broken are
// caught; what falls silent is given up. Prints a line for each, fails if one does; built, with FASTRNN_MOST_SPINS of a
// few thousand, and run by tests/test_grid_protocol.py. No torch.
//   grid_protocol_test [seeds]
#include "broken_exchanges.h"
#include "grid_problem.h"

using namespace fastrnn;
using namespace fastrnn::cuda;

namespace {

using Tanh = RnnCell<false>;
int64_t seeds = 2;
template <class Kind>
constexpr double kTolerance = std::is_same_v<Kind, Exact> ? 1e-5 : 1.0 / 64;  // rounded otherwise, to 8 bits at least

GridShape packed_both() {
  GridShape s;
  s.T = 24, s.packed = true, s.D = 2, s.direction = Direction::kBoth, s.chunk = 10;
  return s;
}

// The results of a problem with memory as it is, which are held against float64, and those of many seeds against them.
template <class Cell, class Kind = BFloat16>
void test_kernels(const std::string& name, GridShape s, bool wants_initial = true, int64_t most = seeds) {
  host_schedule.weak = false;
  use_seed(1);
  GridProblem<Cell, Kind> problem(s);
  problem.wants_initial = wants_initial;
  const GridRun forward = problem.template forward<WordExchange>();
  const double forward_error = problem.forward_error();
  const GridRun backward = problem.template backward<WordExchange>();
  const double backward_error = problem.backward_error();
  expect(
      name + ": as in float64",
      forward.is(forward) && backward.is(backward) && forward_error < kTolerance<Kind> &&
          backward_error < kTolerance<Kind>,
      std::to_string(forward_error) + ", backward " + std::to_string(backward_error) + forward.error + backward.error);
  host_schedule.weak = true;
  int64_t different = 0, runs = 0;
  for (int64_t seed = 0; seed < most; ++seed) {
    use_seed(static_cast<uint64_t>(seed));
    problem.s.window = 2 << (seed + static_cast<int64_t>(name.size())) % 3;
    different += !problem.template forward<WordExchange>().is(forward);
    different += !problem.template backward<WordExchange>().is(backward);
    different += !problem.template forward<FlagExchange>().is(forward);
    different += !problem.template backward<FlagExchange>().is(backward);
    runs += 4;
  }
  expect(name + ": the same for all seeds", different == 0,
         std::to_string(different) + " of " + std::to_string(runs) + " differ");
}

template <class Cell>
void test_cell(const std::string& name) {
  GridShape s;
  s.T = 24;
  test_kernels<Cell>(name, s);
  test_kernels<Cell>(name + ", packed, both directions one after the other", packed_both());
  s = packed_both();
  s.multiprocessors = 12, s.H = 37, s.chunk = 1000;
  test_kernels<Cell>(name + ", packed, both directions, two row groups, H=37", s, false);
}

void test_all_kernels() {
  test_cell<Tanh>("tanh");
  test_cell<LstmCell>("lstm");
  test_cell<GruCell>("gru");
  GridShape s;
  s.T = 12, s.H = 21, s.multiprocessors = 2, s.B = 9;
  test_kernels<Tanh, float>("tanh, TF32", s);
  test_kernels<Tanh, Half>("tanh, float16", s);
  test_kernels<Tanh, Exact>("tanh, float", s);
  s.T = 1;
  test_kernels<GruCell>("gru, one step", s);
  s.T = 2, s.H = 1045, s.multiprocessors = 100, s.B = 3;
  test_kernels<Tanh>("tanh, weights in shared memory", s, true, (seeds + 1) / 2);
  s.T = 1, s.multiprocessors = 2;
  s.H = 1, s.B = 1;
  test_kernels<LstmCell>("lstm, one unit", s);
}

// As OnGrid, with blocks whose clears come late.
struct LateClears {
  template <class Kernel>
  void operator()(const Kernel& kernel, int64_t blocks, int64_t groups) const {
    std::map<int64_t, BlockWithLateClears::Latest> latest;
    HostGrid::run(OnLateClears<Kernel>{kernel, latest}, blocks, groups);
  }
};

// Of how many seeds a forward pass is not as it should be: none where the exchange is right, for each window; otherwise
// some. Slots of -1: as many as the window.
template <class Exchange, class Launch = OnGrid>
void test_exchange(const std::string& name, bool is_right, GridShape s = {}, std::vector<int> windows = {2, 4, 8}) {
  s.B = 8;
  host_schedule.weak = false;
  const GridRun right = GridProblem<Tanh>(GridShape{s.T, s.B}).template forward<WordExchange>();
  host_schedule.weak = true;
  const int64_t most = is_right ? seeds : 2 * seeds;
  bool as_expected = true;
  std::string text;
  for (const int window : windows) {
    GridShape shape = s;
    shape.window = window, shape.slots = s.slots < 0 ? window : s.slots;
    GridProblem<Tanh> problem(shape);
    int64_t different = 0, gave_up = 0, threw = 0;
    for (int64_t seed = 0; seed < most; ++seed) {
      use_seed(static_cast<uint64_t>(seed));
      const GridRun run = problem.template forward<Exchange>(Launch());
      if (!run.error.empty())
        ++threw;
      else if (run.failed != 0)
        ++gave_up;
      else
        different += run.bytes != right.bytes;
    }
    text += "window " + std::to_string(window) + ": " + std::to_string(different) + " differ, " +
            std::to_string(gave_up) + " give up, " + std::to_string(threw) + " throw; ";
    as_expected &= (different + gave_up + threw == 0) == is_right;
  }
  expect(name, as_expected, text + "of " + std::to_string(most));
}

void test_flags() {
  const auto test = [](auto* exchange, const std::string& what, bool is_right, const GridShape& s = {}) {
    test_exchange<std::remove_pointer_t<decltype(exchange)>>("flags: " + what, is_right, s, {2});
  };
  GridShape each, one_slot;
  each.flag_of_member = true, one_slot.slots = 1;
  test((StoredFlag<true>*)nullptr, "a fence and a store", true, each);
  test((StoredFlag<false>*)nullptr, "a store without a fence", false, each);
  test((FlagWithoutBarrier*)nullptr, "no barrier before the count", false);
  test((FlagBeforeWords*)nullptr, "the count before the words", false);
  test((FlagLookedAtOnce*)nullptr, "looks once", false);
  test((FlagOfFewer*)nullptr, "waits for all but one", false);
  test((FlagSeenByOne*)nullptr, "one thread of a warp waits", false);
  test((FlagExchange*)nullptr, "one slot", false, one_slot);
}

void test_words() {
  const auto test = [](const std::string& what, auto change, GridShape s = {}, std::vector<int> windows = {2, 8}) {
    word_rules = {};
    change(word_rules);
    test_exchange<WordVariant>("words: " + what, false, s, windows);
    word_rules = {};
  };
  test_exchange<WordVariant>("words: all rules", true);
  test("never cleared", [](WordRules& r) { r.clears = false; });
  test("one publication too many cleared", [](WordRules& r) { r.too_many = 1; });
  test("no fence of the readers", [](WordRules& r) { r.reader_fence = false; });
  test("the fence of the readers too early", [](WordRules& r) { r.fence_at = 0; });
  test("looks at one of four", [](WordRules& r) { r.looked_at = 1; });
  test("looks once", [](WordRules& r) { r.waits = false; });
  GridShape longer, half, zeros;
  longer.T = 320, half.slots = -1, zeros.prepared = false;
  test("as many slots as a window", [](WordRules&) {}, half);
  test("a mailbox that is not prepared", [](WordRules&) {}, zeros);
  // The window is what the memory has to be late by.
  test("no fence after the clearing", [](WordRules& r) { r.fence = false; }, longer, {2});
  word_rules.fence = false;
  test_exchange<WordVariant, LateClears>("words: no fence after the clearing, which is late", false);
  word_rules = {};
  test_exchange<WordVariant, LateClears>("words: the clearing is late", true);
}

}  // namespace

#include "grid_silence_test.inl"

int main(int count, char** arguments) {
  if (count > 1) seeds = std::stoll(arguments[1]);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a line before a crash is seen
  try {
    test_all_kernels();
    test_flags();
    test_words();
    test_silence();
  } catch (const std::exception& error) {
    expect("all tests run", false, error.what());
  }
  return failures != 0;
}
