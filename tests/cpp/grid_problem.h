// Small problems for the kernels of a grid (csrc/cuda/grid_kernels.h): arrays and arguments as the passes fill them
// (scan_forward.cpp, scan_backward.cpp, grid_setup.h), and the same recurrences in float64, row by row.
#pragma once

#include <sys/mman.h>

#include <cmath>

#include "cuda/grid_kernels.inl"
#include "litmus.h"

namespace fastrnn::cuda {

template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue) {
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t item = 0; item < items; ++item) kernel({item, group});
}
// Not built: tests run the kernels that they choose.
template <class Kernel>
void launch_together(const Kernel&, int64_t, int64_t, Queue) {
  throw std::logic_error("tests run kernels of a grid themselves");
}

namespace {

struct GridShape {
  int64_t T = 40, B = 20, H = 40, D = 1;
  Direction direction = Direction::kForward;
  bool packed = false;          // rows end one after the other
  int64_t multiprocessors = 3;  // which say how many row groups and groups run at a time
  int window = 2, slots = 0;    // 0: as many as the exchange needs
  int64_t chunk = 1000;         // steps of a forward launch
  bool prepared = true;         // otherwise the mailbox is all zeros
  bool flag_of_member = false;  // a flag for each block, not one for all
};

// What a pass left, and how it ended.
struct GridRun {
  std::vector<uint8_t> bytes;  // of all results
  uint32_t failed = 0, report = 0;
  std::string error;
  bool is(const GridRun& other) const {
    return error.empty() && other.error.empty() && failed == 0 && report == 0 && bytes == other.bytes;
  }
};

// Offsets of steps, before which there is no memory: who reads there is stopped.
class GuardedOffsets {
 public:
  GuardedOffsets() {
    if (memory_ == MAP_FAILED || mprotect(memory_, kPage, PROT_NONE) != 0) throw std::runtime_error("no guarded page");
  }
  ~GuardedOffsets() { munmap(memory_, 2 * kPage); }
  GuardedOffsets(const GuardedOffsets&) = delete;
  GuardedOffsets& operator=(const GuardedOffsets&) = delete;
  int64_t* data() const { return reinterpret_cast<int64_t*>(static_cast<char*>(memory_) + kPage); }

 private:
  static constexpr size_t kPage = 1 << 16;
  void* const memory_ = mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
};

struct OnGrid {
  template <class Kernel>
  void operator()(const Kernel& kernel, int64_t blocks, int64_t groups) const {
    HostGrid::run(kernel, blocks, groups);
  }
};

template <class Cell, class Kind = BFloat16>
class GridProblem {
 public:
  using T = StorageOf<Kind>;
  static constexpr bool kExact = std::is_same_v<Kind, Exact>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
  using Numbers = std::vector<T>;
  using Floats = std::vector<float>;

  GridShape s;
  GridPlan plan{};
  int64_t N = 0;
  Numbers weight, h0, output, h_n, c0, c_n, saved;                    // forward
  Numbers doutput, dh_n, dc_n, dgates, drecurrent, before, dh0, dc0;  // backward
  Floats x, bias, cells;                                              // x: [D, N, G, H]
  bool wants_initial = true;                                          // gradients of the initial states

  explicit GridProblem(const GridShape& shape, uint64_t seed = 1) : s(shape), random_(seed) {
    for (int64_t t = 0; t <= s.T; ++t) {
      offsets_.data()[t] = N;
      if (t < s.T) N += s.packed ? s.B - (s.B - 1) * t / std::max<int64_t>(s.T - 1, 1) : s.B;
    }
    steps_ = {s.T, s.B, s.packed ? offsets_.data() : nullptr};
    PlanShape plan_shape{};
    plan_shape.cell = id(), plan_shape.T = s.T, plan_shape.B = s.B, plan_shape.H = plan_shape.P = s.H;
    plan_shape.D = s.D, plan_shape.item_bytes = sizeof(T), plan_shape.compute_bytes = 4;
    plan_shape.tf32 = !kExact;
    plan_shape.gpu.multiprocessors = static_cast<int>(s.multiprocessors);
    plan = grid_plan(plan_shape);
    const double scale = 2.0 / std::sqrt(static_cast<double>(s.H));  // so large that errors grow
    draw(weight, s.D * G * s.H * s.H, scale), draw(h0, s.D * s.B * s.H, 1), draw(c0, s.D * s.B * s.H, 1);
    draw(x, s.D * N * G * s.H, 1), draw(bias, s.D * (G + R) * s.H, 0.5);
    draw(doutput, N * s.D * s.H, 1), draw(dh_n, s.D * s.B * s.H, 1), draw(dc_n, s.D * s.B * s.H, 1);
  }

