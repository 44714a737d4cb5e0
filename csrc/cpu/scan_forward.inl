// The forward pass of scan.inl, which includes this file. The input products of a chunk of steps come first, so that
// weight_ih is read once for all their rows; then, step by step, each run of recurrent products and the cell on it.
// Both kinds of products lie run by run as `product` leaves them: [rows][columns][lanes].

template <class S>
struct ForwardScratch {
  PackedShape ih, hh, hr;
  int64_t x_stride, h_stride, c_stride, prepared_stride;
  S *packed_ih, *packed_hh, *packed_hr;  // [slots, size()] each
  S* bias;                               // [slots, ranges, members, vectors of units, G + R, lanes], see prepare_bias
  S *x, *gates;     // a chunk of steps: input rows [slots, members, rows, stride] and their products
  S* prepared;      // rows prepared for a product (direct.h) [slots, members, rows, stride]
  S *h[2], *c, *m;  // panels [slots, B, stride]: h before and after a step, c, o tanh(c)
  size_t bytes;

  ForwardScratch(const ScanArgs& a, const CpuPlan& plan, int G, int R, char* base)
      : ih{a.H, G, a.I, Vec<S>::kLanes}, hh{a.H, G, a.P, Vec<S>::kLanes}, hr{a.P, 1, a.H, Vec<S>::kLanes} {
    Arena arena(base);
    x_stride = panel_stride<S>(a.I), h_stride = panel_stride<S>(a.P), c_stride = panel_stride<S>(a.H);
    packed_ih = arena.take<S>(plan.packed_input ? plan.slots * ih.size() : 0);
    packed_hh = arena.take<S>(plan.packed ? plan.slots * hh.size() : 0);
    packed_hr = arena.take<S>(plan.packed && a.projected ? plan.slots * hr.size() : 0);
    prepared_stride = std::max({x_stride, h_stride, a.projected ? c_stride : 0});
    const bool prepares = a.weight_type != WeightType::kStorage || a.dtype == Dtype::kBFloat16;
    const int64_t rows = plan.slots * plan.members * plan.chunk * a.B;
    prepared = arena.take<S>(prepares && !(plan.packed_input && plan.packed) ? rows * prepared_stride : 0);
    x = arena.take<S>(rows * x_stride);
    gates = arena.take<S>(plan.slots * plan.chunk * a.B * ih.columns(0, ih.blocks) * ih.lanes);
    bias = arena.take<S>(plan.slots * plan.ranges * plan.members * bias_size(G + R));
    for (S*& panel : h) panel = arena.take<S>(plan.slots * a.B * h_stride);
    c = arena.take<S>(plan.slots * a.B * c_stride);
    m = arena.take<S>(a.projected ? plan.slots * a.B * c_stride : 0);
    bytes = arena.used();
  }

  int64_t bias_size(int64_t biases) const { return ih.vectors * biases * ih.lanes; }
};

template <class Cell, class T>
struct Forward {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr int G = Cell::kGates, A = Cell::kSaved, R = Cell::kOwn, kLanes = V::kLanes;

  static size_t scratch_bytes(const ScanArgs& a, const CpuPlan& p) {
    return ForwardScratch<S>(a, p, G, R, nullptr).bytes;
  }

  static int64_t pack_blocks(const ScanArgs& a, const CpuPlan& p) {
    const ForwardScratch<S> s(a, p, G, R, nullptr);
    return (p.packed_input ? s.ih.blocks : 0) + (p.packed ? s.hh.blocks + (a.projected ? s.hr.blocks : 0) : 0);
  }

  static int64_t unit_blocks(const ScanArgs& a) { return PackedShape(a.H, G, a.P, kLanes).blocks; }

  static void pack(const ScanArgs& a, const CpuPlan& p, char* scratch, const Share& share, int64_t block) {
    const ForwardScratch<S> s(a, p, G, R, scratch);
    const int64_t d = share.d;
    const auto pack = [&](const void* weight, const PackedShape& shape, S* packed) {
      if (block >= 0 && block < shape.blocks)
        pack_rows(static_cast<const T*>(weight), shape, block, packed + share.slot * shape.size());
      block -= shape.blocks;
    };
    if (p.packed_input) pack(a.weight_ih[d], s.ih, s.packed_ih);
    if (p.packed) pack(a.weight_hh[d], s.hh, s.packed_hh);
    if (p.packed && a.projected) pack(a.weight_hr[d], s.hr, s.packed_hr);
  }

