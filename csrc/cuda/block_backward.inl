// The backward kernel of block_kernels.inl, which includes this file.

template <class Cell, class T, int kTiles, bool kPairs>
struct BlockBackward : BlockShape<kTiles> {
  using Shape = BlockShape<kTiles>;
  static constexpr int kPitch = Cell::kGates * Shape::kUnits + 8;
  static constexpr size_t kSharedBytes = 2 * kBlockRows * kPitch * sizeof(T);
  BlockBackwardArgs args;

  FASTRNN_BLOCK_FN void operator()(const Block& block) const {
    constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn;
    constexpr bool kHasC = Cell::kHasC;
    const BackwardArgs& a = args.cell;
    const Lane lane(block.thread());
    const int H = static_cast<int>(a.H);
    const int64_t d = block.group(), first_row = block.index() * kBlockRows;
    const bool reversed = a.reversed(d);
    const auto time = [&](int64_t step) { return reversed ? args.steps.T - 1 - step : step; };
    const Units<kPairs> units(lane, H);
    Range range{0, args.steps.T};
    range.keep_active(args.steps, reversed, first_row);
    if (range.begin >= range.end) return;

    // Transposed: rows are the units whose gradient it gives, columns the gates.
    Weights<G, kTiles> weights;
    weights.load(lane, [&](int gate, int unit, int column) {
      const int j = units.warp_unit + unit;
      const T* const first = at<T>(args.weight_hh) + ((d * G + gate) * H + column) * H + j;
      if (j >= H || column >= H) return uint32_t{0};
      return word_of(first[0], column + 1 < H ? first[H] : zero_of<T>());
    });

    const auto live_in = [&](int64_t step) {
      return step < 0 || step >= args.steps.T ? 0 : args.steps.live(time(step), first_row);
    };
    // What a step reads and does not wait for: fetched while the step before it runs.
    struct Given {
      Two<T> saved[A + 1], h_before, h_after, doutput;
      float c_before[2];
    };
    const auto fetch = [&](int64_t step, Given(&given)[2]) {
      const int live = live_in(step), live_before = live_in(step - 1);
      const int64_t data_row = args.steps.row(time(step)) + first_row;
      const int64_t data_row_before = live_before > 0 ? args.steps.row(time(step - 1)) + first_row : 0;
      FASTRNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        Given& g = given[i];
        g = {};
        const int column = lane.column(i);
        if (column >= live) continue;
        const int64_t row = data_row + column, row_before = data_row_before + column;
        FASTRNN_UNROLL
        for (int k = 0; k < A; ++k) g.saved[k] = units.fetch(at<T>(a.saved) + (d * a.N + row) * (A * H) + k * H);
        if (!kHasC) g.h_after = units.fetch(at<T>(a.output) + (row * a.D + d) * H);
        if (a.doutput) g.doutput = units.fetch(at<T>(a.doutput) + (row * a.D + d) * H);
        if (column >= live_before) continue;  // the initial states: when the step runs
        if (kHasC) units.load(at<float>(a.cells) + (d * a.N + row_before) * H, g.c_before);
        if (!kHasC || a.before) g.h_before = units.fetch(at<T>(a.output) + (row_before * a.D + d) * H);
      }
    };

