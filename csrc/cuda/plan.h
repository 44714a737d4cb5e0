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

// What kernels of blocks need to know of the GPU that they are to run on.
struct GpuLimits {
  int major = 9, multiprocessors = 132;  // multiprocessors: those that may be used
  int64_t shared_bytes = 227 << 10;      // of a block
};

struct PlanShape {
  CellId cell;
  int64_t T, B, I, H, D;
  int64_t item_bytes, compute_bytes;  // of an element of Storage and of Compute
  int64_t P;                          // size of h: H, or of its projection
  bool tf32 = false;                  // products of float may be those of TF32
  GpuLimits gpu{};

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

// persistent-grid: a block has 16 units (the rows of a product) and a tile of 8 rows at a time; its 8 warps share k in
// blocks of 32, or of 16 of float, of which each keeps the weights of 4 in its registers (128 of 255 of LSTM), those
// behind in shared memory.
constexpr int kGridUnits = 16, kGridWarps = 8, kGridBlocks = 4;
constexpr int64_t grid_k_blocks(int64_t H, int64_t item_bytes) {
  const int64_t k = item_bytes == 4 ? 16 : 32;
  return (H + k - 1) / k;
}
// Shared memory: partial sums [2, warps, outputs, 128], then weights [warps, blocks of k, 2 products, outputs, 32, 4].
constexpr int64_t grid_weight_bytes(int64_t outputs, int64_t resident, int64_t k_blocks) {
  const int64_t most = (k_blocks + kGridWarps - 1) / kGridWarps;
  return (most > resident ? most - resident : 0) * kGridWarps * 2 * outputs * 512;
}
constexpr int64_t grid_sum_bytes(int64_t outputs) { return 2 * kGridWarps * outputs * 512; }

// Publications of the mailbox that lie between two fences (exchange.h): of a fence of 0.2 us each of 8 has little. So
// few where slots are large that the mailbox takes at most this of the L2 cache. Predicted, not measured.
constexpr int kMostWindow = 8, kLeastWindow = 2;
constexpr int64_t kMostMailboxBytes = int64_t{16} << 20;

struct GridPlan {
  int64_t unit_blocks, row_groups;  // blocks of a group: its units, times its rows
  int64_t groups;                   // at a time
  int64_t tiles;                    // of 8 rows
  int64_t shared_bytes;             // of a block, of the pass that takes more

  int64_t blocks() const { return unit_blocks * row_groups * groups; }
};

inline GridPlan grid_plan(const PlanShape& s) {
  const int64_t G = kCells[static_cast<int>(s.cell)].gates, k_blocks = grid_k_blocks(s.H, s.item_bytes);
  GridPlan plan{};
  plan.unit_blocks = (s.H + kGridUnits - 1) / kGridUnits;
  plan.tiles = (s.B + kBlockRows - 1) / kBlockRows;
  const int64_t room = std::max<int64_t>(1, s.gpu.multiprocessors / plan.unit_blocks);
  plan.groups = std::min(s.D, room);
  const int64_t most = std::max<int64_t>(1, std::min(plan.tiles, room / plan.groups));
  const int64_t each = (plan.tiles + most - 1) / most;  // tiles of a row group
  plan.row_groups = (plan.tiles + each - 1) / std::max<int64_t>(each, 1);
  plan.shared_bytes = std::max(grid_sum_bytes(G) + grid_weight_bytes(G, kGridBlocks, k_blocks),
                               grid_sum_bytes(1) + grid_weight_bytes(1, kGridBlocks * G, G * k_blocks));
  return plan;
}

constexpr int grid_window(int64_t bytes_of_slot) {
  int window = kMostWindow;
  while (window > kLeastWindow && 2 * window * bytes_of_slot > kMostMailboxBytes) window /= 2;
  return window;
}

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
    if (s.P != s.H) return "it has no projection";
    if (s.item_bytes == 8) return "its products are those of bfloat16, float16 and TF32";
    if (s.item_bytes == 4 && !s.tf32)
      return "its products of float32 are those of TF32, which torch.backends.cuda.matmul does not allow";
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

// The kernel of a pass: the one that is asked for, which can run it; of "auto" the best one that is proven on GPUs,
// with `persistent` also of those that are not yet.
inline std::string choose_kernel(const std::string& asked, bool persistent, const PlanShape& s) {
  if (asked != "auto") return asked;
  for (const char* kernel : {"persistent-block", "persistent-grid"})
    if (persistent && why_not_kernel(kernel, s).empty()) return kernel;
  return "step";
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
  plan.why += asked == plan.kernel ? "; asked for" : "";
  if (graph && s.T < kFewSteps) plan.why += "; a pass of fewer than " + std::to_string(kFewSteps) + " has none";
  for (const char* other : kKernels) {
    if (other == plan.kernel) continue;
    std::string reason = why_not_kernel(other, s);
    if (reason.empty()) reason = plan.kernel == asked ? plan.kernel + " is asked for" : "not measured yet";
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
