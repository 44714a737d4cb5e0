// The forward kernel of grid_kernels.inl, which includes this file.

template <class Cell, class T, class Exchange>
struct GridForward {
  static constexpr int kThreads = kGridThreads;
  static constexpr int G = Cell::kGates;
  using Products = GridProducts<T, G, kGridBlocks>;
  GridForwardArgs args;

  size_t shared_bytes() const { return Products::shared_bytes(args.mailbox.k_blocks); }

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    using F = Fragment<T>;
    const ForwardArgs& a = args.cell;
    const Mailbox& mail = args.mailbox;
    const Steps& steps = args.steps;
    const GridPlace place(block, args, a.H);
    const int64_t d = place.d;
    const bool reversed = a.reversed(d);
    const auto time = [&](int64_t step) { return reversed ? steps.T - 1 - step : step; };
    float* const memory = block.shared<float>();
    Products products(block, mail.k_blocks, block.shared<uint32_t>() + 2 * Products::kPartialFloats);
    products.load_weights([&](int gate, int row, int k_block, int word) {
      const int64_t i = place.unit_block * kGridUnits + row, column = k_block * F::kBlock + word * F::kPerWord;
      return word_of_column(at<T>(args.weight_hh) + ((d * G + gate) * a.H + i) * a.H + column, 1,
                            i < a.H ? a.H - column : 0);
    });
    StepRows rows{};
    typename ForwardCell<Cell, T, 1>::Bias bias = {};
    if (place.has_unit) bias = ForwardCell<Cell, T, 1>{a, rows, d, 0, place.j}.bias();
    Exchange exchange(block, mail, d, false);
    int parity = 0;
    for (int64_t step = args.first - 1; step < args.end;
         ++step) {  // the first one publishes the states before the others
      const int64_t n = step - args.first + 1;
      rows.row = steps.row(time(step)), rows.gates_row = rows.row - args.gates_begin[reversed];
      rows.count_next = steps.count(time(step + 1));
      for (int64_t tile = place.row_group; tile < mail.tiles; tile += args.row_groups) {
        const int64_t first_row = tile * kBlockRows, b = first_row + place.row;
        const int live = step < args.first ? 0 : steps.live(time(step), first_row);
        const bool enters = live == 0 && step + 1 < args.end && steps.live(time(step + 1), first_row) > 0;
        if (live == 0 && !enters) continue;
        const bool is_mine = place.half == static_cast<int>(tile / args.row_groups % 2);
        const bool is_active = is_mine && place.has_unit && place.row < live;
        const ForwardCell<Cell, T, 1> cell{a, rows, d, b, place.j};
        typename ForwardCell<Cell, T, 1>::Given given{};
        T published[1];
        narrow(0.0f, published[0]);
        if (is_active)
          given = cell.fetch();  // while the operand is on its way
        else if (is_mine && place.has_unit && b < a.B)
          published[0] = at<T>(a.h)[cell.state()];  // of a row that takes part later
        float* const partials = memory + parity * Products::kPartialFloats;
        if (live > 0) {
          products.multiply(exchange, mail.block_of(d, n - 1, tile, 0), n - 1, tile, step, partials);
          block.sync();
          parity = 1 - parity;
        }
        if (is_mine) {
          typename ForwardCell<Cell, T, 1>::Result result;
          if (is_active) {
            float r[G][1];
            FASTRNN_UNROLL
            for (int k = 0; k < G; ++k) r[k][0] = Products::sum_of(partials, k, place.unit, place.row);
            result = cell.compute(given, bias, r);
            narrow(result.h[0], published[0]);
          }
          publish(block, exchange, mail, place, n, tile, published, live > 0);
          if (is_active) cell.store(result);
        }
        exchange.end_publishing(n, tile);
      }
    }
  }
};