    // Of two units of two rows: the gradients of the states after a step that come from the step run before.
    float dh[2][2] = {}, dc[2][2] = {};
    float c_after[2][2] = {};  // the c before the step run before
    T* const memory = block.shared<T>();
    int live_after = live_in(range.end), live = live_in(range.end - 1);
    Given given[2];
    fetch(range.end - 1, given);
    for (int64_t step = range.end - 1; step >= range.begin; --step) {
      T* const dr = memory + static_cast<int>((step - range.begin) & 1) * kBlockRows * kPitch;
      const int64_t data_row = args.steps.row(time(step)) + first_row;
      const int live_before = live_in(step - 1);
      FASTRNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = lane.column(i);
        const int64_t state = (d * a.B + first_row + column) * H;
        const bool continues = column < live_after;  // took part in the step run before
        float dx[G][2] = {}, own[R + 1][2] = {};
        if (column < live) {
          const int64_t row = data_row + column, group_row = d * a.N + row;
          Given& g = given[i];
          if (column >= live_before) {
            if (kHasC && a.c0) units.load(at<T>(a.c0) + state, g.c_before);
            if ((!kHasC || a.before) && a.h0) g.h_before = units.fetch(at<T>(a.h0) + state);
          }
          if (a.before) units.put_back(at<T>(a.before) + group_row * H, g.h_before);
          if (!continues) {
            if (kHasC) units.load(at<float>(a.cells) + group_row * H, c_after[i]);
            dh[i][0] = dh[i][1] = dc[i][0] = dc[i][1] = 0.0f;
            if (a.dh_n) units.load(at<T>(a.dh_n) + state, dh[i]);
            if (kHasC && a.dc_n) units.load(at<T>(a.dc_n) + state, dc[i]);
          }
          FASTRNN_UNROLL
          for (int j = 0; j < 2; ++j) {
            Quick si[A + 1], xi[G], ri[R + 1], dh_all = dh[i][j] + g.doutput[j], dc_all = dc[i][j];
            FASTRNN_UNROLL
            for (int k = 0; k < A; ++k) si[k] = g.saved[k][j];
            Cell::backward(si, Quick(g.h_before[j]), Quick(g.c_before[j]), Quick(g.h_after[j]), Quick(c_after[i][j]),
                           dh_all, dc_all, xi, ri);
            dh[i][j] = dh_all, dc[i][j] = dc_all;
            if (!units.has(j)) continue;  // no gradient: the numbers of units that are not there
            FASTRNN_UNROLL
            for (int k = 0; k < G; ++k) dx[k][j] = xi[k];
            FASTRNN_UNROLL
            for (int k = 0; k < R; ++k) own[k][j] = ri[k];
          }
          FASTRNN_UNROLL
          for (int k = 0; k < G; ++k) units.store(at<T>(a.dgates) + group_row * (G * H) + k * H, dx[k]);
          FASTRNN_UNROLL
          for (int k = 0; k < R; ++k) units.store(at<T>(a.drecurrent) + group_row * (R * H) + k * H, own[k]);
          c_after[i][0] = g.c_before[0], c_after[i][1] = g.c_before[1];
        } else if (continues) {
          leave(units, state, dh[i], dc[i]);
        }
        FASTRNN_UNROLL
        for (int k = 0; k < G; ++k)
          put(dr + column * kPitch + k * Shape::kUnits + units.first, k < G - R ? dx[k] : own[k - (G - R)]);
      }
      live_after = live;
      if (step > range.begin) {
        live = live_in(step - 1);
        fetch(step - 1, given);
      }
      block.sync();
      float sums[2][4] = {};  // two chains: neither waits for the product before
      FASTRNN_UNROLL
      for (int k = 0; k < G; ++k) FASTRNN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const T* const at_tile = dr + lane.r * kPitch + k * Shape::kUnits + 16 * tile + 2 * lane.q;
        const uint32_t operand[2] = {word_at(at_tile), word_at(at_tile + 8)};
        multiply<T>(block, sums[tile % 2], weights.words[k][tile], operand);
      }
      FASTRNN_UNROLL
      for (int i = 0; i < 2; ++i) FASTRNN_UNROLL
      for (int j = 0; j < 2; ++j) dh[i][j] += sums[0][2 * j + i] + sums[1][2 * j + i];
    }
    FASTRNN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = lane.column(i);
      if (column < live_after) leave(units, (d * a.B + first_row + column) * H, dh[i], dc[i]);
    }
  }

  // The gradients of the initial states of a row that has run its first step.
  FASTRNN_FN void leave(const Units<kPairs>& units, int64_t state, const float (&dh)[2], const float (&dc)[2]) const {
    if (args.cell.dh0) units.store(at<T>(args.cell.dh0) + state, dh);
    if (Cell::kHasC && args.cell.dc0) units.store(at<T>(args.cell.dc0) + state, dc);
  }
};
