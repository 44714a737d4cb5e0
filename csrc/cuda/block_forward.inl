// The forward kernel of block_kernels.inl, which includes this file.

template <class Cell, class T, int kTiles, bool kPairs>
struct BlockForward : BlockShape<kTiles> {
  using Shape = BlockShape<kTiles>;
  static constexpr int kPitch = Shape::kUnits + 8;           // of a row of h: rows begin in different banks
  static constexpr int kChains = Cell::kGates == 1 ? 2 : 1;  // sums of a gate: no product waits for the one before
  static constexpr int kBiases = Cell::kGates + Cell::kOwn;
  static constexpr size_t kBiasBytes = kBiases * Shape::kUnits * sizeof(float);
  static constexpr size_t kSharedBytes = kBiasBytes + 2 * kBlockRows * kPitch * sizeof(T);
  BlockForwardArgs args;

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    const ForwardArgs& a = args.cell;
    const Lane lane(block.thread());
    const int H = static_cast<int>(a.H);
    const int64_t d = block.group(), first_row = block.index() * kBlockRows;
    const bool reversed = a.reversed(d);
    const auto time = [&](int64_t step) { return reversed ? args.steps.T - 1 - step : step; };
    const Units<kPairs> units(lane, H);
    Range range{args.first, args.end};
    range.keep_active(args.steps, reversed, first_row);
    if (range.begin >= range.end) return;

    Weights<G, kTiles> weights;
    weights.load(lane, [&](int gate, int unit, int column) {
      const int i = units.warp_unit + unit;
      const T* const pair = at<T>(args.weight_hh) + ((d * G + gate) * H + i) * H + column;
      if (i >= H || column >= H) return uint32_t{0};
      if (kPairs) return word_at(pair);
      return word_of(pair[0], column + 1 < H ? pair[1] : zero_of<T>());
    });
    // Biases of the thread's units: shared memory, as registers are short.
    float* const bias = block.shared<float>() + units.first;
    FASTRNN_UNROLL
    for (int k = 0; k < kBiases; ++k) {
      float pair[2] = {};
      if (a.bias && lane.q == 0) units.load(at<float>(a.bias) + (d * kBiases + k) * H, pair);
      if (lane.q == 0) store<float, 2>(bias + k * Shape::kUnits, pair);
    }
    // States of two units of two rows.
    float h[2][2], c[2][2] = {};
    T* const memory = block.shared<T>() + kBiasBytes / sizeof(T);
    FASTRNN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t b = first_row + lane.column(i);
      h[i][0] = h[i][1] = 0.0f;
      if (b < a.B) {
        units.load(at<T>(a.h) + (d * a.B + b) * H, h[i]);
        if (Cell::kHasC) units.load(at<float>(a.c) + (d * a.B + b) * H, c[i]);
      }
      put(memory + lane.column(i) * kPitch + units.first, h[i]);
    }
    block.sync();

    // The input products of a step, as the fragments have them.
    const auto load_gates = [&](int64_t step, float (&x)[G][4]) {
      const int64_t t = time(step), gates_row = args.steps.row(t) - args.gates_begin[reversed] + first_row;
      const int live = args.steps.live(t, first_row);
      FASTRNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float* const gates = at<float>(a.gates) + (d * a.gates_rows + gates_row + lane.column(i)) * (G * H);
        FASTRNN_UNROLL
        for (int k = 0; k < G; ++k) {
          float pair[2] = {};
          if (lane.column(i) < live) units.load(gates + k * H, pair);
          x[k][i] = pair[0], x[k][2 + i] = pair[1];
        }
      }
    };
    float next[G][4];
    load_gates(range.begin, next);
    int live = args.steps.live(time(range.begin), first_row);
    for (int64_t step = range.begin; step < range.end; ++step) {
      const int parity = static_cast<int>((step - range.begin) & 1);
      const int64_t data_row = args.steps.row(time(step)) + first_row;
      const int live_next = step + 1 < args.steps.T ? args.steps.live(time(step + 1), first_row) : 0;
      // x + r of most gates come from one sum; of the last R gates they enter the cell by themselves.
      float sums[G][kChains][4] = {}, own[R + 1][4];
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) FASTRNN_UNROLL
      for (int i = 0; i < 4; ++i) (k < G - R ? sums[k][0] : own[k - (G - R)])[i] = next[k][i];
      // What does not wait for h comes first.
      if (step + 1 < range.end) load_gates(step + 1, next);
      const T* const before = memory + parity * kBlockRows * kPitch;
      FASTRNN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t operand[2] = {word_at(before + lane.r * kPitch + 16 * tile + 2 * lane.q),
                                     word_at(before + lane.r * kPitch + 16 * tile + 2 * lane.q + 8)};
        FASTRNN_UNROLL
        for (int k = 0; k < G; ++k) multiply<T>(block, sums[k][tile % kChains], weights.words[k][tile], operand);
      }
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) FASTRNN_UNROLL
      for (int i = 0; i < 4 && kChains == 2; ++i) sums[k][0][i] += sums[k][kChains - 1][i];
      T* const after = memory + (1 - parity) * kBlockRows * kPitch;
      FASTRNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = lane.column(i);
        const bool active = column < live, is_last = column >= live_next;
        float saved[A + 1][2];
        FASTRNN_UNROLL
        for (int j = 0; j < 2; ++j) {
          Quick xi[G], ri[G], si[A + 1], hi = h[i][j], ci = c[i][j];
          FASTRNN_UNROLL
          for (int k = 0; k < G; ++k) {
            const float of_input = bias[k * Shape::kUnits + j], sum = sums[k][0][2 * j + i];
            xi[k] = k < G - R ? sum + of_input : own[k - (G - R)][2 * j + i] + of_input;
            ri[k] = k < G - R ? 0.0f : sum + bias[(k + R) * Shape::kUnits + j];
          }
          Cell::forward(xi, ri, hi, ci, si);
          FASTRNN_UNROLL
          for (int k = 0; k < A; ++k) saved[k][j] = si[k];
          T rounded;
          narrow(hi, rounded);
          if (active && units.has(j)) h[i][j] = widen(rounded), c[i][j] = ci;
        }
        put(after + column * kPitch + units.first, h[i]);
        if (!active) continue;
        const int64_t row = data_row + column, group_row = d * a.N + row, state = (d * a.B + first_row + column) * H;
        units.store(at<T>(a.output) + (row * a.D + d) * H, h[i]);
        if (a.saved) FASTRNN_UNROLL
        for (int k = 0; k < A; ++k) units.store(at<T>(a.saved) + group_row * (A * H) + k * H, saved[k]);
        if (is_last) units.store(at<T>(a.h_n) + state, h[i]);
        if (!Cell::kHasC) continue;
        if (a.cells) units.store(at<float>(a.cells) + group_row * H, c[i]);
        if (is_last) units.store(at<T>(a.c_n) + state, c[i]);
      }
      block.sync();
      live = live_next;
    }
    FASTRNN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t b = first_row + lane.column(i);
      if (b >= a.B) continue;
      units.store(at<T>(a.h) + (d * a.B + b) * H, h[i]);
      if (Cell::kHasC) units.store(at<float>(a.c) + (d * a.B + b) * H, c[i]);
    }
  }
};
