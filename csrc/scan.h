// The contract of a pass: what `scan` and `scan_backward` compute and where every buffer lies.
// Kernels see these structs and nothing of torch.
//
// Dimension key: T time, B batch, N rows of data (T * B, or the sum of batch_sizes of packed data), I input,
// H hidden, P size of h (H, or proj_size), G gates, A saved activations, R gates with a recurrent gradient of their own
// (kOwn), D groups with weights of their own (directions, members of an ensemble).
//
// Row (t, b) of the data is row offsets[t] + b. Rows b < active(t) take part in step t; batch sizes never increase,
// so a row is active from t = 0 until its sequence ends. batch_sizes and offsets lie in host memory. A reset at row
// (t, b) is a boundary between steps t - 1 and t: no state passes it in either direction of time. Arrays are
// contiguous, row-major, owned by the caller and do not overlap. Types: `Storage` is the dtype of the tensors,
// `Compute` is float, or double for double; `Between` is Compute on the CPU and Storage on a GPU.
#pragma once

#include <cstdint>

#include "cells.h"

namespace fastrnn {

enum class Dtype : int { kFloat, kDouble, kBFloat16, kHalf };

// How weight_ih and weight_hh are stored: in the dtype of the tensors; or, beside float tensors and for inference only,
// in bfloat16, or in int8 with one float scale per row (value = scale * int8). Then they are read where they lie.
enum class WeightType : int { kStorage, kBFloat16, kInt8 };

// What enters behind a boundary: the state of the step before, a state of its own, or the initial one again.
enum Reset : uint8_t { kCarry = 0, kReset = 1, kRestart = 2 };

// Order of time of the groups. kBoth: the first half of the groups runs forward, the second half in reverse.
enum class Direction : int64_t { kForward = 0, kReverse = 1, kBoth = 2 };

struct ScanShape {
  CellId cell;
  Dtype dtype;
  bool projected;
  int64_t T, B, N, D, H, P;
  const int64_t* batch_sizes;  // [T], or null: B rows in every step
  const int64_t* offsets;      // [T + 1] first data row of each step, or null: t * B
  Direction direction;
  WeightType weight_type = WeightType::kStorage;
  const uint8_t* resets = nullptr;  // [N] a Reset for each row of data, or null; where the data lies

  // Whether the h that enters a row may be another than that of the row B before it (in reverse: behind it).
  bool has_boundaries() const { return batch_sizes || resets; }
  FASTRNN_FN int64_t active(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  FASTRNN_FN int64_t row(int64_t t, int64_t b) const { return (offsets ? offsets[t] : t * B) + b; }
  FASTRNN_FN bool reversed(int64_t d) const {
    return direction == Direction::kReverse || (direction == Direction::kBoth && 2 * d >= D);
  }

  // Rows of h0 and c0: with resets those of kReset follow the initial ones.
  FASTRNN_FN int64_t K() const { return resets ? 2 * B : B; }
  // The row of h0 and c0 whose state enters step t of row b; -1: the state of the step before does.
  FASTRNN_FN int64_t entering(int64_t d, int64_t t, int64_t b) const {
    const bool reverse = reversed(d);
    const int64_t before = reverse ? t + 1 : t - 1;
    const bool first = before < 0 || before >= T || b >= active(before);
    int reset = kCarry;
    if (resets && !(reverse && first)) reset = resets[row(reverse ? before : t, b)];
    return reset == kReset ? B + b : first || reset != kCarry ? b : -1;
  }
};

// Weights: [D] pointers, one for each group. Arrays over time have the group first, but for the output, in which the
// groups of a row lie side by side, as the next layer reads them.
struct ScanArgs : ScanShape {
  int64_t I;
  int64_t M = 1;                 // inputs side by side: group d reads the (d mod M)-th, all groups the only one
  const void* input;             // Storage [N, M, I]
  const void* const* weight_ih;  // [D] Storage (or weight_type) [G, H, I]
  const void* const* weight_hh;  // [D] Storage (or weight_type) [G, H, P]
  const float* const* scale_ih;  // [D] [G, H], kInt8 only
  const float* const* scale_hh;  // [D] [G, H], kInt8 only
  const void* const* bias_ih;    // [D] Storage [G, H] added to the input products, or null: 0
  const void* const* bias_hh;    // [D] Storage [G, H] added to the recurrent products, or null: 0
  const void* const* weight_hr;  // [D] Storage [P, H], projected only
  const void* h0;                // Storage [D, K, P], or null: 0
  const void* c0;                // Storage [D, K, H], or null: 0
  void* output;                  // Storage [N, D, P] h after each step
  void* h_n;                     // Storage [D, B, P] h after each row's last step
  void* c_n;                     // Storage [D, B, H], cells with c only
  void* cells;                   // Compute [D, N, H] c after each step, or null: not kept
  void* saved;                   // Storage [D, N, A, H] activations for backward, or null: not kept
};

// `before` is wanted where there are boundaries and the device takes no lists (device.h), so never on the CPU.
struct ScanBackwardArgs : ScanShape {
  const void* doutput;           // Storage [N, D, P], or null: 0
  const void* dh_n;              // Storage [D, B, P], or null: 0
  const void* dc_n;              // Storage [D, B, H], or null: 0
  const void* dcells;            // Compute [D, N, H], or null: 0
  const void* output;            // Storage [N, D, P], with the next two as left by the forward pass
  const void* cells;             // Compute [D, N, H]
  const void* saved;             // Storage [D, N, A, H]
  const void* const* weight_hh;  // [D] Storage [G, H, P]
  const void* const* weight_hr;  // [D] Storage [P, H], projected only
  const void* h0;                // Storage [D, K, P], or null: 0
  const void* c0;                // Storage [D, K, H], or null: 0
  void* dgates;                  // Between [D, N, G, H] gradient of the input products
  void* drecurrent;              // Between [D, N, R, H] gradient of the recurrent products of the last R gates
  void* dprojected;              // Between [D, N, P] whole gradient of h after each step, projected only
  void* unprojected;             // Between [D, N, H] o tanh(c) of each step, projected only
  void* before;                  // Storage [D, N, P] h that entered each step, or null: not wanted
  void* dh0;                     // Storage [D, K, P], or null: not wanted
  void* dc0;                     // Storage [D, K, H], or null: not wanted
};

}  // namespace fastrnn
