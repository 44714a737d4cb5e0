// Which kernels run a pass on a GPU, and how: a pure function of shape and device, which asks no device. Every number
// that was chosen stands here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cells.h"

namespace fastrnn::cuda {

// What a plan needs to know of a GPU.
struct GpuFacts {
  const char* name;
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes, register_bytes;  // of a multiprocessor, as much as one block may have
};

constexpr GpuFacts kGpus[] = {
    {"a100", 8, 0, 108, 163 << 10, 256 << 10},  {"l40s", 8, 9, 142, 99 << 10, 256 << 10},
    {"h100", 9, 0, 132, 227 << 10, 256 << 10},  {"h200", 9, 0, 132, 227 << 10, 256 << 10},
    {"b200", 10, 0, 148, 227 << 10, 256 << 10},
};

struct PlanShape {
  CellId cell;
  int64_t T, B, I, H, D;
  int64_t item_bytes, compute_bytes;  // of an element of Storage and of Compute
  int64_t P;                          // size of h: H, or of its projection
  int gpu_major = 9;                  // compute capability

  int64_t weight_bytes() const { return kCells[static_cast<int>(cell)].gates * H * P * item_bytes; }  // weight_hh
};

constexpr int kBlockRows = 8;       // of a batch, in a block that runs all steps: the columns of a product
constexpr int kBlockThreads = 256;  // of every gate kernel: at up to 80 registers a thread, three blocks at a time
constexpr int64_t kMostBlocks = 2147483647, kMostGroups = 65535;  // of a grid, in x and y

// Of input products that are there at a time: enough rows for a product at full speed, little beside what training
// keeps.
#if !defined(FASTRNN_CHUNK_BYTES)
#define FASTRNN_CHUNK_BYTES (int64_t{64} << 20)
#endif
constexpr int64_t kChunkBytes = FASTRNN_CHUNK_BYTES;

// Steps that a program (csrc/cuda/program.h) runs: a launch for all of them, of which the last ones of a pass may have
// nothing to do. Where fewer than half are left they run one by one.
#if !defined(FASTRNN_PROGRAM_STEPS)
#define FASTRNN_PROGRAM_STEPS 16
#endif
constexpr int kProgramSteps = FASTRNN_PROGRAM_STEPS;
constexpr int kFewSteps = (kProgramSteps + 1) / 2;
// Programs that are kept, and bytes of the memory that they work on.
constexpr size_t kMostPrograms = 64;
constexpr int64_t kMostProgramBytes = int64_t{256} << 20;
// weight_hh of all groups, up to which a step is so short that its launches matter: reading as much takes 10 to 20 us.
constexpr int64_t kMostProgramWeights = int64_t{32} << 20;

// Neighbouring units of a thread: 16 bytes of Compute, so that loads are whole; one where H is no multiple of that.
constexpr int units_per_thread(int64_t H, int64_t compute_bytes) {
  const int most = compute_bytes == 8 ? 2 : 4;
  return H % most == 0 ? most : 1;
}

// Rows of input products that are there at a time, for each group: at least those of one step.
constexpr int64_t chunk_rows(int64_t rows, int64_t B, int64_t row_bytes) {
  return std::max(B, std::min(rows, kChunkBytes / std::max<int64_t>(row_bytes, 1)));
}

// H up to which one block keeps weight_hh, of any cell, in its registers: 4 gates of 128 units take half of them.
constexpr int64_t kMostBlockUnits = 128;

// Tiles of 16 units, and warps, of such a block. Pairs of units move at once: of an odd H, or in arrays of a caller
// that begin at an odd element, they do not, for which there is the larger block alone.
constexpr int block_tiles(int64_t H, bool pairs) { return pairs && H <= 64 ? 4 : 8; }

constexpr const char* kKernels[] = {"step", "step-graph", "persistent-block", "persistent-grid"};

// Why a kernel, by its name, cannot run a pass; empty if it can.
inline std::string why_not_kernel(const std::string& name, const PlanShape& s) {
  if (name == "step") return "";
  if (name == "step-graph") {
    const int64_t weights = s.D * s.weight_bytes();
    if (weights <= kMostProgramWeights) return "";
    return "weight_hh of " + std::to_string(weights >> 20) + " MiB: reading it takes longer than the launches";
  }
  if (name == "persistent-block") {
    if (s.gpu_major < 8) return "it needs a GPU of compute capability 8.0";
    if (s.P != s.H) return "it has no projection";
    if (s.item_bytes != 2) return "its products are those of bfloat16 and float16";
    if (s.H > kMostBlockUnits)
      return "H=" + std::to_string(s.H) +
             ": weight_hh fits into the registers of a block up to H=" + std::to_string(kMostBlockUnits);
    return "";
  }
  if (name == "persistent-grid") return "not in this version";
  return "there are auto, step, step-graph and persistent-block";
}

// Why the kernel that is asked for, or "auto", cannot run a pass; empty if it can.
inline std::string why_not_asked(const std::string& asked, const PlanShape& s) {
  return asked == "auto" ? "" : why_not_kernel(asked, s);
}

// The kernel of a pass: the one that is asked for, which can run it; of "auto" the best one that is proven on GPUs,
// with `persistent` also of those that are not yet.
inline std::string choose_kernel(const std::string& asked, bool persistent, const PlanShape& s) {
  if (asked != "auto") return asked;
  return persistent && why_not_kernel("persistent-block", s).empty() ? "persistent-block" : "step";
}

struct Plan {
  std::string kernel, why;           // chosen, and the reason
  std::vector<std::string> against;  // "kernel: reason", for each of the others
  std::string weights;               // whether weight_hh would fit where it could stay
  int units;                         // of a thread of the gate kernel
  int64_t threads, blocks;           // of a step's gate kernel; persistent-block: threads of a block, blocks
  int64_t chunk_steps;               // steps whose input products are computed together
  int64_t launches;                  // of a forward pass with biases and without projection
};

// Throws std::invalid_argument where the kernel that is asked for cannot run it.
inline Plan plan_pass(PlanShape s, const GpuFacts& gpu, const std::string& asked = "auto", bool persistent = false) {
  if (s.T < 1 || s.B < 1 || s.I < 0 || s.H < 1 || s.D < 1)
    throw std::invalid_argument("fastrnn: a plan needs T, B, H and D of at least 1, and I of at least 0");
  s.gpu_major = gpu.major;
  const CellInfo& cell = kCells[static_cast<int>(s.cell)];
  Plan plan;
  if (const std::string reason = why_not_asked(asked, s); !reason.empty())
    throw std::invalid_argument("fastrnn: kernel '" + asked + "' cannot run this: " + reason);
  plan.kernel = choose_kernel(asked, persistent, s);
  const bool graph = plan.kernel == "step-graph", block = plan.kernel == "persistent-block";
  plan.why = graph   ? std::to_string(kProgramSteps) + " steps of a product and a gate kernel as a CUDA graph"
             : block ? "weight_hh stays in the registers of a block, which runs all steps of " +
                           std::to_string(kBlockRows) + " rows"
                     : "one matrix product and one gate kernel per time step take any shape and dtype";
  plan.why += asked == plan.kernel ? "; asked for" : "";
  if (graph && s.T < kFewSteps) plan.why += "; a pass of fewer than " + std::to_string(kFewSteps) + " has none";
  for (const char* other : kKernels) {
    if (other == plan.kernel) continue;
    std::string reason = why_not_kernel(other, s);
    if (reason.empty()) reason = plan.kernel == asked ? plan.kernel + " is asked for" : "not measured yet";
    plan.against.push_back(std::string(other) + ": " + reason);
  }
  plan.units = block ? 2 : units_per_thread(s.H, s.compute_bytes);
  plan.threads = block ? 32 * block_tiles(s.H, s.H % 2 == 0) : s.B * s.H / plan.units;
  plan.blocks =
      (block ? (s.B + kBlockRows - 1) / kBlockRows : (plan.threads + kBlockThreads - 1) / kBlockThreads) * s.D;
  const int64_t rows = chunk_rows(s.T * s.B, s.B, s.D * cell.gates * s.H * s.compute_bytes);
  plan.chunk_steps = std::max<int64_t>(1, std::min(s.T, rows / std::max<int64_t>(s.B, 1)));
  const int64_t chunks = (s.T + plan.chunk_steps - 1) / plan.chunk_steps;
  const int64_t copies = s.D > 1 || graph ? s.D : 0;  // of weight_hh: as one batch, or where a graph reads it
  // Of a chunk: the input products; all steps at once, graphs and their tables, or a product and a kernel each.
  const auto launches_of = [&](int64_t steps) {
    const int64_t programs = graph ? (steps + kProgramSteps - kFewSteps) / kProgramSteps : 0;
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
