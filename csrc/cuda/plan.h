// Which kernels run a pass on a GPU, and why: a pure function of shape and device, which asks no device.
#pragma once

#include "sizes.h"

namespace fastrnn::cuda {

// Microseconds of a time step of all groups, by a model of the H200 (1.9 GHz) that nobody has measured yet: FMA of the
// tensor cores 1235 a cycle and multiprocessor in products of 8 columns (TF32: half; float as it is, without them:
// 128), 24 bytes a cycle of the L2 cache and 128 of shared memory, which overlap but for a third of the shorter; 650
// cycles from a store to another multiprocessor's sight, 60 of a barrier; 15 % for what is forgotten. Of a step of a
// product and a kernel: two launches of 2.5 us, or the weights at 5.5 TB/s, the products at 450 TFLOP/s, the gates
// at 3.5 TB/s.
struct Prediction {
  const PlanShape& s;
  const double G = kCells[static_cast<int>(s.cell)].gates, H = static_cast<double>(s.H);
  const double bytes = static_cast<double>(s.item_bytes);

  static double both(double a, double b) { return std::max(a, b) + 0.35 * std::min(a, b); }
  static double cells(double count) { return 90 + count * 5 / 16 + count / 128 * 12; }
  static double us(double cycles) { return 1.15 * cycles / 1900; }

