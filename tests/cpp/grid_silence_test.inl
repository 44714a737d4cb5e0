// Of grid_protocol_test.cpp: what happens where a block publishes nothing, and who waits for what.
namespace {

// Whether numbers are those of `right`, bit for bit; and whether they are NaN.
template <class T>
bool same(const T& got, const T& right) {
  return std::memcmp(&got, &right, sizeof got) == 0;
}
template <class T>
bool is_nan(const T& number) {
  return widen(number) != widen(number);
}

// One block publishes nothing from step `silent` on: it is given up in the next one, what was before is right, and what
// comes after NaN.
template <class Cell, class Exchange>
void test_forward_silence(const std::string& name) {
  GridShape s;
  s.T = 12;
  constexpr int64_t kSilent = 4;
  GridProblem<Cell> right(s), problem(s);
  host_schedule.weak = false;
  const GridRun right_run = right.template forward<WordExchange>();
  host_schedule.weak = true;
  for (int64_t seed = 0; seed < seeds; ++seed) {
    use_seed(static_cast<uint64_t>(seed));
    Watch watch;
    watch.silent_block = seed % 3;
    watch.is_silent = [](int64_t, int64_t, int64_t step) { return step >= kSilent; };
    const GridRun run = problem.template forward<Watched<Exchange>>([&](const auto& kernel, int64_t blocks, int64_t n) {
      HostGrid::run(OnWatchedBlock<std::decay_t<decltype(kernel)>>{kernel, watch}, blocks, n);
    });
    int64_t wrong = 0;
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t j = 0; j < s.H; ++j) {
          const size_t i = problem.at_output(0, t, b, j);
          wrong += t <= kSilent ? !same(problem.output[i], right.output[i]) : !is_nan(problem.output[i]);
        }
    for (const BFloat16 v : problem.h_n) wrong += !is_nan(v);
    expect(
        name + ", seed " + std::to_string(seed),
        right_run.error.empty() && run.error.empty() && run.failed > 0 && run.report == (kSilent + 2) * 2 && wrong == 0,
        run.error + " failed " + std::to_string(run.failed) + " report " + std::to_string(run.report) + " wrong " +
            std::to_string(wrong));
  }
}

template <class Cell, class Exchange>
void test_backward_silence(const std::string& name, int64_t silent) {
  GridShape s;
  s.T = 12;
  GridProblem<Cell> right(s), problem(s);
  host_schedule.weak = false;
  right.template forward<WordExchange>(), right.template backward<WordExchange>();
  problem.template forward<WordExchange>();
  host_schedule.weak = true;
  for (int64_t seed = 0; seed < seeds; ++seed) {
    use_seed(static_cast<uint64_t>(seed));
    Watch watch;
    watch.silent_block = seed % 3;
    watch.is_silent = [=](int64_t, int64_t, int64_t step) { return step <= silent; };
    const GridRun run =
        problem.template backward<Watched<Exchange>>([&](const auto& kernel, int64_t blocks, int64_t n) {
          HostGrid::run(OnWatchedBlock<std::decay_t<decltype(kernel)>>{kernel, watch}, blocks, n);
        });
    int64_t wrong = 0;
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t k = 0; k < Cell::kGates; ++k)
          for (int64_t j = 0; j < s.H; ++j) {
            const size_t i = problem.at_row(0, t, b, Cell::kGates, k, j);
            wrong += t >= silent ? !same(problem.dgates[i], right.dgates[i]) : !is_nan(problem.dgates[i]);
          }
    for (const BFloat16 v : problem.dh0) wrong += !is_nan(v);
    expect(name + ", seed " + std::to_string(seed),
           run.error.empty() && run.failed > 0 && run.report == static_cast<uint32_t>(silent * 2 + 1) && wrong == 0,
           run.error + " failed " + std::to_string(run.failed) + " report " + std::to_string(run.report) + " wrong " +
               std::to_string(wrong));
  }
}

