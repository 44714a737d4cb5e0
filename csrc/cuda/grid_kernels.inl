// The bodies of grid_kernels.h, and the choice of their instance. Included by grid_kernels.cu for GPUs, and by the
// tests for the host.
//
// Computes   the cells of csrc/cells.h along time, of 16 hidden units of a group in a block, for the tiles of 8 rows of
//            its row group one after the other
// Work       a warp: an eighth of k, in blocks of 32 (of float 16), whose weights it keeps; then a thread of the tile's
//            half of the block: a unit of a row, from the sums of all warps to what it publishes. Per step and tile one
//            barrier, with flags two
// Memory     registers: weights of 4 blocks of k of each gate, of float as it is of 2 (sizes.h); shared: partial sums,
//            twice in turns, operands of float as it is, and the weights behind; states in the panels, each read and
//            written by one thread; the mailbox in L2
// Requires   a GPU of compute capability 8.0; T of 16 bits or float; no projection; all blocks at the same time
// Order      steps wait for each other through the mailbox, tiles do not. Sums go in the order of the tensor cores, of
//            float as it is of k, then of the warps: the same in every call
#include "grid_kernels.h"

#include "grid_products.h"
#include "step_cell.h"

namespace fastrnn::cuda {
namespace {

// What multiplies numbers of T. Exact: float as it is.
struct Exact {};
template <class T, int kOutputs>
using CoreOf = std::conditional_t<std::is_same_v<T, Exact>, ExactCore<kOutputs>, TensorCore<T, kOutputs>>;
template <class T>
using StorageOf = std::conditional_t<std::is_same_v<T, Exact>, float, T>;
template <class T>
constexpr int kGridBlocks = grid_blocks(std::is_same_v<T, Exact>);  // of k, of a warp and a gate, in registers
// TF32 has no more bits than numbers of 16.
template <class T>
using GridValue = std::conditional_t<std::is_same_v<T, Exact>, float, Quick>;

// Which units and rows a block, and a thread, has.
struct GridPlace {
  int d, unit_block, row_group;
  int half, row, unit, j;  // of a thread: half of the block; of the tile's rows, of the block's units; hidden unit
  bool has_unit;

  FASTRNN_BLOCK_FN GridPlace(const Block& block, const GridArgs& args, int64_t H)
      : d(static_cast<int>(block.group()) + args.first_group),
        unit_block(static_cast<int>(block.index()) % args.unit_blocks),
        row_group(static_cast<int>(block.index()) / args.unit_blocks),
        half(block.thread() / kSumsOfProduct),
        row(block.thread() % kSumsOfProduct / kGridUnits),
        unit(block.thread() % kGridUnits),
        j(unit_block * kGridUnits + unit),
        has_unit(j < H) {}
};

// Publishes numbers of a thread's unit and row, one for each of kCount gates. Pairs of threads make a word of 16 bits.
template <class T, int kCount>
class Publisher {
 public:
  using F = Fragment<T>;

  FASTRNN_BLOCK_FN Publisher(const Block& block, const Mailbox& mail, const GridPlace& place)
      : block_(block),
        mail_(mail),
        d_(place.d),
        first_(place.j / F::kBlock * kWordsOfBlock + place.row * F::kRowWords + place.j % F::kBlock / F::kPerWord),
        gate_(mail.k_blocks / kCount * kWordsOfBlock),
        writes_(place.j % F::kPerWord == 0) {}

  // after_reading: of publication n - 1, by this block.
  template <class Exchange>
  FASTRNN_BLOCK_FN void publish(const Exchange& exchange, int n, int tile, const T (&numbers)[kCount],
                                bool after_reading) const {
    if (after_reading)
      exchange.begin_publishing(n, [&](int publication, auto clear) {
        for (int k = 0; k < kCount; ++k)
          if (writes_) clear(mail_.operand(d_, publication, tile) + first_ + k * gate_);
      });
    uint32_t* const target = mail_.operand(d_, n, tile) + first_;
    FASTRNN_UNROLL
    for (int k = 0; k < kCount; ++k) {
      uint32_t word = 0;
      memcpy(&word, &numbers[k], sizeof(T));
      if (F::kPerWord == 2) word |= block_.swap(word) << 16;
      if (writes_) block_.store(target + k * gate_, Exchange::template not_reserved<T>(word));
    }
  }

