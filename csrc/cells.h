// Every recurrent cell, forward and backward, once, for host and device: arithmetic only, no memory.
//
// A step receives, for one hidden unit (or a vector of units) of one row:
//   x[G]      input pre-activations  W_ih x_t + b_ih (+ b_hh where the cell adds it there)
//   r[G]      recurrent products     W_hh h_{t-1}    (+ b_hh of the last kOwn gates, whose r enters on its own)
//   h, c      state that enters the step; overwritten with the state that leaves it
// and leaves in saved[A] what the backward step needs beside the states.
//
// A backward step receives saved[A], the states before and after the step and the gradients dh, dc of the states
// after it. It writes dx[G], the gradient of the pre-activations x; dr[kOwn], the gradient of r for the last kOwn
// gates (the gradient of every other r[k] equals dx[k]); and replaces dh, dc by the part of the gradients of the
// states before the step that does not pass through the recurrent product.
//
// Formulas: torch.nn.RNN, LSTM and GRU (gate orders i f g o and r z n).
#pragma once

#include "math.h"

namespace fastrnn {

// h' = act(x + r)
template <bool kRelu>
struct RnnCell {
  static constexpr int kGates = 1, kSaved = 0, kOwn = 0;
  static constexpr bool kHasC = false;

  template <class V>
  static FASTRNN_FN void forward(const V* x, const V* r, V& h, V&, V*) {
    const V a = x[0] + r[0];
    h = kRelu ? relu(a) : tanh(a);
  }

  template <class V>
  static FASTRNN_FN void backward(const V*, V, V, V h, V, V& dh, V&, V* dx, V*) {
    const V zero = V(0.0);
    if (kRelu) {
      dx[0] = select(h <= zero, zero, dh);  // da = dh [h > 0]
    } else {
      dx[0] = dh * fma(zero - h, h, V(1.0));  // da = dh (1 - h^2)
    }
    dh = zero;
  }
};

// i, f, o = sigmoid(x + r), g = tanh(x + r), c' = f c + i g, h' = o tanh(c')
struct LstmCell {
  static constexpr int kGates = 4, kSaved = 4, kOwn = 0;
  static constexpr bool kHasC = true;

  template <class V>
  static FASTRNN_FN void forward(const V* x, const V* r, V& h, V& c, V* saved) {
    const V i = sigmoid(x[0] + r[0]);
    const V f = sigmoid(x[1] + r[1]);
    const V g = tanh(x[2] + r[2]);
    const V o = sigmoid(x[3] + r[3]);
    c = fma(f, c, i * g);
    h = o * tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  static FASTRNN_FN void backward(const V* saved, V, V c_before, V, V c_after, V& dh, V& dc, V* dx, V*) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one = V(1.0);
    const V tanh_c = tanh(c_after);
    const V dc_all = fma(dh * o, one - tanh_c * tanh_c, dc);  // dc' += dh o (1 - tanh^2 c')
    dx[0] = dc_all * g * i * (one - i);                       // di = dc' g, through sigmoid' = i (1 - i)
    dx[1] = dc_all * c_before * f * (one - f);                // df = dc' c, through sigmoid'
    dx[2] = dc_all * i * (one - g * g);                       // dg = dc' i, through tanh' = 1 - g^2
    dx[3] = dh * tanh_c * o * (one - o);                      // do = dh tanh(c'), through sigmoid'
    dc = dc_all * f;
    dh = V(0.0);
  }

  // o tanh(c'), the h' of a step from what it saved: LSTM with projection needs it for the gradient of W_hr.
  template <class V>
  static FASTRNN_FN V hidden(const V* saved, V c_after) {
    return saved[3] * tanh(c_after);
  }
};

// r, z = sigmoid(x + r), n = tanh(x_n + r * r_n), h' = (1 - z) n + z h
struct GruCell {
  static constexpr int kGates = 3, kSaved = 4, kOwn = 1;
  static constexpr bool kHasC = false;

  template <class V>
  static FASTRNN_FN void forward(const V* x, const V* r, V& h, V&, V* saved) {
    const V reset = sigmoid(x[0] + r[0]);
    const V z = sigmoid(x[1] + r[1]);
    const V n = tanh(fma(reset, r[2], x[2]));
    h = fma(z, h - n, n);
    saved[0] = reset, saved[1] = z, saved[2] = n, saved[3] = r[2];
  }

  template <class V>
  static FASTRNN_FN void backward(const V* saved, V h_before, V, V, V, V& dh, V&, V* dx, V* dr) {
    const V reset = saved[0], z = saved[1], n = saved[2], r_n = saved[3], one = V(1.0);
    const V da_n = dh * (one - z) * (one - n * n);  // dn = dh (1 - z), through tanh' = 1 - n^2
    dx[0] = da_n * r_n * reset * (one - reset);     // dr = da_n r_n, through sigmoid' = r (1 - r)
    dx[1] = dh * (h_before - n) * z * (one - z);    // dz = dh (h - n), through sigmoid'
    dx[2] = da_n;
    dr[0] = da_n * reset;  // r_n enters as r * r_n
    dh = dh * z;
  }
};

// The cell table: name in Python, struct. The order is the numbering of CellId.
#define FASTRNN_CELLS(X)      \
  X(rnn_tanh, RnnCell<false>) \
  X(rnn_relu, RnnCell<true>)  \
  X(lstm, LstmCell)           \
  X(gru, GruCell)

enum class CellId : int {
#define FASTRNN_CELL_ID(name, Cell) name,
  FASTRNN_CELLS(FASTRNN_CELL_ID)
#undef FASTRNN_CELL_ID
};

struct CellInfo {
  const char* name;
  int gates, saved, own;  // G, A, R
  bool has_c;
};

constexpr CellInfo kCells[] = {
#define FASTRNN_CELL_INFO(name, Cell) {#name, Cell::kGates, Cell::kSaved, Cell::kOwn, Cell::kHasC},
    FASTRNN_CELLS(FASTRNN_CELL_INFO)
#undef FASTRNN_CELL_INFO
};

}  // namespace fastrnn
