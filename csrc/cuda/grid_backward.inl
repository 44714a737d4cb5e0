// The backward kernel of grid_kernels.inl, which includes this file.

template <class Cell, class Numbers, class Exchange>
struct GridBackward {
  static constexpr int kThreads = kGridThreads;
  static constexpr int G = Cell::kGates;
  using T = StorageOf<Numbers>;
  using Products = GridProducts<T, 1, kGridBlocks<Numbers> * G, CoreOf<Numbers, 1>>;
  using Publish = Publisher<T, G>;
  using CellStep = BackwardCell<Cell, T, 1, GridValue<Numbers>, int>;
  GridBackwardArgs args;

  size_t shared_bytes() const { return Products::shared_bytes(args.mailbox.k_blocks); }

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    const BackwardArgs& a = args.cell;
    const Mailbox& mail = args.mailbox;
    const Steps& steps = args.steps;
    const GridPlace place(block, args, a.H);
    const int d = place.d, end = static_cast<int>(steps.T);
    const bool reversed = a.reversed(d);
    const auto time = [&](int step) { return reversed ? end - 1 - step : step; };
    float* const memory = block.shared<float>();
    Products products(block, mail.k_blocks, block.shared<uint32_t>() + 2 * Products::kPartialFloats);
    products.load_weights(args.weights + d * args.weight_words, place.unit_block);
    const Publish publisher(block, mail, place);
    Exchange exchange(block, mail, d, true);
    StepRows rows{};
    int parity = 0;
    const int last = a.dh0 || a.dc0 ? -1 : 0;  // -1: the gradients of the initial states
    for (int step = end - 1; step >= last; --step) {
      const int n = end - 1 - step;
      rows.row = step >= 0 ? steps.row(time(step)) : 0, rows.count_next = steps.count(time(step + 1));
      rows.count_before = steps.count(time(step - 1));
      rows.row_before = rows.count_before > 0 ? steps.row(time(step - 1)) : 0;
      int half = 1;  // of the block, which has the cells of a tile
      for (int tile = place.row_group; tile < mail.tiles; tile += args.row_groups) {
        half = 1 - half;
        const int first_row = tile * kBlockRows;
        const int live = steps.live(time(step), first_row), live_after = steps.live(time(step + 1), first_row);
        if (live == 0 && live_after == 0) continue;
        const uint32_t* const operand = mail.operand(d, n - 1, tile);
        typename Products::Operands operands = {};
        if (live_after > 0 && !Exchange::kWaitsFirst) products.start(operand, operands);
        const bool is_mine = place.half == half, is_active = is_mine && place.has_unit && place.row < live;
        const CellStep cell(a, rows, {d, first_row + place.row, place.j});
        typename CellStep::Given given{};
        if (is_active) given = cell.fetch();  // while the operand is on its way
        float* const partials = memory + parity * Products::kPartialFloats;
        if (live_after > 0) {
          products.multiply(exchange, operand, n - 1, tile, step, operands, partials);
          block.sync();
          parity = 1 - parity;
        }
        typename CellStep::Result result;
        if (is_mine) {
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
          if (live > 0) publisher.publish(exchange, n, tile, published, live_after > 0);
          if (is_active) cell.store(given, result);  // before flags are counted in: registers are short
        }
        if (live > 0) exchange.end_publishing(n, tile);
      }
    }
  }
};
