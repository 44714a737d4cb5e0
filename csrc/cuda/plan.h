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
  if (name == "auto" || name == "step") return "";
  if (name == "persistent-block" || name == "persistent-grid") return "not in this version";
  return "there are auto, step, persistent-block and persistent-grid";
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
  plan.kernel = "step";
  plan.why = "one matrix product and one gate kernel per time step take any shape and dtype";
  plan.units = units_per_thread(s.H, s.compute_bytes);
  plan.threads = s.B * s.H / plan.units;
  plan.blocks = (plan.threads + kBlockThreads - 1) / kBlockThreads * s.D;
  const int64_t rows = chunk_rows(s.T * s.B, s.B, s.D * cell.gates * s.H * s.compute_bytes);
  plan.chunk_steps = std::max<int64_t>(1, std::min(s.T, rows / std::max<int64_t>(s.B, 1)));
  const int64_t chunks = (s.T + plan.chunk_steps - 1) / plan.chunk_steps;
  const int64_t copies = s.D > 1 ? s.D : 0;                   // of weight_hh, so that it stands as one batch
  plan.launches = 1 + s.D + copies + chunks * s.D + 2 * s.T;  // states, biases, copies, input products, steps
  const int64_t weights = cell.gates * s.H * s.H * s.item_bytes;
  const int64_t block = gpu.register_bytes * 3 / 4, all = (block + gpu.shared_bytes * 2 / 3) * gpu.multiprocessors;
  const auto kib = [](int64_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KiB"; };
  const auto refuse = [&](const char* kernel, int64_t room, const char* where) {
    const std::string fits = weights <= room ? "would fit" : "does not fit";
    plan.against.push_back(std::string(kernel) + ": " + why_not_kernel(kernel) + " (weight_hh of " + kib(weights) +
                           " " + fits + " into the " + kib(room) + " " + where + ")");
  };
  refuse("persistent-block", block, "of one multiprocessor's registers");
  refuse("persistent-grid", all / s.D, "of all multiprocessors' registers and shared memory for a direction");
  if (const std::string reason = why_not_kernel(kernel); !reason.empty())
    throw std::invalid_argument("fastrnn: kernel '" + kernel + "' cannot run this: " + reason);
  return plan;
}

}  // namespace fastrnn::cuda