  static void run(const ScanArgs& args, const CpuPlan& p, char* scratch, const Share& share) {
    Forward(args, p, scratch, share).run();
  }

  // A weight of this group: packed, or where it lies.
  struct Matrix {
    const PackedShape& shape;
    const S* packed;  // or null
    const void* weight;
    WeightType type;
    const float* scale;
  };

  const ScanArgs& a;
  const CpuPlan& plan;
  const Share& share;
  const ForwardScratch<S> s;
  const int64_t d, slot;
  const Part units;                        // this thread's blocks of units, and the units
  int now = 0;                             // h[now] enters the step, h[1 - now] leaves it
  int64_t chunk_begin = 0, chunk_end = 0;  // the steps whose input products are there
  int64_t chunk_row[kChunkRows];           // first row of each of them in x and gates
  const Matrix ih, hh, hr;
  RunSums<S> sums;

  Forward(const ScanArgs& args, const CpuPlan& p, char* scratch, const Share& part)
      : a(args),
        plan(p),
        share(part),
        s(args, p, G, R, scratch),
        d(part.d),
        slot(part.slot),
        units(s.hh, part),
        ih(matrix(s.ih, p.packed_input, s.packed_ih, a.weight_ih, a.weight_type, a.scale_ih)),
        hh(matrix(s.hh, p.packed, s.packed_hh, a.weight_hh, a.weight_type, a.scale_hh)),
        hr(matrix(s.hr, p.packed, s.packed_hr, a.weight_hr, WeightType::kStorage, nullptr)) {}

  T* output_row(int64_t t, int64_t b) const { return at<T>(a.output, (a.row(t, b) * a.D + d) * a.P); }
  // First row of this thread's chunk in arrays [slots, members, rows, stride].
  int64_t own_rows() const { return ((slot * plan.members + share.member) * a.B + share.b_begin) * plan.chunk; }
  S* x_row(int64_t row) const { return s.x + (own_rows() + row) * s.x_stride; }
  S* prepared_row(int64_t row) const { return s.prepared + (own_rows() + row) * s.prepared_stride; }
  // The input products of this thread's chunk for the run that begins with `block`.
  S* gates_run(int64_t block) const {
    const int64_t before = (slot * a.B + share.b_begin) * s.ih.blocks + (share.b_end - share.b_begin) * block;
    return s.gates + before * plan.chunk * s.ih.columns(0, 1) * kLanes;
  }
  S* bias_at(int64_t vector) const {
    const int64_t own = (slot * plan.ranges + share.range) * plan.members + share.member;
    return s.bias + own * s.bias_size(G + R) + vector * (G + R) * kLanes;
  }
  S* h_row(int panel, int64_t b) const { return s.h[panel] + (slot * a.B + b) * s.h_stride; }
  S* c_row(int64_t b) const { return s.c + (slot * a.B + b) * s.c_stride; }
  S* m_row(int64_t b) const { return s.m + (slot * a.B + b) * s.c_stride; }

  int64_t time_of(int64_t step) const { return a.reversed(d) ? a.T - 1 - step : step; }
  // Behind the last of this thread's rows that take part in step t.
  int64_t active_end(int64_t t) const {
    const int64_t active = a.active(t) < share.b_end ? a.active(t) : share.b_end;
    return active > share.b_begin ? active : share.b_begin;
  }

  void run() {
    prepare_bias();
    int64_t n = share.b_begin;  // rows [b_begin, n) are in the recurrence
    for (int64_t step = 0; step < a.T; ++step) {
      const int64_t t = time_of(step), active = active_end(t);
      if (step == chunk_end) input_products(step);
      for (; n < active; ++n) enter(t, n);
      for (; n > active; --n) leave(n - 1);
      if (n == share.b_begin) continue;
      if (a.resets && step > 0) pass_boundaries(t, n);
      if (share.team) share.team->barrier();  // every unit of h[now] is there, and nobody reads h[1 - now] any more
      const int64_t b_begin = share.b_begin, count = n - b_begin;
      prepare_rows(hh, h_row(now, b_begin), s.h_stride, count);
      runs(
          s.hh, units.begin, units.end, 0, count,
          [&](int64_t i, int64_t rows, int64_t begin, int64_t end) {
            multiply(hh, h_row(now, b_begin), s.h_stride, i, rows, begin, end, sums.data);
            cell_run(t, chunk_row[step - chunk_begin] + i, b_begin + i, rows, begin, end);
          },
          now == 1);
      if (a.projected) {
        prepare_rows(hr, m_row(b_begin), s.c_stride, count);
        runs(s.hr, 0, s.hr.blocks, 0, count, [&](int64_t i, int64_t rows, int64_t begin, int64_t end) {
          multiply(hr, m_row(b_begin), s.c_stride, i, rows, begin, end, sums.data);
          projection_run(t, b_begin + i, rows, begin, end);
        });
      }
      now = 1 - now;
    }
    for (; n > share.b_begin; --n) leave(n - 1);
  }

