// The sizes of the kernels of a pass: what a block, a program, a mailbox has for a shape on a device. Pure functions,
// which ask no device. Numbers that were chosen stand here, in plan.h, and where a kernel's header says so.
#pragma once

#include <algorithm>
#include <cmath>
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
  bool together = true;                  // blocks can be launched to run at the same time
};

struct PlanShape {
  CellId cell;
  int64_t T, B, I, H, D;
  int64_t item_bytes, compute_bytes;  // of an element of Storage and of Compute
  int64_t P;                          // size of h: H, or of its projection
  bool tf32 = false;                  // products of float may be those of TF32
  bool is_backward = false;           // of the pass
  bool has_resets = false;            // csrc/scan.h
  bool has_dcells = false;
  GpuLimits gpu{};

  bool is_exact() const { return item_bytes == 4 && !tf32; }  // float without TF32
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
// blocks of 32, or of 16 of float, of which each keeps the weights of 4 in its registers (128 of 255 of LSTM; of float
// as it is 2, as its sums take more), those behind in shared memory.
constexpr int kGridUnits = 16, kGridWarps = 8;
constexpr int grid_blocks(bool exact) { return exact ? 2 : 4; }
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
// Of the operand of float as it is: two blocks of k of each warp.
constexpr int64_t kGridStageBytes = 2 * kGridWarps * 512;

// Publications of the mailbox that lie between two fences (exchange.h): of a fence of 0.2 us each of 8 has little.
// Fewer where slots are large, so that the mailbox stays below this of the L2 cache where it can. Predicted, not
// measured.
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
  plan.shared_bytes = std::max(grid_sum_bytes(G) + grid_weight_bytes(G, grid_blocks(s.is_exact()), k_blocks),
                               grid_sum_bytes(1) + grid_weight_bytes(1, grid_blocks(s.is_exact()) * G, G * k_blocks)) +
                      (s.is_exact() ? kGridStageBytes : 0);
  return plan;
}

constexpr int grid_window(int64_t bytes_of_slot) {
  int window = kMostWindow;
  while (window > kLeastWindow && 2 * window * bytes_of_slot > kMostMailboxBytes) window /= 2;
  return window;
}

}  // namespace fastrnn::cuda