  bool reversed(int64_t d) const {
    return s.direction == Direction::kReverse || (s.direction == Direction::kBoth && 2 * d >= s.D);
  }
  int64_t time(int64_t d, int64_t step) const { return reversed(d) ? s.T - 1 - step : step; }
  int64_t count(int64_t t) const { return steps_.count(t); }
  // Of output, [N, D, H]; and of arrays [D, N, n, H].
  size_t at_output(int64_t d, int64_t t, int64_t b, int64_t j) const {
    return static_cast<size_t>(((steps_.row(t) + b) * s.D + d) * s.H + j);
  }
  size_t at_row(int64_t d, int64_t t, int64_t b, int64_t n, int64_t k, int64_t j) const {
    return static_cast<size_t>(((d * N + steps_.row(t) + b) * n + k) * s.H + j);
  }
  size_t at_state(int64_t d, int64_t b, int64_t j) const { return static_cast<size_t>((d * s.B + b) * s.H + j); }

  template <class Exchange, class Launch = OnGrid>
  GridRun forward(Launch launch_kernel = {}) {
    for (Numbers* array : {&output, &h_n, &c_n, &saved}) array->assign(0, T{});
    fill_nan(output, N * s.D * s.H), fill_nan(h_n, s.D * s.B * s.H), fill_nan(c_n, s.D * s.B * s.H);
    fill_nan(saved, s.D * N * A * s.H), fill_nan(cells, Cell::kHasC ? s.D * N * s.H : 0);
    Numbers h = h0;
    Floats c, gates;
    for (const T v : c0) c.push_back(widen(v));
    GridForwardArgs args{};
    shape(args.cell);
    ForwardArgs& cell = args.cell;
    cell.bias = bias.data(), cell.h = h.data(), cell.c = Cell::kHasC ? c.data() : nullptr;
    cell.output = output.data(), cell.h_n = h_n.data(), cell.c_n = Cell::kHasC ? c_n.data() : nullptr;
    cell.cells = Cell::kHasC ? cells.data() : nullptr, cell.saved = A > 0 ? saved.data() : nullptr;
    return guarded([&](GridRun& run) {
      for (int64_t first = 0; first < s.T; first = args.end) {
        args.first = first, args.end = std::min(s.T, first + s.chunk);
        chunk_of_gates(args, gates);
        run_groups<GridForward<Cell, Kind, Exchange>, Exchange>(args, args.end - first + 1, false, run, launch_kernel);
      }
      keep(run, output), keep(run, h_n), keep(run, c_n), keep(run, saved), keep(run, cells);
    });
  }

  // With what the last forward pass left.
  template <class Exchange, class Launch = OnGrid>
  GridRun backward(Launch launch_kernel = {}) {
    fill_nan(dgates, s.D * N * G * s.H), fill_nan(drecurrent, s.D * N * R * s.H), fill_nan(before, s.D * N * s.H);
    fill_nan(dh0, s.D * s.B * s.H), fill_nan(dc0, s.D * s.B * s.H);
    Floats dh, dc;
    fill_nan(dh, s.D * s.B * s.H), fill_nan(dc, s.D * s.B * s.H);
    GridBackwardArgs args{};
    shape(args.cell);
    BackwardArgs& cell = args.cell;
    cell.doutput = doutput.data(), cell.dh_n = dh_n.data(), cell.output = output.data(), cell.saved = saved.data();
    cell.h0 = h0.data(), cell.dh = dh.data(), cell.dgates = dgates.data(), cell.drecurrent = drecurrent.data();
    cell.before = s.packed ? before.data() : nullptr, cell.dh0 = wants_initial ? dh0.data() : nullptr;
    if (Cell::kHasC) {
      cell.dc_n = dc_n.data(), cell.cells = cells.data(), cell.c0 = c0.data(), cell.dc = dc.data();
      cell.dc0 = wants_initial ? dc0.data() : nullptr;
    }
    return guarded([&](GridRun& run) {
      run_groups<GridBackward<Cell, Kind, Exchange>, Exchange>(args, s.T, true, run, launch_kernel);
      keep(run, dgates), keep(run, drecurrent), keep(run, before), keep(run, dh0), keep(run, dc0);
    });
  }

  // How far results of the last pass are from those in float64, where what is published is rounded to T as it is here.
  double forward_error() const;
  double backward_error() const;

 private:
  static Dtype dtype() {
    return sizeof(T) == 4 ? Dtype::kFloat : std::is_same_v<T, Half> ? Dtype::kHalf : Dtype::kBFloat16;
  }
  int k_blocks_of_gate() const { return static_cast<int>(grid_k_blocks(s.H, sizeof(T))); }
  static CellId id() { return Cell::kHasC ? CellId::lstm : G == 3 ? CellId::gru : CellId::rnn_tanh; }

  template <class F>
  void draw(std::vector<F>& array, int64_t size, double most) {
    for (int64_t i = 0; i < size; ++i) {
      F v;
      narrow(static_cast<float>((static_cast<double>(random_.below(2001)) / 1000 - 1) * most), v);
      array.push_back(v);
    }
  }
  template <class F>
  static void fill_nan(std::vector<F>& array, int64_t size) {
    array.resize(static_cast<size_t>(size));
    if (size > 0) std::memset(static_cast<void*>(array.data()), 0xFF, array.size() * sizeof(F));
  }
  template <class F>
  static void keep(GridRun& run, const std::vector<F>& array) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(array.data());
    run.bytes.insert(run.bytes.end(), bytes, bytes + array.size() * sizeof(F));
  }
  template <class Body>
  static GridRun guarded(Body body) {
    GridRun run;
    try {
      body(run);
    } catch (const std::exception& error) {
      run.error = error.what();
    }
    return run;
  }

