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
};

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

// Why these kernels, by their name, are not to be had in this version; empty if they are.
inline std::string why_not_kernel(const std::string& name) {
  if (name == "auto" || name == "step" || name == "step-graph") return "";
  if (name == "persistent-block" || name == "persistent-grid") return "not in this version";
  return "there are auto, step, step-graph, persistent-block and persistent-grid";
}

// Why the steps of a layer with these weights of all groups are not run as programs; empty if they can be.
inline std::string why_not_program(int64_t weight_bytes) {
  if (weight_bytes <= kMostProgramWeights) return "";
  return "weight_hh of " + std::to_string(weight_bytes >> 20) + " MiB: reading it takes longer than the launches";
}

struct Plan {
  std::string kernel, why;           // chosen, and the reason
  std::vector<std::string> against;  // "kernel: reason", for each of the others
  int units;                         // of a thread of the gate kernel
  int64_t threads, blocks;           // of a step's gate kernel
  int64_t chunk_steps;               // steps whose input products are computed together
  int64_t launches;                  // of a forward pass with biases and without projection
};

// kernel: "auto", or the one that is asked for; throws std::invalid_argument where that cannot run it.
inline Plan plan_pass(const PlanShape& s, const GpuFacts& gpu, const std::string& kernel = "auto") {
  if (s.T < 1 || s.B < 1 || s.I < 0 || s.H < 1 || s.D < 1)
    throw std::invalid_argument("fastrnn: a plan needs T, B, H and D of at least 1, and I of at least 0");
  const CellInfo& cell = kCells[static_cast<int>(s.cell)];
  Plan plan;
  const int64_t weights = cell.gates * s.H * s.H * s.item_bytes;
  const std::string no_program = why_not_program(s.D * weights);
  const bool graph = kernel == "step-graph" && no_program.empty();
  if (graph) {
    plan.kernel = kernel;
    plan.why = "asked for: " + std::to_string(kProgramSteps) + " steps of a product and a gate kernel as a CUDA graph";
    plan.against.push_back("step: step-graph is asked for");
  } else {
    plan.kernel = "step";
    plan.why = "one matrix product and one gate kernel per time step take any shape and dtype";
    plan.against.push_back("step-graph: " + (no_program.empty() ? "not measured yet, to be asked for" : no_program));
  }
  plan.units = units_per_thread(s.H, s.compute_bytes);
  plan.threads = s.B * s.H / plan.units;
  plan.blocks = (plan.threads + kBlockThreads - 1) / kBlockThreads * s.D;
  const int64_t rows = chunk_rows(s.T * s.B, s.B, s.D * cell.gates * s.H * s.compute_bytes);
  plan.chunk_steps = std::max<int64_t>(1, std::min(s.T, rows / std::max<int64_t>(s.B, 1)));
  const int64_t chunks = (s.T + plan.chunk_steps - 1) / plan.chunk_steps;
  const int64_t copies = s.D > 1 || graph ? s.D : 0;  // of weight_hh: as one batch, or where a graph reads it
  // Of a chunk: a graph and its table each time, or a product and a kernel each step.
  const auto launches_of = [&](int64_t steps) {
    const int64_t programs = graph ? (steps + kProgramSteps - kFewSteps) / kProgramSteps : 0;
    return s.D + 2 * (programs + std::max<int64_t>(0, steps - programs * kProgramSteps));
  };
  // States, biases, copies; chunks, of which the last may be shorter.
  plan.launches = 1 + s.D + copies + (chunks - 1) * launches_of(plan.chunk_steps) +
                  launches_of(s.T - (chunks - 1) * plan.chunk_steps);
  const int64_t block = gpu.register_bytes * 3 / 4, all = (block + gpu.shared_bytes * 2 / 3) * gpu.multiprocessors;
  const auto kib = [](int64_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KiB"; };
  const auto refuse = [&](const char* kernel, int64_t room, const char* where) {
    const std::string fits = weights <= room ? "would fit" : "does not fit";
    plan.against.push_back(std::string(kernel) + ": " + why_not_kernel(kernel) + " (weight_hh of " + kib(weights) +
                           " " + fits + " into the " + kib(room) + " " + where + ")");
  };
  refuse("persistent-block", block, "of one multiprocessor's registers");
  refuse("persistent-grid", all / s.D, "of all multiprocessors' registers and shared memory for a direction");
  std::string reason = why_not_kernel(kernel);
  if (kernel == "step-graph") reason = no_program;
  if (!reason.empty()) throw std::invalid_argument("fastrnn: kernel '" + kernel + "' cannot run this: " + reason);
  return plan;
}

}  // namespace fastrnn::cuda