  double step() const {
    const double rows = static_cast<double>(s.B * s.D), weights = static_cast<double>(s.D * s.weight_bytes());
    const double rate = s.item_bytes == 8 || s.is_exact() ? 50e6 : s.item_bytes == 4 ? 225e6 : 450e6;
    const double product = std::max(weights / 5.5e6, 2 * G * H * H * rows / rate);
    return std::max(5.0, 1.8 + 0.9 + product + 0.5 + rows * H * (8 * G + 16) / 3.5e6);
  }
  double block() const {
    const double blocks = static_cast<double>((s.B + kBlockRows - 1) / kBlockRows * s.D);
    const double turns = std::max(1.0, std::ceil(blocks / s.gpu.multiprocessors));
    const double products = both(G * H * H * kBlockRows / 1235, 8 * H * kBlockRows * bytes / 128);
    return turns * us(products + 100 + cells(H * kBlockRows));
  }
  double grid() const {
    const GridPlan plan = grid_plan(s);
    const double gates = s.is_backward ? G : 1;  // of the operand
    const double tiles = std::ceil(static_cast<double>(plan.tiles) / static_cast<double>(plan.row_groups));
    const double fma = s.is_exact() ? 128 : s.item_bytes == 4 ? 617.5 : 1235;
    const double products = both(G * kGridUnits * H * kBlockRows / fma, gates * H * kBlockRows * bytes / 24);
    const double sums = 80 + 64 * (s.is_backward ? 1 : G);
    const double turns = std::ceil(static_cast<double>(s.D) / static_cast<double>(plan.groups));
    return turns * us(650 + tiles * (products + 60 + sums + cells(kGridUnits * kBlockRows)));
  }
  // -1: nothing is predicted.
  double of(const std::string& kernel) const {
    if (kernel == "step") return step();
    if (kernel == "persistent-block") return block();
    return kernel == "persistent-grid" ? grid() : -1;
  }
};

constexpr const char* kKernels[] = {"step", "step-graph", "persistent-block", "persistent-grid"};

// Why a kernel, by its name, cannot run a pass; empty if it can.
inline std::string why_not_kernel(const std::string& name, const PlanShape& s) {
  if (name == "step") return "";
  const bool is_known = std::find(std::begin(kKernels), std::end(kKernels), name) != std::end(kKernels);
  if (is_known && s.has_resets) return "it has no resets";
  if (is_known && s.has_dcells) return "it takes no gradients of the cell states between steps";
  if (name == "step-graph") {
    const int64_t weights = s.D * s.weight_bytes();
    if (weights <= kMostProgramWeights) return "";
    return "weight_hh of " + std::to_string(weights >> 20) + " MiB: reading it takes longer than the launches";
  }
  if (name == "persistent-block") {
    if (s.gpu.major < 8) return "it needs a GPU of compute capability 8.0";
    if (s.P != s.H) return "it has no projection";
    if (s.item_bytes != 2) return "its products are those of bfloat16 and float16";
    if (s.H > kMostBlockUnits)
      return "H=" + std::to_string(s.H) +
             ": weight_hh fits into the registers of a block up to H=" + std::to_string(kMostBlockUnits);
    return "";
  }
  if (name == "persistent-grid") {
    if (s.gpu.major < 8) return "it needs a GPU of compute capability 8.0";
    if (!s.gpu.together) return "the GPU cannot be asked to run its blocks at the same time";
    if (s.P != s.H) return "it has no projection";
    if (s.item_bytes == 8) return "it has no float64";
    if (s.T * s.B * s.D >= int64_t{1} << 31 || s.H >= 1 << 24) return "it counts rows in 31 bits";
    const GridPlan plan = grid_plan(s);
    if (plan.unit_blocks > s.gpu.multiprocessors)
      return "H=" + std::to_string(s.H) + ": its " + std::to_string(plan.unit_blocks) + " blocks of " +
             std::to_string(kGridUnits) + " units do not fit on " + std::to_string(s.gpu.multiprocessors) +
             " multiprocessors at a time";
    if (plan.shared_bytes > s.gpu.shared_bytes)
      return "H=" + std::to_string(s.H) + ": beside its registers a block needs " +
             std::to_string(plan.shared_bytes >> 10) + " KiB of shared memory, of " +
             std::to_string(s.gpu.shared_bytes >> 10) + " KiB";
    return "";
  }
  return "there are auto, step, step-graph, persistent-block and persistent-grid";
}

// Why the kernel that is asked for, or "auto", cannot run a pass; empty if it can.
inline std::string why_not_asked(const std::string& asked, const PlanShape& s) {
  return asked == "auto" ? "" : why_not_kernel(asked, s);
}

// The kernel of a pass: the one that is asked for, which can run it; of "auto" step, with `persistent` also those that
// are not measured on a GPU yet, by what is predicted of them.
inline std::string choose_kernel(const std::string& asked, bool persistent, const PlanShape& s) {
  if (asked != "auto") return asked;
  const Prediction predicted{s};
  std::string best = "step";
  for (const char* kernel : {"persistent-block", "persistent-grid"})
    if (persistent && why_not_kernel(kernel, s).empty() && predicted.of(kernel) < predicted.of(best)) best = kernel;
  return best;
}

struct Plan {
  std::string kernel, why;           // chosen, and the reason
  std::vector<std::string> against;  // "kernel: reason", for each of the others
  std::string weights;               // whether weight_hh would fit where it could stay
  int units;                         // of a thread of the gate kernel
  int64_t threads, blocks;           // of a step's gate kernel; persistent: threads of a block, blocks at a time
  int64_t chunk_steps;               // steps whose input products are computed together
  int64_t launches;                  // of a forward pass with biases and without projection
};

// Throws std::invalid_argument where the kernel that is asked for cannot run it.
inline Plan plan_pass(PlanShape s, const GpuFacts& gpu, const std::string& asked = "auto", bool persistent = false) {
  if (s.T < 1 || s.B < 1 || s.I < 0 || s.H < 1 || s.D < 1)
    throw std::invalid_argument("fastrnn: a plan needs T, B, H and D of at least 1, and I of at least 0");
  s.gpu = {gpu.major, gpu.multiprocessors, gpu.shared_bytes};
  const CellInfo& cell = kCells[static_cast<int>(s.cell)];
  Plan plan;
  if (const std::string reason = why_not_asked(asked, s); !reason.empty())
    throw std::invalid_argument("fastrnn: kernel '" + asked + "' cannot run this: " + reason);
  plan.kernel = choose_kernel(asked, persistent, s);
  const bool graph = plan.kernel == "step-graph", block = plan.kernel == "persistent-block";
  const bool grid = plan.kernel == "persistent-grid";
  const GridPlan on_grid = grid_plan(s);
  plan.why = graph   ? std::to_string(kProgramSteps) + " steps of a product and a gate kernel as a CUDA graph"
             : block ? "weight_hh stays in the registers of a block, which runs all steps of " +
                           std::to_string(kBlockRows) + " rows"
             : grid  ? "weight_hh stays on the chip, " + std::to_string(kGridUnits) +
                           " units in a block, which runs all steps of " +
                           (on_grid.row_groups > 1 ? "a part of the rows" : "all rows")
                     : "one matrix product and one gate kernel per time step take any shape and dtype";
  const Prediction predicted{s};
  const auto time_of = [&](const std::string& kernel) {
    const double us = predicted.of(kernel);
    return us < 0 ? std::string() : "; predicted " + std::to_string(us).substr(0, us < 10 ? 4 : 5) + " us a step";
  };
  plan.why += time_of(plan.kernel) + (asked == plan.kernel ? "; asked for" : "");
  if (graph && s.T < kFewSteps) plan.why += "; a pass of fewer than " + std::to_string(kFewSteps) + " has none";
  for (const char* other : kKernels) {
    if (other == plan.kernel) continue;
    std::string reason = why_not_kernel(other, s);
    if (reason.empty())
      reason = (plan.kernel == asked            ? plan.kernel + " is asked for"
                : persistent && other[0] == 'p' ? "slower, not measured yet"
                : std::string(other) == "step"  ? "slower"
                                                : "not measured yet") +
               time_of(other);
    plan.against.push_back(std::string(other) + ": " + reason);
  }
  plan.units = block ? 2 : grid ? 1 : units_per_thread(s.H, s.compute_bytes);
  plan.threads = block ? 32 * block_tiles(s.H, s.H % 2 == 0) : grid ? 32 * kGridWarps : s.B * s.H / plan.units;
  plan.blocks = block  ? (s.B + kBlockRows - 1) / kBlockRows * s.D
                : grid ? on_grid.blocks()
                       : (plan.threads + kBlockThreads - 1) / kBlockThreads * s.D;
  const int64_t rows = chunk_rows(s.T * s.B, s.B, s.D * cell.gates * s.H * s.compute_bytes);
  plan.chunk_steps = std::max<int64_t>(1, std::min(s.T, rows / std::max<int64_t>(s.B, 1)));
  const int64_t chunks = (s.T + plan.chunk_steps - 1) / plan.chunk_steps;
  const int64_t copies = s.D > 1 || graph || grid ? s.D : 0;  // of weight_hh: as one batch, or where kernels read it
  // Of a chunk: the input products; all steps at once, graphs and their tables, or a product and a kernel each.
  const auto launches_of = [&](int64_t steps) {
    const int64_t programs = graph ? (steps + kProgramSteps - kFewSteps) / kProgramSteps : 0;
    if (grid) return s.D + 1 + (s.D + on_grid.groups - 1) / on_grid.groups;  // the mailbox; groups that fit at a time
    return s.D + (block ? 1 : 2 * (programs + std::max<int64_t>(0, steps - programs * kProgramSteps)));
  };
  // States, biases, copies; chunks, of which the last may be shorter.
  plan.launches = 1 + s.D + copies + (chunks - 1) * launches_of(plan.chunk_steps) +
                  launches_of(s.T - (chunks - 1) * plan.chunk_steps);
  // Where weight_hh would lie.
  const int64_t weights = s.weight_bytes();
  const int64_t room = gpu.register_bytes * 3 / 4;
  const int64_t all = (room + gpu.shared_bytes * 2 / 3) * gpu.multiprocessors / s.D;
  const auto kib = [](int64_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KiB"; };
  plan.weights = "weight_hh of " + kib(weights) + (weights <= room ? " would fit" : " does not fit") + " into the " +
                 kib(room) + " of one multiprocessor's registers," + (weights <= all ? " would fit" : " does not fit") +
                 " into the " + kib(all) + " of all multiprocessors' registers and shared memory for a direction";
  return plan;
}

}  // namespace fastrnn::cuda