  // For every unit: the biases of the pre-activations x, b_ih and in all but the last R gates b_hh; then b_hh of the
  // last R gates, which belongs to r.
  void prepare_bias() {
    for (int64_t j = units.first; j < units.last; j += kLanes) {
      const int n = a.H - j < kLanes ? static_cast<int>(a.H - j) : kLanes;
      S* target = bias_at(j / kLanes);
      for (int k = 0; k < G; ++k) {
        const V input = bias_of(a.bias_ih, k, j, n), recurrent = bias_of(a.bias_hh, k, j, n);
        store(target + k * kLanes, k < G - R ? input + recurrent : input, kLanes);
        if (k >= G - R) store(target + (k + R) * kLanes, recurrent, kLanes);
      }
    }
  }

  V bias_of(const void* const* bias, int k, int64_t j, int n) const {
    return bias ? load(static_cast<const T*>(bias[d]) + k * a.H + j, n) : V(S(0));
  }

  // gates = W_ih x of the steps from `first` on: of plan.chunk steps, or of more where these have fewer rows.
  void input_products(int64_t first) {
    const int64_t most_rows = plan.chunk * (share.b_end - share.b_begin);
    int64_t rows = 0, step = first;
    for (; step < a.T && step - first < kChunkRows; ++step) {
      const int64_t t = time_of(step), end = active_end(t);
      if (rows + end - share.b_begin > most_rows) break;
      chunk_row[step - first] = rows;
      for (int64_t b = share.b_begin; b < end; ++b, ++rows)
        copy_row(at<T>(a.input, (a.row(t, b) * a.M + d % a.M) * a.I), Part(a.I), x_row(rows));
    }
    chunk_begin = first, chunk_end = step;
    prepare_rows(ih, x_row(0), s.x_stride, rows);
    runs(s.ih, units.begin, units.end, 0, rows, [&](int64_t row, int64_t count, int64_t begin, int64_t end) {
      multiply(ih, x_row(0), s.x_stride, row, count, begin, end,
               gates_run(begin) + row * s.ih.columns(begin, end) * kLanes);
    });
  }

  Matrix matrix(const PackedShape& shape, bool is_packed, const S* packed, const void* const* weight, WeightType type,
                const float* const* scale) const {
    return {shape, is_packed ? packed + slot * shape.size() : nullptr, weight ? weight[d] : nullptr, type,
            scale ? scale[d] : nullptr};
  }

  // Calls f(the weights of a matrix, with their type).
  template <class F>
  static void with_weight(const Matrix& m, F f) {
    if constexpr (std::is_same_v<T, float>) {
      if (m.type == WeightType::kBFloat16) return f(static_cast<const BFloat16*>(m.weight));
      if (m.type == WeightType::kInt8) return f(static_cast<const Int8*>(m.weight));
    }
    f(static_cast<const T*>(m.weight));
  }

  // Before products of these rows with a matrix.
  void prepare_rows(const Matrix& m, const S* panel, int64_t stride, int64_t rows) {
    if (m.packed) return;
    with_weight(m, [&](const auto* weight) {
      using W = std::remove_cv_t<std::remove_pointer_t<decltype(weight)>>;
      if constexpr (kPrepared<W>)
        for (int64_t i = 0; i < rows; ++i) prepare(panel + i * stride, m.shape.K, prepared_row(i), W());
    });
  }

  // target = rows [first, first + rows) of a panel times blocks [begin, end) of a matrix
  void multiply(const Matrix& m, const S* panel, int64_t stride, int64_t first, int64_t rows, int64_t begin,
                int64_t end, S* target) {
    panel += first * stride;
    if (m.packed) return product(panel, stride, rows, m.packed, m.shape, begin, end, target);
    with_weight(m, [&](const auto* weight) {
      product_direct(panel, stride, prepared_row(first), s.prepared_stride, rows, weight, m.scale, m.shape, begin, end,
                     target);
    });
  }

