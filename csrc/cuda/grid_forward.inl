// The forward kernel of grid_kernels.inl, which includes this file.

template <class Cell, class Numbers, class Exchange>
struct GridForward {
  static constexpr int kThreads = kGridThreads;
  static constexpr int G = Cell::kGates;
  using T = StorageOf<Numbers>;
  using Products = GridProducts<T, G, kGridBlocks<Numbers>, CoreOf<Numbers, G>>;
  using Publish = Publisher<T, 1>;
  using CellStep = ForwardCell<Cell, T, 1, GridValue<Numbers>, int>;
  GridForwardArgs args;

  size_t shared_bytes() const { return Products::shared_bytes(args.mailbox.k_blocks); }

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    const ForwardArgs& a = args.cell;
    const Mailbox& mail = args.mailbox;
    const Steps& steps = args.steps;
    const GridPlace place(block, args, a.H);
    const int d = place.d, first = static_cast<int>(args.first), end = static_cast<int>(args.end);
    const bool reversed = a.reversed(d);
    const auto time = [&](int step) { return reversed ? static_cast<int>(steps.T) - 1 - step : step; };
    float* const memory = block.shared<float>();
    Products products(block, mail.k_blocks, block.shared<uint32_t>() + 2 * Products::kPartialFloats);
    products.load_weights(args.weights + d * args.weight_words, place.unit_block);
    const Publish publisher(block, mail, place);
    typename CellStep::Bias bias = {};
    if (place.has_unit) bias = CellStep::bias(a, {d, 0, place.j});
    Exchange exchange(block, mail, d, false);
    StepRows rows{};
    int parity = 0;
    for (int step = first - 1; step < end; ++step) {  // before the first one it publishes the states
      const int n = step - first + 1;
      if (step >= first) rows.row = steps.row(time(step)), rows.gates_row = rows.row - args.gates_begin[reversed];
      rows.count_next = steps.count(time(step + 1));
      int half = 1;  // of the block, which has the cells of a tile
      for (int tile = place.row_group; tile < mail.tiles; tile += args.row_groups) {
        half = 1 - half;
        const int first_row = tile * kBlockRows, b = first_row + place.row;
        const int live = step < first ? 0 : steps.live(time(step), first_row);
        const bool enters = live == 0 && step + 1 < end && steps.live(time(step + 1), first_row) > 0;
        if (live == 0 && !enters) continue;
        const uint32_t* const operand = mail.operand(d, n - 1, tile);
        typename Products::Operands operands = {};
        if (live > 0 && !Exchange::kWaitsFirst) products.start(operand, operands);
        const bool is_mine = place.half == half, is_active = is_mine && place.has_unit && place.row < live;
        const CellStep cell(a, rows, {d, b, place.j});
        typename CellStep::Given given{};
        T published[1];
        narrow(0.0f, published[0]);
        if (is_active)
          given = cell.fetch();  // while the operand is on its way
        else if (is_mine && place.has_unit && b < a.B)
          published[0] = at<T>(a.h)[cell.state()];  // of a row that takes part later
        float* const partials = memory + parity * Products::kPartialFloats;
        if (live > 0) {
          products.multiply(exchange, operand, n - 1, tile, step, operands, partials);
          block.sync();
          parity = 1 - parity;
        }
        typename CellStep::Result result;
        if (is_mine) {
          if (is_active) {
            float r[G][1];
            FASTRNN_UNROLL
            for (int k = 0; k < G; ++k) r[k][0] = Products::sum_of(partials, k, place.unit, place.row);
            result = cell.compute(given, bias, r);
            narrow(result.h[0], published[0]);
          }
          publisher.publish(exchange, n, tile, published, live > 0);
        }
        exchange.end_publishing(n, tile);
        if (is_active) cell.store(result);  // nobody waits for it
      }
    }
  }
};
