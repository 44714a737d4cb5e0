"""Every cell, forward and backward, once for all Triton kernels: arithmetic on tiles, no memory.

A step has tuples of tiles: x of G input pre-activations, r of G recurrent products; the states h
and c that enter it (c means nothing in a cell without one, and is given back). It leaves the states
and a tuple of A activations. A backward step has those, the states and the gradients dh and dc of
the states after it; it gives the gradients dx of x and dr of r, and what of the gradients of the
states before it does not pass through the recurrent product. Biases: as in csrc/cells.h.

Formulas: torch.nn.RNN, LSTM and GRU (gate orders i f g o and r z n).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to 3 ulp with exact exp and division (a GPU's of float32 are to 2 ulp).
    NaN gives NaN, infinities give the limits."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Errors as of sigmoid. From |x| = 0.6 on: 1 - 2 / (exp(2 |x|) + 1), with the sign of x. Below
    that, where it cancels: in float32 x + x^3 p(x^2), p minimax of degree 4 with a relative error
    of 2.8e-9; in float64 expm1(2 x) / (expm1(2 x) + 2), where expm1(y) = (w - 1) y / log(w) with
    w = exp(y)."""
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    far = tl.where(x < 0, -far, far)
    is_near = tl.abs(x) < 0.6
    if x.dtype == tl.float64:
        y = tl.where(is_near, 2.0 * x, 1.0)
        w = tl.exp(y)
        expm1 = tl.where(w == 1.0, y, (w - 1.0) * y / tl.where(w == 1.0, 1.0, tl.log(w)))
        near = expm1 / (expm1 + 2.0)
    else:
        q = x * x
        p = -0.005895158275961876 * q + 0.020795971155166626
        p = p * q - 0.053783830255270004
        p = p * q + 0.13331924378871918
        p = p * q - 0.33333298563957214
        near = x + x * q * p
    return tl.where(is_near, near, far)


@triton.jit
def rnn_forward(relu: tl.constexpr, x, r, c):
    """h' = act(x + r)"""
    a = x[0] + r[0]
    h = tl.where(a < 0, 0.0, a) if relu else tanh(a)  # NaN passes through
    return h, c, ()


@triton.jit
def rnn_backward(relu: tl.constexpr, h_after, dh, dc):
    if relu:
        da = tl.where(h_after <= 0, 0.0, dh)  # da = dh [h > 0]
    else:
        da = dh * (1.0 - h_after * h_after)  # da = dh (1 - h^2)
    return (da,), (da,), tl.zeros_like(dh), dc


@triton.jit
def lstm_forward(x, r, c):
    """i, f, o = sigmoid(x + r), g = tanh(x + r), c' = f c + i g, h' = o tanh(c')"""
    i = sigmoid(x[0] + r[0])
    f = sigmoid(x[1] + r[1])
    g = tanh(x[2] + r[2])
    o = sigmoid(x[3] + r[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def lstm_backward(saved, c_before, c_after, dh, dc):
    i, f, g, o = saved
    tanh_c = tanh(c_after)
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc  # dc' += dh o (1 - tanh^2 c')
    di = dc * g * i * (1.0 - i)  # through sigmoid' = i (1 - i)
    df = dc * c_before * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)  # through tanh' = 1 - g^2
    do = dh * tanh_c * o * (1.0 - o)
    return (di, df, dg, do), (di, df, dg, do), tl.zeros_like(dh), dc * f


@triton.jit
def lstm_hidden(saved, c_after):
    """o tanh(c'), the h' of a step from what it saved: for the gradient of W_hr."""
    return saved[3] * tanh(c_after)


@triton.jit
def gru_forward(x, r, h, c):
    """r, z = sigmoid(x + r), n = tanh(x_n + r * r_n), h' = (1 - z) n + z h"""
    reset = sigmoid(x[0] + r[0])
    z = sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return n + z * (h - n), c, (reset, z, n, r[2])


@triton.jit
def gru_backward(saved, h_before, dh, dc):
    reset, z, n, r_n = saved
    dn = dh * (1.0 - z) * (1.0 - n * n)  # through tanh' = 1 - n^2
    dreset = dn * r_n * reset * (1.0 - reset)  # through sigmoid' = r (1 - r)
    dz = dh * (h_before - n) * z * (1.0 - z)  # h' = n + z (h - n)
    return (dreset, dz, dn), (dreset, dz, dn * reset), dh * z, dc  # r_n enters as r * r_n


@triton.jit
def forward(CELL: tl.constexpr, x, r, h, c):
    """The step of the cell with this name: h', c', saved."""
    if CELL == "lstm":
        return lstm_forward(x, r, c)
    elif CELL == "gru":
        return gru_forward(x, r, h, c)
    else:
        tl.static_assert(CELL == "rnn_tanh" or CELL == "rnn_relu", "there is no such cell")
        return rnn_forward(CELL == "rnn_relu", x, r, c)


@triton.jit
def backward(CELL: tl.constexpr, saved, h_before, c_before, h_after, c_after, dh, dc):
    """The backward step of the cell with this name: dx, dr, dh, dc. What a cell does not read
    (h_before: only GRU; c_before and c_after: only LSTM; h_after: only RNN) may be anything."""
    if CELL == "lstm":
        return lstm_backward(saved, c_before, c_after, dh, dc)
    elif CELL == "gru":
        return gru_backward(saved, h_before, dh, dc)
    else:
        tl.static_assert(CELL == "rnn_tanh" or CELL == "rnn_relu", "there is no such cell")
        return rnn_backward(CELL == "rnn_relu", h_after, dh, dc)
