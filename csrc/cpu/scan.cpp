// The CPU pass above the kernels: choice of the instruction set, scratch memory, division of the work over threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

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

std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> kernels{[] {
    const char* name = std::getenv("FASTRNN_CPU_ISA");
    return name && *name ? find(name) : isas().back();
  }()};
  return kernels;
}

// Below this many multiply-adds in the recurrence a second thread costs more than it brings (waking one takes
// about 5 us, in which one core does 200 thousand).
constexpr int64_t kMinWorkPerThread = 400000;

struct Rows {
  int64_t d, begin, end;
};

// Ranges of rows of near equal length in time steps, as many as there are threads to share among the groups.
std::vector<Rows> divide(const ScanShape& a) {
  const int64_t work = a.N * a.D * kCells[static_cast<int>(a.cell)].gates * a.H * a.P;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / kMinWorkPerThread);
  const int64_t parts = std::max<int64_t>(1, std::min((threads + a.D - 1) / a.D, a.B));
  std::vector<int64_t> bounds = {0};
  if (a.batch_sizes) {
    int64_t steps = 0, b = 0;  // rows are sorted by length, longest first: b falls as t falls
    std::vector<int64_t> length(static_cast<size_t>(a.B));
    for (int64_t t = a.T - 1; t >= 0; --t)
      for (; b < a.batch_sizes[t]; ++b) length[static_cast<size_t>(b)] = t + 1;
    for (b = 0; b < a.B; ++b) {
      steps += length[static_cast<size_t>(b)];
      if (steps * parts >= a.N * static_cast<int64_t>(bounds.size())) bounds.push_back(b + 1);
    }
  } else {
    for (int64_t i = 1; i <= parts; ++i) bounds.push_back(a.B * i / parts);
  }
  bounds.back() = a.B;
  std::vector<Rows> ranges;
  for (size_t i = 1; i < bounds.size(); ++i)
    for (int64_t d = 0; d < a.D; ++d) ranges.push_back({d, bounds[i - 1], bounds[i]});
  return ranges;
}

template <class Args>
void run(const PassKernels<Args>& kernels, const Args& args, const AllocateScratch& allocate) {
  if (args.N == 0) return;
  char* scratch = allocate(kernels.scratch_bytes(args));
  const std::vector<Rows> ranges = divide(args);
  const int64_t blocks = kernels.pack_blocks(args), count = static_cast<int64_t>(ranges.size());
  torch::stable::parallel_for(0, blocks, count > 1 ? 1 : blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) kernels.pack(args, scratch, block);
  });
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Rows& rows = ranges[static_cast<size_t>(i)];
      kernels.rows(args, scratch, rows.d, rows.begin, rows.end);
    }
  });
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : isas()) names.emplace_back(kernels->isa);
  return names;
}

std::string cpu_isa() { return active().load()->isa; }

void set_cpu_isa(const std::string& name) { active() = find(name); }

void scan_cpu(const ScanArgs& args, const AllocateScratch& allocate) { run(active().load()->forward, args, allocate); }
void scan_cpu(const ScanBackwardArgs& args, const AllocateScratch& allocate) {
  run(active().load()->backward, args, allocate);
}

}  // namespace fastrnn
