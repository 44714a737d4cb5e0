// The backward pass of scan.inl, which includes this file. Runs the steps in the opposite order; each step's product
// brings the gradient of h from the step that was run before, and the cell's backward follows on the same tile.

template <class S>
struct BackwardScratch {
  PackedShape hh, hr;
  int64_t dr_stride, dh_stride, dp_stride;
  S *packed_hh, *packed_hr;
  S *dr[2], *dh, *dc, *dp;  // panels: gradient of the recurrent pre-activations after and before a step, of h and c,
                            // and of the projected h
  S *dh0, *dc0;  // with resets: sums [slots, K, stride] over the boundaries that a row of h0 and c0 entered by
  size_t bytes;

  BackwardScratch(const ScanShape& a, const CpuPlan& plan, int gates, char* base)
      : hh{a.P, 1, gates * a.H, Vec<S>::kLanes}, hr{a.H, 1, a.P, Vec<S>::kLanes} {
    Arena arena(base);
    dr_stride = panel_stride<S>(gates * a.H), dh_stride = panel_stride<S>(a.H), dp_stride = panel_stride<S>(a.P);
    packed_hh = arena.take<S>(plan.slots * hh.size());
    packed_hr = arena.take<S>(a.projected ? plan.slots * hr.size() : 0);
    for (S*& panel : dr) panel = arena.take<S>(plan.slots * a.B * dr_stride);
    dh = arena.take<S>(plan.slots * a.B * dh_stride);
    dc = arena.take<S>(plan.slots * a.B * dh_stride);
    dp = arena.take<S>(a.projected ? plan.slots * a.B * dp_stride : 0);
    dh0 = arena.take<S>(a.resets ? plan.slots * a.K() * dp_stride : 0);
    dc0 = arena.take<S>(a.resets ? plan.slots * a.K() * dh_stride : 0);
    bytes = arena.used();
  }
};

template <class Cell, class T>
struct Backward {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn, kLanes = V::kLanes;
  static constexpr int64_t kRowsAhead = 2;  // of the row whose cell is computed, fetched into the cache

  static size_t scratch_bytes(const ScanBackwardArgs& a, const CpuPlan& plan) {
    return BackwardScratch<S>(a, plan, G, nullptr).bytes;
  }

  static int64_t pack_blocks(const ScanBackwardArgs& a, const CpuPlan& plan) {
    const BackwardScratch<S> s(a, plan, G, nullptr);
    return plan.packed ? s.hh.blocks + (a.projected ? s.hr.blocks : 0) : 0;
  }

  static int64_t unit_blocks(const ScanBackwardArgs& a) { return PackedShape(a.P, 1, G * a.H, kLanes).blocks; }

  static void pack(const ScanBackwardArgs& a, const CpuPlan& plan, char* scratch, const Share& share, int64_t block) {
    const BackwardScratch<S> s(a, plan, G, scratch);
    const int64_t d = share.d, slot = share.slot;
    if (block < s.hh.blocks)
      pack_columns<T>({a.weight_hh[d], a.P}, s.hh, block, s.packed_hh + slot * s.hh.size());
    else
      pack_columns<T>({a.weight_hr[d], a.H}, s.hr, block - s.hh.blocks, s.packed_hr + slot * s.hr.size());
  }

  static void run(const ScanBackwardArgs& args, const CpuPlan& p, char* scratch, const Share& share) {
    Backward(args, p, scratch, share).run();
  }

  const ScanBackwardArgs& a;
  const CpuPlan& plan;
  const Share& share;
  const BackwardScratch<S> s;
  const int64_t d, slot;
  const Part units;  // this thread's blocks of units, and the units (of h, in a projected pass)
  int now = 0;       // dr[now] comes from the step run before, dr[1 - now] is this step's
  RunSums<S> sums;

  Backward(const ScanBackwardArgs& args, const CpuPlan& p, char* scratch, const Share& part)
      : a(args), plan(p), share(part), s(args, p, G, scratch), d(part.d), slot(part.slot), units(s.hh, part) {}

  S* dr_row(int panel, int64_t b) const { return s.dr[panel] + (slot * a.B + b) * s.dr_stride; }
  S* dh_row(int64_t b) const { return s.dh + (slot * a.B + b) * s.dh_stride; }
  S* dc_row(int64_t b) const { return s.dc + (slot * a.B + b) * s.dh_stride; }
  S* dp_row(int64_t b) const { return s.dp + (slot * a.B + b) * s.dp_stride; }
  S* dh0_row(int64_t k) const { return s.dh0 + (slot * a.K() + k) * s.dp_stride; }
  S* dc0_row(int64_t k) const { return s.dc0 + (slot * a.K() + k) * s.dh_stride; }