  void enter(int64_t t, int64_t b) {
    const int64_t source = d * a.K() + a.entering(d, t, b);
    copy_row(at<T>(a.h0, source * a.P), a.projected ? Part(a.P) : units, h_row(now, b));
    if (Cell::kHasC) copy_row(at<T>(a.c0, source * a.H), units, c_row(b));
  }

  // Before step t: the states of rows [b_begin, end) whose own do not pass its boundary.
  void pass_boundaries(int64_t t, int64_t end) {
    for (int64_t b = share.b_begin; b < end; ++b)
      if (a.entering(d, t, b) >= 0) enter(t, b);
  }

  void leave(int64_t b) {
    const Part h = a.projected ? Part(a.P) : units;
    copy_row<T, S>(h_row(now, b), h, at<T>(a.h_n, (d * a.B + b) * a.P));
    if (Cell::kHasC) copy_row<T, S>(c_row(b), units, at<T>(a.c_n, (d * a.B + b) * a.H));
  }

  // The cell on a run of recurrent products; `first_row`: the row of the chunk of the run's first row.
  void cell_run(int64_t t, int64_t first_row, int64_t b0, int64_t rows, int64_t begin, int64_t end) {
    const int64_t first = s.hh.first_vector(begin), vectors = s.hh.vectors_in(begin, end);
    const int64_t row_sums = s.hh.columns(begin, end) * kLanes;
    const S *gates = gates_run(begin) + first_row * row_sums, *recurrent = sums.data;
    for (int64_t i = 0; i < rows; ++i, gates += row_sums, recurrent += row_sums) {
      int64_t u = 0;
      for (; u + 1 < vectors && (first + u + 2) * kLanes <= a.H; u += 2)
        cell_units<Twin<V>>(t, b0 + i, first + u, gates + u * G * kLanes, recurrent + u * G * kLanes);
      for (; u < vectors; ++u) cell_units<V>(t, b0 + i, first + u, gates + u * G * kLanes, recurrent + u * G * kLanes);
    }
  }

  // The cell on one vector of units, or on two, from the `vector`-th on.
  template <class W>
  FASTRNN_INLINE void cell_units(int64_t t, int64_t b, int64_t vector, const S* gates, const S* recurrent) {
    using U = Units<W>;
    const int64_t row = d * a.N + a.row(t, b), j = vector * kLanes, bias_apart = (G + R) * kLanes;
    const int n = a.H - j < kLanes ? static_cast<int>(a.H - j) : kLanes;
    const S* bias = bias_at(vector);
    W x[G], r[G], saved[A + 1];
    for (int k = 0; k < G; ++k) {
      x[k] = U::load(gates + k * kLanes, G * kLanes, kLanes) + U::load(bias + k * kLanes, bias_apart, kLanes);
      r[k] = U::load(recurrent + k * kLanes, G * kLanes, kLanes);
    }
    for (int k = G - R; k < G; ++k) r[k] = r[k] + U::load(bias + (k + R) * kLanes, bias_apart, kLanes);
    W h = a.projected ? W(S(0)) : U::load(h_row(now, b) + j, kLanes, kLanes);
    W c = Cell::kHasC ? U::load(c_row(b) + j, kLanes, kLanes) : W(S(0));
    Cell::forward(x, r, h, c, saved);
    if (Cell::kHasC) {
      U::store(c_row(b) + j, c, kLanes, kLanes);
      if (a.cells) U::store(at<S>(a.cells, row * a.H + j), c, kLanes, n);
    }
    if (a.saved)
      for (int k = 0; k < A; ++k) U::store(at<T>(a.saved, (row * A + k) * a.H + j), saved[k], kLanes, n);
    if (a.projected)
      U::store(m_row(b) + j, h, kLanes, kLanes);
    else
      U::store(h_row(1 - now, b) + j, U::store(output_row(t, b) + j, h, kLanes, n), kLanes, kLanes);
  }

  void projection_run(int64_t t, int64_t b0, int64_t rows, int64_t begin, int64_t end) {
    const int64_t vectors = s.hr.vectors_in(begin, end), row_sums = s.hr.columns(begin, end) * kLanes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t u = 0; u < vectors; ++u) {
        const int64_t b = b0 + i, j = (s.hr.first_vector(begin) + u) * kLanes;
        const int n = a.P - j < kLanes ? static_cast<int>(a.P - j) : kLanes;
        const V h = load(sums.data + i * row_sums + u * kLanes, kLanes);
        store(h_row(1 - now, b) + j, store(output_row(t, b) + j, h, n), kLanes);
      }
  }
};
