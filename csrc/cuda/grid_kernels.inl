// The bodies of grid_kernels.h, and the choice of their instance. Included by grid_kernels.cu for GPUs, and by the
// tests for the host.
//
// Computes   the cells of csrc/cells.h along time, of 16 hidden units of a group in a block, for the tiles of 8 rows of
//            its row group one after the other
// Work       a warp: an eighth of k, in blocks of 32 (float: 16), for which it keeps weight_hh as fragments of the
// tensor
//            cores; then a thread of the tile's half of the block: a unit of a row, from the sums of all warps to what
//            it publishes. Per step and tile 2 G products of a warp for each of its blocks of k, and one barrier
// Memory     registers: weights of 4 blocks of k (backward: 4 G), 32 G words; shared: the others, and partial sums,
// twice
//            in turns; states in the panels, each read and written by one thread
// Requires   a GPU of compute capability 8.0; T of 16 bits, or float where TF32 is allowed; no projection; all blocks
// at
//            the same time
// Order      steps wait for each other through the mailbox, tiles do not. Sums go in the order of the tensor cores,
// then
//            of the warps, the same in every call
#include "grid_kernels.h"

#include "grid_products.h"
#include "step_cell.h"

namespace fastrnn::cuda {
namespace {

// Which units and rows a block, and a thread, has.
struct GridPlace {
  int64_t d, unit_block, row_group, j;
  int half, row, unit;  // of a thread: half of the block, of the tile's rows, of the block's units
  bool has_unit;

  FASTRNN_BLOCK_FN GridPlace(const Block& block, const GridArgs& args, int64_t H)
      : d(block.group() + args.first_group),
        unit_block(block.index() % args.unit_blocks),
        row_group(block.index() / args.unit_blocks),
        half(block.thread() / kSumsOfProduct),
        row(block.thread() % kSumsOfProduct / kGridUnits),
        unit(block.thread() % kGridUnits) {
    j = unit_block * kGridUnits + unit, has_unit = j < H;
  }
};

template <class T>
FASTRNN_FN uint32_t word_of_column(const T* column, int64_t step, int64_t present) {
  T numbers[2];
  narrow(0.0f, numbers[0]), numbers[1] = numbers[0];
  FASTRNN_UNROLL
  for (int i = 0; i < Fragment<T>::kPerWord; ++i)
    if (i < present) numbers[i] = column[i * step];
  uint32_t word;
  memcpy(&word, numbers, sizeof word);
  return word;
}

// Publishes numbers of a thread's row and unit, one for each of kCount gates.
template <class T, int kCount, class Exchange>
FASTRNN_BLOCK_FN void publish(const Block& block, const Exchange& exchange, const Mailbox& mail, const GridPlace& place,
                              int64_t n, int64_t tile, const T (&numbers)[kCount], bool after_reading) {
  using F = Fragment<T>;
  const int64_t column = place.unit_block * kGridUnits + place.unit;
  const int64_t blocks_of_gate = mail.k_blocks / kCount;
  const bool writes = place.unit % F::kPerWord == 0;
  const auto target = [&](int64_t publication, int k) {
    return mail.block_of(place.d, publication, tile, k * blocks_of_gate + column / F::kBlock) +
           place.row * F::kRowWords + column % F::kBlock / F::kPerWord;
  };
  if (after_reading)
    exchange.begin_publishing(n, [&](int64_t publication, auto clear) {
      for (int k = 0; k < kCount; ++k)
        if (writes) clear(target(publication, k));
    });
  FASTRNN_UNROLL
  for (int k = 0; k < kCount; ++k) {
    uint32_t word = 0;
    memcpy(&word, &numbers[k], sizeof(T));
    if (F::kPerWord == 2) word |= block.swap(word) << 16;
    if (writes) block.store(target(n, k), Exchange::template not_reserved<T>(word));
  }
}

#include "grid_backward.inl"
#include "grid_forward.inl"

struct Prepare {
  PrepareArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const Mailbox& mail = a.mailbox;
    const int64_t words = a.D * mail.slots * mail.words_of_slot();
    if (thread.item < words) {
      const int64_t k_block = thread.item / kWordsOfBlock % mail.k_blocks % a.k_blocks_of_gate;
      const int64_t word = k_block * Fragment<float>::kRowWords + thread.item % Fragment<float>::kRowWords;
      mail.words[thread.item] = word < a.words_of_row ? kNotThere : 0;
    } else if (thread.item == words) {
      *mail.failed = 0;
    } else {
      mail.flags[thread.item - words - 1] = 0;
    }
  }
};

// Launches the instance of a kernel <Cell, T, Exchange> for these arguments.
template <template <class, class, class> class Kernel, class Args>
void launch_grid(const Args& a, Queue queue) {
  const auto run = [&](auto* cell, auto* dtype) {
    using Cell = std::remove_pointer_t<decltype(cell)>;
    using T = std::remove_pointer_t<decltype(dtype)>;
    const int64_t blocks = a.unit_blocks * a.row_groups;
    if (a.flags)
      launch_together(Kernel<Cell, T, FlagExchange>{a}, blocks, a.group_count, queue);
    else
      launch_together(Kernel<Cell, T, WordExchange>{a}, blocks, a.group_count, queue);
  };
  with_cell(a.cell.cell, [&](auto* cell) {
    if (a.cell.dtype == Dtype::kFloat)
      run(cell, static_cast<float*>(nullptr));
    else if (a.cell.dtype == Dtype::kHalf)
      run(cell, static_cast<Half*>(nullptr));
    else
      run(cell, static_cast<BFloat16*>(nullptr));
  });
}

}  // namespace

const GridKernels& grid_kernels() {
  static const GridKernels table = {
      launch_grid<GridForward, GridForwardArgs>,
      launch_grid<GridBackward, GridBackwardArgs>,
      [](const PrepareArgs& a, Queue queue) {
        const int64_t flags = a.mailbox.flags ? a.D * a.mailbox.tiles * a.mailbox.publications : 0;
        launch(Prepare{a}, a.D * a.mailbox.slots * a.mailbox.words_of_slot() + 1 + flags, 1, queue);
      },
  };
  return table;
}

}  // namespace fastrnn::cuda