  void run() {
    const int64_t b_begin = share.b_begin;
    int64_t n = b_begin;  // rows [b_begin, n) took part in the step run before
    if (a.resets) begin_sums();
    for (int64_t step = a.T - 1; step >= 0; --step) {
      const int64_t t = a.reversed(d) ? a.T - 1 - step : step;
      int64_t active = a.active(t) < share.b_end ? a.active(t) : share.b_end;
      if (active < b_begin) active = b_begin;
      if (n > active) {
        leave(active, n);
        n = active;
      }
      for (int64_t b = n; b < active; ++b) enter(b);
      if (a.resets) cut_panels(t, n);
      if (a.projected) {
        products(b_begin, n, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          if (a.resets) cut_products(t, b, rows, begin, end);
          projected_run(t, b, rows, begin, end, true);
        });
        runs(s.hh, units.begin, units.end, n, active, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          projected_run(t, b, rows, begin, end, false);
        });
        runs(s.hr, 0, s.hr.blocks, b_begin, active, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          product(dp_row(b), s.dp_stride, rows, s.packed_hr + slot * s.hr.size(), s.hr, begin, end, sums.data);
          cell_run(t, b, rows, s.hr, begin, end, true);
        });
      } else {
        products(b_begin, n, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          if (a.resets) cut_products(t, b, rows, begin, end);
          cell_run(t, b, rows, s.hh, begin, end, true);
        });
        runs(s.hh, units.begin, units.end, n, active, [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          cell_run(t, b, rows, s.hh, begin, end, false);
        });
      }
      n = active;
      now = 1 - now;
    }
    leave(b_begin, n);
    if (a.resets) end_sums();
  }

  // The row of h0 and c0 that entered row b behind step t, the step run before; -1: the state of step t did.
  int64_t entered_behind(int64_t t, int64_t b) const { return a.entering(d, a.reversed(d) ? t - 1 : t + 1, b); }

  void begin_sums() {
    for (int64_t b = share.b_begin; b < share.b_end; ++b)
      for (const int64_t k : {b, a.B + b}) {
        copy_row<S, S>(nullptr, units, dh0_row(k));
        if (Cell::kHasC) copy_row<S, S>(nullptr, cell_units(), dc0_row(k));
      }
  }
  void end_sums() {
    for (int64_t b = share.b_begin; b < share.b_end; ++b)
      for (const int64_t k : {b, a.B + b}) {
        if (a.dh0) copy_row<T, S>(dh0_row(k), units, at<T>(a.dh0, (d * a.K() + k) * a.P));
        if (a.dc0 && Cell::kHasC) copy_row<T, S>(dc0_row(k), cell_units(), at<T>(a.dc0, (d * a.K() + k) * a.H));
      }
  }

  // Before step t: what rows [b_begin, end) hold of the gradient of the state behind it, at boundaries.
  void cut_panels(int64_t t, int64_t end) {
    for (int64_t b = share.b_begin; b < end; ++b) {
      const int64_t k = entered_behind(t, b);
      if (k < 0) continue;
      if (!a.projected) move(dh_row(b), units, dh0_row(k));
      if (Cell::kHasC) move(dc_row(b), cell_units(), dc0_row(k));
    }
  }

  // The same of a run of products.
  void cut_products(int64_t t, int64_t b0, int64_t rows, int64_t begin, int64_t end) {
    const int64_t first = s.hh.first_vector(begin) * kLanes, row_sums = s.hh.columns(begin, end) * kLanes;
    Part part(std::min(first + s.hh.vectors_in(begin, end) * kLanes, a.P));
    part.first = first;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t k = entered_behind(t, b0 + i);
      if (k >= 0) move(sums.data + i * row_sums - first, part, dh0_row(k));
    }
  }

  // The units of a part, added to a sum; zeros stay.
  static void move(S* source, const Part& part, S* sum) {
    for (int64_t j = part.first; j < part.last; j += kLanes) {
      const int n = part.last - j < kLanes ? static_cast<int>(part.last - j) : kLanes;
      store(sum + j, load(sum + j, n) + load(source + j, n), n);
      store(source + j, V(S(0)), n);
    }
  }

  // sums = dr of the step run before * weight_hh, run by run
  template <class F>
  void products(int64_t first, int64_t last, F finish) {
    if (first == last) return;
    if (share.team) share.team->barrier();  // every unit of dr[now] is there, and nobody reads dr[1 - now] any more
    runs(
        s.hh, units.begin, units.end, first, last,
        [&](int64_t b, int64_t rows, int64_t begin, int64_t end) {
          if (plan.packed)
            product(dr_row(now, b), s.dr_stride, rows, s.packed_hh + slot * s.hh.size(), s.hh, begin, end, sums.data);
          else
            product_unpacked(b, rows, begin, end);
          finish(b, rows, begin, end);
        },
        now == 1);
  }

  // The same on weight_hh where it lies.
  void product_unpacked(int64_t b, int64_t rows, int64_t begin, int64_t end) {
    const int64_t first = s.hh.first_vector(begin) * kLanes, row_sums = s.hh.columns(begin, end) * kLanes;
    const int64_t columns = std::min(s.hh.vectors_in(begin, end) * kLanes, a.P - first);
    const MatrixRows<T> weight(static_cast<const T*>(a.weight_hh[d]) + first, a.P);
    alignas(64) S part[kMaxRunPairs * kPair * kLanes];
    for (int64_t i = 0; i < rows; ++i)
      sum_terms(dr_row(now, b + i), 1, weight, s.hh.K, sums.data + i * row_sums, columns, false, part);
  }

  void enter(int64_t b) {
    copy_row(at<T>(a.dh_n, (d * a.B + b) * a.P), units, a.projected ? dp_row(b) : dh_row(b));
    if (Cell::kHasC) copy_row(at<T>(a.dc_n, (d * a.B + b) * a.H), cell_units(), dc_row(b));
  }

  Part cell_units() const { return a.projected ? Part(a.H) : units; }

  // Rows [first, last) have run their first step: the gradients of their initial states.
  void leave(int64_t first, int64_t last) {
    if (a.resets) return leave_to_sums(first, last);
    for (int64_t b = first; Cell::kHasC && a.dc0 && b < last; ++b)
      copy_row<T, S>(dc_row(b), cell_units(), at<T>(a.dc0, (d * a.B + b) * a.H));
    if (a.dh0)
      products(first, last, [&](int64_t b0, int64_t rows, int64_t begin, int64_t end) {
        for_vectors(s.hh, begin, end, rows, [&](int64_t i, int64_t j, int n, V product) {
          const V direct = a.projected ? V(S(0)) : load(dh_row(b0 + i) + j, n);
          store(at<T>(a.dh0, (d * a.B + b0 + i) * a.P + j), product + direct, n);
        });
      });
  }

  void leave_to_sums(int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t k = first_entry(b);
      if (!a.projected) move(dh_row(b), units, dh0_row(k));
      if (Cell::kHasC) move(dc_row(b), cell_units(), dc0_row(k));
    }
    if (!a.dh0) return;
    products(first, last, [&](int64_t b0, int64_t rows, int64_t begin, int64_t end) {
      for_vectors(s.hh, begin, end, rows, [&](int64_t i, int64_t j, int n, V product) {
        S* sum = dh0_row(first_entry(b0 + i)) + j;
        store(sum, load(sum, n) + product, n);
      });
    });
  }

  // The row of h0 and c0 that enters the first step of row b: in reverse no boundary lies before it.
  int64_t first_entry(int64_t b) const { return a.reversed(d) ? b : a.entering(d, 0, b); }

  // Calls f(row of the run, first unit, units, sum) for every vector of a run.
  template <class F>
  FASTRNN_INLINE void for_vectors(const PackedShape& shape, int64_t begin, int64_t end, int64_t rows, F f) {
    const int64_t vectors = shape.vectors_in(begin, end), row_sums = shape.columns(begin, end) * kLanes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t j = (shape.first_vector(begin) + u) * kLanes;
        const int n = shape.units - j < kLanes ? static_cast<int>(shape.units - j) : kLanes;
        f(i, j, n, load(sums.data + i * row_sums + u * kLanes, kLanes));
      }
  }

  // The whole gradient of the projected h: from the next step (or h_n, for a row that enters) and from the output.
  void projected_run(int64_t t, int64_t b0, int64_t rows, int64_t begin, int64_t end, bool multiplied) {
    for_vectors(s.hh, begin, end, rows, [&](int64_t i, int64_t j, int n, V product) {
      const int64_t b = b0 + i, row = a.row(t, b);
      V dp = multiplied ? product : load(dp_row(b) + j, n);
      if (a.doutput) dp = dp + load(at<T>(a.doutput, (row * a.D + d) * a.P + j), n);
      store(dp_row(b) + j, dp, kLanes);
      store(at<S>(a.dprojected, (d * a.N + row) * a.P + j), dp, n);
    });
  }

  // What the cell reads and writes of a row, units [first, last): short pieces that no prefetcher foresees.
  FASTRNN_INLINE void prefetch_row(int64_t t, int64_t b, int64_t first, int64_t last) {
    const int64_t data_row = a.row(t, b), row = d * a.N + data_row;
    for (int64_t j = first; j < last; j += 64 / static_cast<int64_t>(sizeof(S))) {
      for (int k = 0; k < A; ++k) __builtin_prefetch(at<T>(a.saved, (row * A + k) * a.H + j));
      for (int k = 0; k < G; ++k) __builtin_prefetch(at<S>(a.dgates, (row * G + k) * a.H + j), 1);
      for (int k = 0; k < R; ++k) __builtin_prefetch(at<S>(a.drecurrent, (row * R + k) * a.H + j), 1);
      if (Cell::kHasC) __builtin_prefetch(at<S>(a.cells, row * a.H + j));
      if (a.doutput) __builtin_prefetch(at<T>(a.doutput, (data_row * a.D + d) * a.P + j));
      if (!Cell::kHasC) __builtin_prefetch(at<T>(a.output, (data_row * a.D + d) * a.P + j));
    }
  }

  // The cell on a run of products, or (not multiplied) on rows whose last step this is.
  void cell_run(int64_t t, int64_t b0, int64_t rows, const PackedShape& shape, int64_t begin, int64_t end,
                bool multiplied) {
    const int64_t first = shape.first_vector(begin), vectors = shape.vectors_in(begin, end);
    const int64_t row_sums = shape.columns(begin, end) * kLanes;
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kRowsAhead < rows) prefetch_row(t, b0 + i + kRowsAhead, first * kLanes, (first + vectors) * kLanes);
      const int64_t k = a.entering(d, t, b0 + i);
      const S* products = sums.data + i * row_sums;
      int64_t u = 0;
      for (; u + 1 < vectors && (first + u + 2) * kLanes <= a.H; u += 2)
        cell_units<Twin<V>>(t, b0 + i, k, (first + u) * kLanes, multiplied, products + u * kLanes);
      for (; u < vectors; ++u) cell_units<V>(t, b0 + i, k, (first + u) * kLanes, multiplied, products + u * kLanes);
    }
  }

  // The cell on one vector of units, or on two, from unit j on; k_before: the row of h0 and c0 that entered
  // the step, or -1.
  template <class W>
  FASTRNN_INLINE void cell_units(int64_t t, int64_t b, int64_t k_before, int64_t j, bool multiplied, const S* product) {
    using U = Units<W>;
    const int n = a.H - j < kLanes ? static_cast<int>(a.H - j) : kLanes;
    const auto get = [&](const auto* units) { return U::load(units, kLanes, n); };
    const auto put = [&](auto* units, W value) { U::store(units, value, kLanes, n); };
    const int64_t t_before = a.reversed(d) ? t + 1 : t - 1;
    const bool first = k_before >= 0;
    const int64_t data_row = a.row(t, b), row = d * a.N + data_row, row_before = first ? 0 : a.row(t_before, b);
    const int64_t state = (d * a.K() + k_before) * a.H + j;
    W saved[A + 1], dx[G], dr[R + 1];
    for (int k = 0; k < A; ++k) saved[k] = get(at<T>(a.saved, (row * A + k) * a.H + j));
    W h_before(S(0)), h_after(S(0)), c_before(S(0)), c_after(S(0));
    if (Cell::kHasC) {
      c_after = get(at<S>(a.cells, row * a.H + j));
      if (!first)
        c_before = get(at<S>(a.cells, (d * a.N + row_before) * a.H + j));
      else if (a.c0)
        c_before = get(at<T>(a.c0, state));
    } else {
      h_after = get(at<T>(a.output, (data_row * a.D + d) * a.H + j));
      if (!first)
        h_before = get(at<T>(a.output, (row_before * a.D + d) * a.H + j));
      else if (a.h0)
        h_before = get(at<T>(a.h0, state));
    }
    W dh = multiplied ? U::load(product, kLanes, kLanes) : W(S(0)), dc = get(dc_row(b) + j);
    if (Cell::kHasC && a.dcells) dc = dc + get(at<S>(a.dcells, row * a.H + j));
    if (!a.projected) {
      dh = dh + get(dh_row(b) + j);
      if (a.doutput) dh = dh + get(at<T>(a.doutput, (data_row * a.D + d) * a.H + j));
    }
    if constexpr (Cell::kHasC)
      if (a.projected) put(at<S>(a.unprojected, row * a.H + j), Cell::hidden(saved, c_after));
    Cell::backward(saved, h_before, c_before, h_after, c_after, dh, dc, dx, dr);
    for (int k = 0; k < G; ++k) {
      put(at<S>(a.dgates, (row * G + k) * a.H + j), dx[k]);
      put(dr_row(1 - now, b) + k * a.H + j, k < G - R ? dx[k] : dr[k - (G - R)]);
    }
    for (int k = 0; k < R; ++k) put(at<S>(a.drecurrent, (row * R + k) * a.H + j), dr[k]);
    put(dh_row(b) + j, dh);
    if (Cell::kHasC) put(dc_row(b) + j, dc);
  }
};