 private:
  const Block& block_;
  const Mailbox& mail_;
  const int d_, first_, gate_;  // places of the thread's word of the first gate, of the gates
  const bool writes_;
};

#include "grid_backward.inl"
#include "grid_forward.inl"

struct Prepare {
  PrepareArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    const Mailbox& mail = a.mailbox;
    const int64_t words = int64_t{a.D} * mail.slots * mail.words_of_slot();
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

template <class Numbers>
struct PackWeights {
  using T = StorageOf<Numbers>;
  using Core = CoreOf<Numbers, 1>;
  PackWeightsArgs a;

  FASTRNN_FN void operator()(Thread thread) const {
    using F = Fragment<T>;
    const WeightPlace place(thread.item, a.k_blocks, a.is_backward ? 1 : a.G);
    const int blocks_of_gate = a.is_backward ? a.k_blocks / a.G : a.k_blocks;
    const int gate = a.is_backward ? place.k_block / blocks_of_gate : place.output;
    const int row = place.unit_block * kGridUnits + Core::weight_row(place.thread, place.half, place.i);
    const int k =
        place.k_block % blocks_of_gate * F::kBlock + Core::weight_word(place.thread, place.half, place.i) * F::kPerWord;
    T numbers[2];
    narrow(0.0f, numbers[0]), numbers[1] = numbers[0];
    FASTRNN_UNROLL
    for (int i = 0; i < F::kPerWord; ++i) {
      if (row >= a.H || k + i >= a.H || place.k_block >= a.k_blocks) continue;
      const int unit = a.is_backward ? k + i : row, column = a.is_backward ? row : k + i;
      numbers[i] = at<T>(a.weight)[(int64_t{gate} * a.H + unit) * a.H + column];
    }
    uint32_t word;
    memcpy(&word, numbers, sizeof word);
    a.target[thread.item] = Core::weight(word);
  }
};

// Calls f(a null pointer to the type) for the numbers that grids have.
template <class F>
void with_numbers(Dtype dtype, bool exact, F f) {
  if (dtype == Dtype::kFloat && exact)
    f(static_cast<Exact*>(nullptr));
  else if (dtype == Dtype::kFloat)
    f(static_cast<float*>(nullptr));
  else if (dtype == Dtype::kHalf)
    f(static_cast<Half*>(nullptr));
  else if (dtype == Dtype::kBFloat16)
    f(static_cast<BFloat16*>(nullptr));
  else
    throw std::runtime_error("fastrnn: kernels of grids have no float64");
}

// Launches the instance of a kernel <Cell, T, Exchange> for these arguments.
template <template <class, class, class> class Kernel, class Args>
void launch_grid(const Args& a, Queue queue) {
  with_cell(a.cell.cell, [&](auto* cell) {
    with_numbers(a.cell.dtype, a.exact, [&](auto* dtype) {
      using Cell = std::remove_pointer_t<decltype(cell)>;
      using T = std::remove_pointer_t<decltype(dtype)>;
      const int64_t blocks = int64_t{a.unit_blocks} * a.row_groups;
      if (a.flags)
        launch_together(Kernel<Cell, T, FlagExchange>{a}, blocks, a.group_count, queue);
      else
        launch_together(Kernel<Cell, T, WordExchange>{a}, blocks, a.group_count, queue);
    });
  });
}

}  // namespace

const GridKernels& grid_kernels() {
  static const GridKernels table = {
      launch_grid<GridForward, GridForwardArgs>,
      launch_grid<GridBackward, GridBackwardArgs>,
      [](const PrepareArgs& a, Queue queue) {
        const int64_t flags = a.mailbox.flags ? int64_t{a.D} * a.mailbox.tiles * a.mailbox.publications : 0;
        launch(Prepare{a}, int64_t{a.D} * a.mailbox.slots * a.mailbox.words_of_slot() + 1 + flags, 1, queue);
      },
      [](const PackWeightsArgs& a, Queue queue) {
        with_numbers(a.dtype, a.exact, [&](auto* dtype) {
          launch(PackWeights<std::remove_pointer_t<decltype(dtype)>>{a}, a.words, 1, queue);
        });
      },
  };
  return table;
}

}  // namespace fastrnn::cuda
