// How a pass launches the kernels of a grid: the groups that fit at a time, and the mailbox of a launch.
#pragma once

#include <algorithm>

#include "grid_products.h"
#include "scan_cuda.h"
#include "sizes.h"

namespace fastrnn::cuda {

// Throws if a kernel of a grid has given up since the last look.
inline void check_report(uint32_t* report) {
  if (!report) return;
  volatile uint32_t* const word = report;
  const uint32_t told = *word;
  if (told == 0) return;
  *word = 0;
  STD_TORCH_CHECK(
      false, "fastrnn: persistent-grid gave up on a GPU in an earlier ", told % 2 ? "backward" : "forward",
      " pass: a block waited in vain for the others in step ", told / 2 - 1,
      " (of the steps as they run), and what came after it is NaN; FASTRNN_DISABLE_PERSISTENT=1 does without");
}

class GridSetup {
 public:
  // Of a forward or a backward pass; weights: [D] Storage [G, H, H].
  GridSetup(const PlanShape& shape, const Context& context, Dtype dtype, const void* const* weights, bool is_backward)
      : s_(shape), on_(context), plan_(grid_plan(shape)), gates_(is_backward ? G() : 1) {
    PackWeightsArgs args{};
    args.dtype = dtype, args.exact = s_.is_exact(), args.is_backward = is_backward, args.G = G(),
    args.H = static_cast<int>(s_.H);
    args.k_blocks = gates_ * k_blocks_of_gate();
    args.words = weight_words_ =
        WeightPlace::words(static_cast<int>(plan_.unit_blocks), args.k_blocks, is_backward ? 1 : G());
    weights_ = on_.device.make({s_.D * args.words * 4}, ScalarType::Byte);
    for (int64_t d = 0; d < s_.D; ++d) {
      args.weight = weights[d], args.target = static_cast<uint32_t*>(weights_.mutable_data_ptr()) + d * args.words;
      on_.grid.pack(args, on_.queue);
    }
  }

  // Launches a kernel for all groups. publications: of a tile, at most.
  template <class Args>
  void launch(Args& args, int64_t publications, void (*kernel)(const Args&, Queue)) {
    prepare(publications);
    args.weights = static_cast<const uint32_t*>(weights_.const_data_ptr()), args.weight_words = weight_words_;
    args.mailbox = mailbox_, args.flags = on_.asked.flags, args.exact = s_.is_exact();
    args.unit_blocks = static_cast<int>(plan_.unit_blocks), args.row_groups = static_cast<int>(plan_.row_groups);
    for (int64_t first = 0; first < s_.D; first += plan_.groups) {
      args.first_group = static_cast<int>(first);
      args.group_count = static_cast<int>(std::min(plan_.groups, s_.D - first));
      kernel(args, on_.queue);
    }
  }

 private:
  int G() const { return kCells[static_cast<int>(s_.cell)].gates; }
  int k_blocks_of_gate() const { return static_cast<int>(grid_k_blocks(s_.H, s_.item_bytes)); }

  void prepare(int64_t publications) {
    PrepareArgs args{};
    Mailbox& mail = args.mailbox;
    args.D = static_cast<int>(s_.D), args.k_blocks_of_gate = k_blocks_of_gate();
    args.words_of_row = static_cast<int>(plan_.unit_blocks * kGridUnits * s_.item_bytes / 4);
    mail.tiles = static_cast<int>(plan_.tiles), mail.k_blocks = gates_ * args.k_blocks_of_gate;
    mail.publications = static_cast<int>(publications), mail.members = static_cast<int>(plan_.unit_blocks);
    mail.window = grid_window(s_.D * mail.words_of_slot() * 4), mail.slots = on_.asked.flags ? 2 : 2 * mail.window;
    const int64_t words = s_.D * mail.slots * mail.words_of_slot();
    const int64_t flags = on_.asked.flags ? s_.D * plan_.tiles * publications : 0;
    const int64_t bytes = (words + 1 + flags) * 4;
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = on_.device.make({bytes}, ScalarType::Byte);
    mail.words = static_cast<uint32_t*>(memory_.mutable_data_ptr());
    mail.failed = mail.words + words, mail.flags = flags > 0 ? mail.failed + 1 : nullptr,
    mail.report = on_.report(true);
    on_.grid.prepare(args, on_.queue);
    mailbox_ = mail;
  }

  const PlanShape& s_;
  const Context& on_;
  const GridPlan plan_;
  const int gates_;  // that the operand has
  int64_t weight_words_ = 0;
  Mailbox mailbox_{};
  Tensor memory_, weights_;
};

}  // namespace fastrnn::cuda
