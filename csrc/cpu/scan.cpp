// The CPU pass above the kernels: choice of the instruction set, scratch memory, division of the work over threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <stdexcept>

#include "../scratch.h"
#include "kernels.h"
#include "scan_cpu.h"

namespace fastrnn {
namespace {

// This build's instruction sets, worst to best.
std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found = {&kernels_base()};
#if defined(FASTRNN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back(&kernels_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&kernels_avx512());
#endif
  return found;
}

const std::vector<const CpuKernels*>& isas() {
  static const std::vector<const CpuKernels*> found = available();
  return found;
}

const CpuKernels* find(const std::string& name) {
  std::string known;
  for (const CpuKernels* kernels : isas()) {
    if (name == kernels->isa) return kernels;
    known += known.empty() ? kernels->isa : std::string(", ") + kernels->isa;
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' is not available here. Available: " + known);
}

std::atomic<const CpuKernels*>& current_kernels() {
  static std::atomic<const CpuKernels*> kernels{[] {
    const char* name = std::getenv("FASTRNN_CPU_ISA");
    return name && *name ? find(name) : isas().back();
  }()};
  return kernels;
}

// Below this many multiply-adds a second thread costs more than it brings (waking one takes
// about 5 us, in which one core does 200 thousand).
constexpr int64_t kMinWorkPerThread = 400000;
// A team meets after every step, which costs it about 0.3 us: with fewer multiply-adds per step it does not pay.
constexpr int64_t kMinStepPerMember = 16000;
// Fewer rows than this per thread use the weights too seldom: threads share the hidden units instead, and each
// keeps its part of the weights in its own cache.
constexpr int64_t kMinRowsPerThread = 16;
// Packing costs about as much as two steps; a product with this few rows is as fast on the weights as they lie.
constexpr int64_t kMaxDirectRows = 1, kMaxDirectSteps = 2, kMaxDirectStepRows = 4, kMaxDirectBackwardRows = 2;
// For a single row it is faster only by a tenth or two.
constexpr int64_t kMinPackedSteps = 32, kMaxPackedWeights = 1 << 18;
// The same for the input weights, whose product takes the rows of many steps at once.
constexpr int64_t kMaxDirectInputRows = 4;

int64_t input_size(const ScanArgs& a) { return a.I; }
int64_t input_size(const ScanBackwardArgs&) { return 0; }

// What to pack, and the steps of a chunk, for `rows` rows of a thread.
void choose_layout(const ScanArgs& a, int64_t rows, CpuPlan& plan) {
  const bool as_stored = a.weight_type == WeightType::kStorage;
  if (a.B <= kMaxDirectRows)  // worth it where the packed weights stay in the second cache for many steps
    plan.packed = a.T >= kMinPackedSteps && kCells[static_cast<int>(a.cell)].gates * a.H * a.P <= kMaxPackedWeights;
  else
    plan.packed = a.T > kMaxDirectSteps || a.B > kMaxDirectStepRows;
  plan.packed = plan.packed && as_stored;
  plan.packed_input = as_stored && a.N > kMaxDirectInputRows;
  const int64_t chunk_rows = plan.packed_input ? kChunkRows : kMaxDirectInputRows;
  plan.chunk = std::clamp<int64_t>(chunk_rows / rows, 1, a.T);
}
void choose_layout(const ScanBackwardArgs& a, int64_t, CpuPlan& plan) {
  const bool multiplies = a.T > 1 || a.dh0;  // by weight_hh; the gradient of a single step may stop before it
  plan.packed = a.projected || (multiplies && (a.T > kMaxDirectSteps || a.B > kMaxDirectBackwardRows));
  plan.packed_input = false, plan.chunk = 1;
}

template <class Args>
CpuPlan choose(const PassKernels<Args>& kernels, const Args& a) {
  CpuPlan plan;
  const int64_t weights = kCells[static_cast<int>(a.cell)].gates * a.H * (a.P + input_size(a));
  const int64_t step = a.B * weights, work = a.N * a.D * weights;  // of the longest step of a group, and of all
  const int64_t useful = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / kMinWorkPerThread);
  const int64_t threads = (useful + a.D - 1) / a.D;  // of one group
  plan.members = 1;
  if (!a.batch_sizes && !a.projected && a.B < kMinRowsPerThread * threads)
    plan.members = std::max<int64_t>(1, std::min({threads, step / kMinStepPerMember, kernels.unit_blocks(a)}));
  plan.ranges = plan.members > 1 ? 1 : std::max<int64_t>(1, std::min(threads, a.B));
  plan.slots = plan.members == 1 && plan.ranges == 1 ? 1 : a.D;
  choose_layout(a, (a.B + plan.ranges - 1) / plan.ranges, plan);
  return plan;
}

// Bounds of ranges of rows of near equal length in time steps.
std::vector<int64_t> row_bounds(const ScanShape& a, int64_t ranges) {
  std::vector<int64_t> bounds = {0};
  if (a.batch_sizes) {
    int64_t steps = 0, b = 0;  // rows are sorted by length, longest first: b falls as t falls
    std::vector<int64_t> length(static_cast<size_t>(a.B));
    for (int64_t t = a.T - 1; t >= 0; --t)
      for (; b < a.batch_sizes[t]; ++b) length[static_cast<size_t>(b)] = t + 1;
    for (b = 0; b < a.B; ++b) {
      steps += length[static_cast<size_t>(b)];
      if (steps * ranges >= a.N * static_cast<int64_t>(bounds.size())) bounds.push_back(b + 1);
    }
  } else {
    for (int64_t i = 1; i <= ranges; ++i) bounds.push_back(a.B * i / ranges);
  }
  bounds.back() = a.B;
  return bounds;
}

// Each thread runs groups as a whole, one after the other as long as there are any, in scratch memory of its own, where
// it also packs their weights: it finds them in its cache.
template <class Args>
void run_by_groups(const PassKernels<Args>& kernels, const Args& args, const CpuPlan& plan) {
  const int64_t blocks = kernels.pack_blocks(args, plan);
  const size_t bytes = kernels.scratch_bytes(args, plan);
  const int64_t threads = std::min<int64_t>(args.D, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {  // called at least once, on any threads
    PassScratch<> own;
    for (int64_t d = next++; d < args.D; d = next++) {
      char* scratch = own.get(bytes);  // each time the same, poisoned anew in tests
      const Share share{d, 0, 0, args.B, 0};
      for (int64_t block = 0; block < blocks; ++block) kernels.pack(args, plan, scratch, share, block);
      kernels.run(args, plan, scratch, share);
    }
  });
}

template <class Args>
void pack_all(const PassKernels<Args>& kernels, const Args& args, const CpuPlan& plan, char* scratch) {
  torch::stable::parallel_for(0, args.D * kernels.pack_blocks(args, plan), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % args.D;
      kernels.pack(args, plan, scratch, {d, d, 0, args.B, 0}, i / args.D);
    }
  });
}

