// The backward kernel of grid_kernels.inl, which includes this file.

template <class Cell, class T, class Exchange>
struct GridBackward {
  static constexpr int kThreads = kGridThreads;
  static constexpr int G = Cell::kGates;
  using Products = GridProducts<T, 1, kGridBlocks * G>;
  GridBackwardArgs args;

  size_t shared_bytes() const { return Products::shared_bytes(args.mailbox.k_blocks); }

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    using F = Fragment<T>;
    const BackwardArgs& a = args.cell;
    const Mailbox& mail = args.mailbox;
    const Steps& steps = args.steps;
    const GridPlace place(block, args, a.H);
    const int64_t d = place.d;
    const bool reversed = a.reversed(d);
    const auto time = [&](int64_t step) { return reversed ? steps.T - 1 - step : step; };
    float* const memory = block.shared<float>();
    Products products(block, mail.k_blocks, block.shared<uint32_t>() + 2 * Products::kPartialFloats);
    // Transposed: rows are the units whose gradient it gives, k the units of one gate after the other.
    const int blocks_of_gate = static_cast<int>(mail.k_blocks) / G;
    products.load_weights([&](int, int row, int k_block, int word) {
      const int64_t j = place.unit_block * kGridUnits + row, gate = k_block / blocks_of_gate;
      const int64_t i = k_block % blocks_of_gate * F::kBlock + word * F::kPerWord;
      return word_of_column(at<T>(args.weight_hh) + ((d * G + gate) * a.H + i) * a.H + j, a.H, j < a.H ? a.H - i : 0);
    });
    Exchange exchange(block, mail, d, true);
    StepRows rows{};
    int parity = 0;
    const int64_t last = a.dh0 || a.dc0 ? -1 : 0;  // -1: the gradients of the initial states
    for (int64_t step = steps.T - 1; step >= last; --step) {
      const int64_t n = steps.T - 1 - step;
      rows.row = steps.row(time(step)), rows.count_next = steps.count(time(step + 1));
      rows.count_before = steps.count(time(step - 1));
      rows.row_before = rows.count_before > 0 ? steps.row(time(step - 1)) : 0;
      for (int64_t tile = place.row_group; tile < mail.tiles; tile += args.row_groups) {
        const int64_t first_row = tile * kBlockRows;
        const int live = steps.live(time(step), first_row), live_after = steps.live(time(step + 1), first_row);
        if (live == 0 && live_after == 0) continue;
        const bool is_mine = place.half == static_cast<int>(tile / args.row_groups % 2);
        const bool is_active = is_mine && place.has_unit && place.row < live;
        const BackwardCell<Cell, T, 1> cell{a, rows, d, first_row + place.row, place.j};
        typename BackwardCell<Cell, T, 1>::Given given{};
        if (is_active) given = cell.fetch();  // while the operand is on its way
        float* const partials = memory + parity * Products::kPartialFloats;
        if (live_after > 0) {
          products.multiply(exchange, mail.block_of(d, n - 1, tile, 0), n - 1, tile, step, partials);
          block.sync();
          parity = 1 - parity;
        }
        if (is_mine) {
          typename BackwardCell<Cell, T, 1>::Result result;
          const bool continues = place.has_unit && place.row < live_after;
          float product[1] = {0.0f};
          if (continues) product[0] = Products::sum_of(partials, 0, place.unit, place.row);
          T published[G];
          FASTRNN_UNROLL
          for (int k = 0; k < G; ++k) narrow(0.0f, published[k]);
          if (is_active) {
            result = cell.compute(given, product);
            FASTRNN_UNROLL
            for (int k = 0; k < G; ++k) narrow(result.dr(k)[0], published[k]);
          } else if (continues) {
            cell.leave(product);
          }
          if (live > 0) publish(block, exchange, mail, place, n, tile, published, live_after > 0);
          if (is_active) cell.store(given, result);
        }
        if (live > 0) exchange.end_publishing(n, tile);
      }
    }
  }
};
