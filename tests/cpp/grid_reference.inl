// The recurrences of GridProblem in float64, included by grid_problem.h: rows of a batch have nothing to do with each
// other, so each runs on its own.
namespace fastrnn::cuda {
namespace {

// The largest difference; NaN where there should be none counts as infinity.
struct LargestError {
  double error = 0;
  void operator()(double got, double want) {
    const double difference = std::abs(got - want) / (1 + std::abs(want));
    if (!(difference <= error)) error = difference == difference ? difference : INFINITY;
  }
};
template <class T>
double rounded(double v) {
  T number;
  narrow(static_cast<float>(v), number);
  return widen(number);
}

template <class Cell, class Kind>
double GridProblem<Cell, Kind>::forward_error() const {
  LargestError error;
  const auto H = static_cast<size_t>(s.H);
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t b = 0; b < s.B; ++b) {
      std::vector<double> h(H), c(H), next(H);
      for (size_t j = 0; j < H; ++j) h[j] = widen(h0[at_state(d, b, 0) + j]), c[j] = widen(c0[at_state(d, b, 0) + j]);
      for (int64_t step = 0; step < s.T; ++step) {
        const int64_t t = time(d, step);
        if (b >= count(t)) continue;
        for (size_t j = 0; j < H; ++j) {
          double xs[G], rs[G], kept[A + 1];
          for (int k = 0; k < G; ++k) {
            const float* const biases = bias.data() + static_cast<size_t>(d * (G + R)) * H + j;
            const T* const row = weight.data() + (static_cast<size_t>(d * G + k) * H + j) * H;
            xs[k] = double(x[at_row(d, t, b, G, k, 0) + j]) + double(biases[static_cast<size_t>(k) * H]);
            rs[k] = k < G - R ? 0 : double(biases[static_cast<size_t>(k + R) * H]);
            for (size_t i = 0; i < H; ++i) rs[k] += double(widen(row[i])) * h[i];
          }
          double hj = h[j], cj = c[j];
          Cell::forward(xs, rs, hj, cj, kept);
          next[j] = rounded<T>(hj), c[j] = cj;
          for (int k = 0; k < A; ++k) error(widen(saved[at_row(d, t, b, A, k, 0) + j]), kept[k]);
          if (Cell::kHasC) error(cells[at_row(d, t, b, 1, 0, 0) + j], cj);
          error(widen(output[at_output(d, t, b, 0) + j]), hj);
        }
        h = next;
      }
      for (size_t j = 0; j < H; ++j) {
        error(widen(h_n[at_state(d, b, 0) + j]), h[j]);
        if (Cell::kHasC) error(widen(c_n[at_state(d, b, 0) + j]), c[j]);
      }
    }
  return error.error;
}

template <class Cell, class Kind>
double GridProblem<Cell, Kind>::backward_error() const {
  LargestError error;
  const auto H = static_cast<size_t>(s.H);
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t b = 0; b < s.B; ++b) {
      std::vector<double> dh(H), dc(H), dr(static_cast<size_t>(G) * H);
      const size_t state = at_state(d, b, 0);
      for (size_t j = 0; j < H; ++j) dh[j] = widen(dh_n[state + j]), dc[j] = Cell::kHasC ? widen(dc_n[state + j]) : 0;
      for (int64_t step = s.T - 1; step >= 0; --step) {
        const int64_t t = time(d, step), t_before = time(d, step - 1);
        if (b >= count(t)) continue;
        const bool is_first = b >= count(t_before);
        for (size_t j = 0; j < H; ++j) {
          double kept[A + 1], xs[G], rs[R + 1];
          for (int k = 0; k < A; ++k) kept[k] = widen(saved[at_row(d, t, b, A, k, 0) + j]);
          const double h_before = widen(is_first ? h0[state + j] : output[at_output(d, t_before, b, 0) + j]);
          const double h_after = widen(output[at_output(d, t, b, 0) + j]);
          double c_before = 0, c_after = 0;
          if (Cell::kHasC) {
            c_before = is_first ? widen(c0[state + j]) : cells[at_row(d, t_before, b, 1, 0, 0) + j];
            c_after = cells[at_row(d, t, b, 1, 0, 0) + j];
          }
          dh[j] += widen(doutput[at_output(d, t, b, 0) + j]);
          Cell::backward(kept, h_before, c_before, h_after, c_after, dh[j], dc[j], xs, rs);
          for (int k = 0; k < G; ++k) {
            error(widen(dgates[at_row(d, t, b, G, k, 0) + j]), xs[k]);
            dr[static_cast<size_t>(k) * H + j] = rounded<T>(k < G - R ? xs[k] : rs[k - (G - R)]);
          }
          for (int k = 0; k < R; ++k) error(widen(drecurrent[at_row(d, t, b, R, k, 0) + j]), rs[k]);
          if (s.packed) error(widen(before[at_row(d, t, b, 1, 0, 0) + j]), h_before);
        }
        for (size_t j = 0; j < H; ++j)
          for (size_t i = 0; i < static_cast<size_t>(G) * H; ++i)
            dh[j] += dr[i] * double(widen(weight[(static_cast<size_t>(d * G) * H + i) * H + j]));
      }
      for (size_t j = 0; wants_initial && j < H; ++j) {
        error(widen(dh0[state + j]), dh[j]);
        if (Cell::kHasC) error(widen(dc0[state + j]), dc[j]);
      }
    }
  return error.error;
}

}  // namespace
}  // namespace fastrnn::cuda