template <class Args>
void run_by_rows(const PassKernels<Args>& kernels, const Args& args, const CpuPlan& plan) {
  const std::vector<int64_t> bounds = row_bounds(args, plan.ranges);
  const int64_t count = args.D * static_cast<int64_t>(bounds.size() - 1);
  PassScratch<> shared;
  char* scratch = shared.get(kernels.scratch_bytes(args, plan));
  pack_all(kernels, args, plan, scratch);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % args.D, range = i / args.D;
      const size_t first = static_cast<size_t>(range);
      kernels.run(args, plan, scratch, {d, d, bounds[first], bounds[first + 1], range});
    }
  });
}

template <class Args>
void run_by_units(const PassKernels<Args>& kernels, const Args& args, const CpuPlan& plan) {
  PassScratch<> shared;
  char* scratch = shared.get(kernels.scratch_bytes(args, plan));
  pack_all(kernels, args, plan, scratch);
  std::deque<Team> teams;
  for (int64_t d = 0; d < args.D; ++d) teams.emplace_back(static_cast<int>(plan.members));
  torch::stable::parallel_for(0, args.D * plan.members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i / plan.members;
      Team& team = teams[static_cast<size_t>(d)];
      const int member = team.join();
      if (member >= 0) kernels.run(args, plan, scratch, {d, d, 0, args.B, 0, member, &team});
    }
  });
}

template <class Args>
void run(const PassKernels<Args>& kernels, const Args& args) {
  if (args.N == 0) return;
  const CpuPlan plan = choose(kernels, args);
  if (plan.members > 1)
    run_by_units(kernels, args, plan);
  else if (plan.ranges > 1)
    run_by_rows(kernels, args, plan);
  else
    run_by_groups(kernels, args, plan);
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : isas()) names.emplace_back(kernels->isa);
  return names;
}

std::string cpu_isa() { return cpu_kernels().isa; }

void set_cpu_isa(const std::string& name) { current_kernels() = find(name); }

const CpuKernels& cpu_kernels() { return *current_kernels().load(); }

void scan_cpu(const ScanArgs& args) { run(cpu_kernels().forward, args); }
void scan_cpu(const ScanBackwardArgs& args) { run(cpu_kernels().backward, args); }

}  // namespace fastrnn