  void shape(StepShape& to) const {
    to.cell = id(), to.dtype = dtype(), to.projected = false;
    to.N = N, to.D = s.D, to.B = s.B, to.H = to.P = s.H, to.direction = s.direction;
  }

  // The input products of the steps of a launch alone.
  void chunk_of_gates(GridForwardArgs& args, Floats& gates) const {
    int64_t rows[2] = {0, 0};
    for (int64_t step = args.first; step < args.end; ++step) rows[0] += count(step), rows[1] += count(s.T - 1 - step);
    args.gates_begin[0] = steps_.row(args.first), args.gates_begin[1] = steps_.row(s.T - args.end);
    const int64_t room = std::max(rows[0], rows[1]), size = G * s.H;
    fill_nan(gates, s.D * room * size);
    for (int64_t d = 0; d < s.D; ++d) {
      const int reverse = reversed(d) ? 1 : 0;
      const auto from = x.begin() + (d * N + args.gates_begin[reverse]) * size;
      std::copy(from, from + rows[reverse] * size, gates.begin() + d * room * size);
    }
    args.cell.gates = gates.data(), args.cell.gates_rows = room;
  }

  // weight_hh as the threads of blocks take it.
  void pack(bool is_backward) {
    PackWeightsArgs args{};
    args.dtype = dtype(), args.exact = kExact, args.is_backward = is_backward, args.G = G,
    args.H = static_cast<int>(s.H);
    args.k_blocks = (is_backward ? G : 1) * k_blocks_of_gate();
    args.words = WeightPlace::words(static_cast<int>(plan.unit_blocks), args.k_blocks, is_backward ? 1 : G);
    packed_.assign(static_cast<size_t>(s.D * args.words / 4), Line{{1, 2, 3, 4}});
    for (int64_t d = 0; d < s.D; ++d) {
      args.weight = weight.data() + d * G * s.H * s.H, args.target = packed_[0].words + d * args.words;
      grid_kernels().pack(args, nullptr);
    }
  }

  template <class Kernel, class Exchange, class Args, class Launch>
  void run_groups(Args& args, int64_t publications, bool is_backward, GridRun& run, Launch launch_kernel) {
    constexpr bool kFlags = std::is_base_of_v<FlagExchange, Exchange>;
    pack(is_backward);
    PrepareArgs prepare{};
    Mailbox& mail = prepare.mailbox;
    prepare.D = static_cast<int>(s.D), prepare.k_blocks_of_gate = k_blocks_of_gate();
    prepare.words_of_row = static_cast<int>(plan.unit_blocks * kGridUnits * static_cast<int64_t>(sizeof(T)) / 4);
    if (s.flag_of_member) publications *= plan.unit_blocks;
    mail.tiles = static_cast<int>(plan.tiles), mail.k_blocks = (is_backward ? G : 1) * k_blocks_of_gate();
    mail.publications = static_cast<int>(publications), mail.members = static_cast<int>(plan.unit_blocks);
    mail.window = s.window, mail.slots = s.slots ? s.slots : kFlags ? 2 : 2 * s.window;
    const int64_t words = s.D * mail.slots * mail.words_of_slot();
    const int64_t flags = kFlags ? s.D * plan.tiles * publications : 0;
    // Before it is prepared memory holds whatever it holds.
    std::vector<Line> memory(static_cast<size_t>(words / 4 + flags / 4 + 2), Line{{1, 2, 3, 4}});
    mail.words = memory[0].words, mail.failed = mail.words + words;
    mail.flags = kFlags ? mail.failed + 1 : nullptr, mail.report = &run.report;
    if (s.prepared)
      grid_kernels().prepare(prepare, nullptr);
    else
      memory.assign(memory.size(), Line{});
    args.steps = steps_, args.mailbox = mail, args.flags = kFlags, args.exact = kExact;
    args.weights = packed_[0].words, args.weight_words = static_cast<int64_t>(packed_.size()) * 4 / s.D;
    args.unit_blocks = static_cast<int>(plan.unit_blocks), args.row_groups = static_cast<int>(plan.row_groups);
    for (int64_t first = 0; first < s.D; first += plan.groups) {
      args.first_group = static_cast<int>(first),
      args.group_count = static_cast<int>(std::min(plan.groups, s.D - first));
      launch_kernel(Kernel{args}, args.unit_blocks * args.row_groups, args.group_count);
    }
    run.failed += *mail.failed;
  }

  struct alignas(16) Line {
    uint32_t words[4];
  };
  HostRandom random_;
  GuardedOffsets offsets_;
  std::vector<Line> packed_;
  Steps steps_{};
};

}  // namespace
}  // namespace fastrnn::cuda

#include "grid_reference.inl"