// With packed rows a tile is waited for while it has rows, and no longer: what is published last, nobody needs.
template <class Exchange>
void test_ends(const std::string& name) {
  GridShape s = packed_both();
  s.multiprocessors = 18, s.chunk = 1000;  // a tile in each row group
  GridProblem<Tanh> problem(s);
  problem.wants_initial = false;
  host_schedule.weak = false;
  const GridRun forward = problem.template forward<WordExchange>(),
                backward = problem.template backward<WordExchange>();
  const auto live = [&](int64_t d, int64_t tile, int64_t step) {
    return step >= 0 && step < s.T && problem.count(problem.time(d, step)) > tile * kBlockRows;
  };
  std::set<std::tuple<int64_t, int64_t, int64_t>> waits, waits_back;
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t tile = 0; tile < problem.plan.tiles; ++tile)
      for (int64_t step = 0; step < s.T; ++step) {
        if (live(d, tile, step)) waits.insert({d, tile, step});
        if (live(d, tile, step + 1)) waits_back.insert({d, tile, step});
      }
  host_schedule.weak = true;
  for (int64_t seed = 0; seed < seeds; ++seed) {
    use_seed(static_cast<uint64_t>(seed));
    Watch watch, watch_back;
    const auto on = [](Watch& by) {
      return [&](const auto& kernel, int64_t blocks, int64_t n) {
        HostGrid::run(OnWatchedBlock<std::decay_t<decltype(kernel)>>{kernel, by}, blocks, n);
      };
    };
    watch.silent_block = seed % (3 * problem.plan.row_groups), watch_back.silent_block = watch.silent_block;
    watch.is_silent = [&](int64_t d, int64_t tile, int64_t step) { return !live(d, tile, step + 1); };
    watch_back.is_silent = [](int64_t, int64_t, int64_t step) { return step == 0; };
    const GridRun run = problem.template forward<Watched<Exchange>>(on(watch));
    const GridRun run_back = problem.template backward<Watched<Exchange>>(on(watch_back));
    expect(name + ", seed " + std::to_string(seed), run.is(forward) && watch.waits == waits,
           run.error + " failed " + std::to_string(run.failed) + " waits " + std::to_string(watch.waits.size()));
    expect(name + ", backward, seed " + std::to_string(seed), run_back.is(backward) && watch_back.waits == waits_back,
           run_back.error + " failed " + std::to_string(run_back.failed) + " waits " +
               std::to_string(watch_back.waits.size()));
  }
}

// A NaN in memory may look like a word that is not there; published, it does not.
template <class Exchange, class Kind>
GridRun run_with_nan(int64_t& wrong) {
  GridShape s;
  s.T = 6, s.B = 5;
  GridProblem<Tanh, Kind> right(s), problem(s);
  std::memset(static_cast<void*>(&problem.h0[problem.at_state(0, 2, 0)]), 0xFF,
              static_cast<size_t>(s.H) * sizeof problem.h0[0]);
  host_schedule.weak = false;
  use_seed(1);
  right.template forward<WordExchange>();
  const GridRun run = problem.template forward<Exchange>();
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t j = 0; j < s.H; ++j) {
        const size_t i = problem.at_output(0, t, b, j);
        wrong += b == 2 ? !is_nan(problem.output[i]) : !same(problem.output[i], right.output[i]);
      }
  return run;
}
template <class T>
void test_nan(const std::string& name) {
  int64_t wrong = 0;
  GridRun run = run_with_nan<WordExchange, T>(wrong);
  expect(name, run.is(run) && wrong == 0, run.error + " wrong " + std::to_string(wrong));
  word_rules.reserves = false;
  run = run_with_nan<WordVariant, T>(wrong);
  word_rules = {};
  expect(name + ", as it is", run.failed > 0, "failed " + std::to_string(run.failed));
}

void test_silence() {
  test_forward_silence<Tanh, WordExchange>("silence: tanh, words");
  test_forward_silence<Tanh, FlagExchange>("silence: tanh, flags");
  test_forward_silence<LstmCell, WordExchange>("silence: lstm, words");
  test_backward_silence<Tanh, WordExchange>("silence: tanh backward, words", 7);
  test_backward_silence<Tanh, FlagExchange>("silence: tanh backward, flags", 7);
  test_backward_silence<GruCell, WordExchange>("silence: gru backward, the initial states, words", 0);
  test_ends<WordExchange>("ends: words");
  test_ends<FlagExchange>("ends: flags");
  test_nan<BFloat16>("NaN: bfloat16");
  test_nan<float>("NaN: TF32");
}

}  // namespace
