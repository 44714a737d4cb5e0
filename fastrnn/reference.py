"""``scan`` and ``scan_backward`` in plain PyTorch: the oracle, the documentation of the formulas,
the backend that needs no compiler, and (being differentiable) the derivative of the backward pass.

Dimension key: T time, B batch, N rows of data (T * B, or the sum of ``batch_sizes``), H hidden,
P size of h (H, or proj_size), G gates, A saved activations, R gates with a recurrent gradient of
their own, D groups (directions).  Formulas: torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """State of n rows: h [n, H] and c [n, H] (unused by cells without c)."""

    h: Tensor
    c: Tensor


class CellGradient(NamedTuple):
    """Gradients of one backward step, each for n rows."""

    dx: list[Tensor]  # G pre-activations
    dr: list[Tensor]  # recurrent products of the last R gates
    dh: Tensor  # of the h that entered the step, without the recurrent product
    dc: Tensor


@dataclass(frozen=True)
class Cell:
    """What a cell is made of. ``x`` and ``r`` are lists of G tensors [n, H]: the input and the
    recurrent pre-activations."""

    gates: int
    saved: int
    own: int
    has_c: bool

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        """One step: the new state, and the A activations that backward needs."""
        raise NotImplementedError

    def backward(
        self, saved: list[Tensor], before: State, after: State, dh: Tensor, dc: Tensor,
        dsaved: list[Tensor] | None,
    ) -> CellGradient:  # fmt: skip
        """One step back. ``dsaved``: gradients of ``saved`` itself, in a second derivative."""
        raise NotImplementedError


def _plus(gradient: Tensor, dsaved: list[Tensor] | None, k: int) -> Tensor:
    return gradient if dsaved is None else gradient + dsaved[k]


@dataclass(frozen=True)
class RnnTanh(Cell):
    """h' = tanh(x + r)"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        return State(torch.tanh(x[0] + r[0]), s.c), []

    def backward(
        self, saved: list[Tensor], before: State, after: State, dh: Tensor, dc: Tensor,
        dsaved: list[Tensor] | None,
    ) -> CellGradient:  # fmt: skip
        return CellGradient([dh * (1 - after.h * after.h)], [], torch.zeros_like(dh), dc)


@dataclass(frozen=True)
class RnnRelu(Cell):
    """h' = max(x + r, 0)"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        return State(torch.relu(x[0] + r[0]), s.c), []

    def backward(
        self, saved: list[Tensor], before: State, after: State, dh: Tensor, dc: Tensor,
        dsaved: list[Tensor] | None,
    ) -> CellGradient:  # fmt: skip
        return CellGradient([dh.masked_fill(after.h <= 0, 0)], [], torch.zeros_like(dh), dc)


@dataclass(frozen=True)
class Lstm(Cell):
    """i, f, o = sigmoid(x + r), g = tanh(x + r), c' = f c + i g, h' = o tanh(c')"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        i = torch.sigmoid(x[0] + r[0])
        f = torch.sigmoid(x[1] + r[1])
        g = torch.tanh(x[2] + r[2])
        o = torch.sigmoid(x[3] + r[3])
        c = f * s.c + i * g
        h = o * torch.tanh(c)
        return State(h, c), [i, f, g, o]

    def backward(
        self, saved: list[Tensor], before: State, after: State, dh: Tensor, dc: Tensor,
        dsaved: list[Tensor] | None,
    ) -> CellGradient:  # fmt: skip
        i, f, g, o = saved
        tanh_c = torch.tanh(after.c)
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        di = _plus(dc * g, dsaved, 0)
        df = _plus(dc * before.c, dsaved, 1)
        dg = _plus(dc * i, dsaved, 2)
        do = _plus(dh * tanh_c, dsaved, 3)
        dx = [di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)]
        return CellGradient(dx, [], torch.zeros_like(dh), dc * f)


@dataclass(frozen=True)
class Gru(Cell):
    """r, z = sigmoid(x + r), n = tanh(x_n + r * r_n), h' = (1 - z) n + z h"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        reset = torch.sigmoid(x[0] + r[0])
        z = torch.sigmoid(x[1] + r[1])
        n = torch.tanh(x[2] + reset * r[2])
        h = n + z * (s.h - n)
        return State(h, s.c), [reset, z, n, r[2]]

    def backward(
        self, saved: list[Tensor], before: State, after: State, dh: Tensor, dc: Tensor,
        dsaved: list[Tensor] | None,
    ) -> CellGradient:  # fmt: skip
        reset, z, n, r_n = saved
        dn = _plus(dh * (1 - z), dsaved, 2)
        da_n = dn * (1 - n * n)
        dz = _plus(dh * (before.h - n), dsaved, 1)
        dreset = _plus(da_n * r_n, dsaved, 0)
        dr_n = _plus(da_n * reset, dsaved, 3)
        dx = [dreset * reset * (1 - reset), dz * z * (1 - z), da_n]
        return CellGradient(dx, [dr_n], dh * z, dc)


CELLS: dict[str, Cell] = {
    "rnn_tanh": RnnTanh(gates=1, saved=0, own=0, has_c=False),
    "rnn_relu": RnnRelu(gates=1, saved=0, own=0, has_c=False),
    "lstm": Lstm(gates=4, saved=4, own=0, has_c=True),
    "gru": Gru(gates=3, saved=4, own=1, has_c=False),
}


def reversed_group(d: int, groups: int, direction: int) -> bool:
    """Whether group d runs from the end: direction 0 none, 1 all, 2 the second half."""
    return direction == 1 or (direction == 2 and 2 * d >= groups)


def rows_of_steps(data: Tensor, batch_sizes: Tensor | None) -> list[slice]:
    """The rows of each time step in flattened data ([T, B, ...], or [N, ...] when packed)."""
    if batch_sizes is None:
        steps, batch = data.shape[:2]
        return [slice(t * batch, (t + 1) * batch) for t in range(steps)]
    ends = batch_sizes.cumsum(0).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _initial(state: Tensor | None, d: int, like: Tensor, batch: int, width: int) -> Tensor:
    if state is None:
        return like.new_zeros(batch, width)
    return state[d].to(like.dtype)


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _back_in_order(parts: list[Tensor], reverse: bool) -> Tensor:
    return torch.cat(parts[::-1] if reverse else parts)


def scan(
    cell: str,
    gates: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a cell along time. The contract of ``torch.ops.fastrnn.scan`` with ``save=True``.

    Args:
        cell: a name in :data:`CELLS`.
        gates: input products W_ih x [T, B, D, G * H], or packed [N, D, G * H].
        weight_hh: [D, G * H, P].
        bias_ih, bias_hh: added to the input and to the recurrent products [D, G * H], or None.
        weight_hr: projection of h [D, P, H] (LSTM), or None: P = H.
        h0, c0: initial states [D, B, P] and [D, B, H], or None: zeros. Packed data needs h0.
        batch_sizes: rows of each step [T], int64 on the CPU, not increasing; None: dense.
        direction: 0 forward, 1 reverse, 2 the second half of the groups in reverse.

    Returns:
        output [T, B, D, P], h_n [D, B, P], c_n [D, B, H], c of every step [T, B, D, H] in the
        compute dtype, and saved activations [T, B, D, A * H]; [0] where the cell has none.
        Computed in float32 for 16-bit tensors, h rounded at each step.
    """
    info, dtype, groups = CELLS[cell], gates.dtype, gates.shape[-2]
    compute, hidden, size = _compute(dtype), gates.shape[-1] // info.gates, weight_hh.shape[2]
    rows, lead = rows_of_steps(gates, batch_sizes), gates.shape[:-2]
    batch = rows[0].stop
    flat = gates.reshape(-1, groups, gates.shape[-1]).to(compute)
    empty = gates.new_empty(0)
    per_group: list[tuple[Tensor, ...]] = []
    with torch.autocast(gates.device.type, enabled=False):
        for d in range(groups):
            reverse = reversed_group(d, groups, direction)
            w_hh = weight_hh[d].to(compute)
            w_hr = None if weight_hr is None else weight_hr[d].to(compute)
            b_ih, b_hh = (0 if b is None else b[d].to(compute) for b in (bias_ih, bias_hh))
            h = _initial(h0, d, flat, batch, size)
            c = _initial(c0, d, flat, batch, hidden) if info.has_c else empty
            parts: list[tuple[Tensor, ...]] = []
            for row in reversed(rows) if reverse else rows:
                n = row.stop - row.start
                x = list((flat[row, d] + b_ih).chunk(info.gates, -1))
                r = list((h[:n] @ w_hh.T + b_hh).chunk(info.gates, -1))
                new, saved = info.forward(x, r, State(h[:n], c[:n]))
                out = new.h if w_hr is None else new.h @ w_hr.T
                out = out.to(dtype)
                parts.append((out, new.c, *saved))
                h = torch.cat([out.to(compute), h[n:]])
                c = torch.cat([new.c, c[n:]]) if info.has_c else c
            output, cells, *saved = (
                _back_in_order(list(p), reverse) for p in zip(*parts, strict=True)
            )
            saved_d = torch.cat(saved, -1).to(dtype) if saved else output.new_empty(len(flat), 0)
            per_group.append((output, h.to(dtype), c.to(dtype), cells, saved_d))
    outputs, h_n, c_n, cells_all, saved_all = zip(*per_group, strict=True)
    return (
        torch.stack(outputs, 1).reshape(*lead, groups, size),
        torch.stack(h_n),
        torch.stack(c_n) if info.has_c else empty,
        torch.stack(cells_all, 1).reshape(*lead, groups, hidden) if info.has_c
        else torch.empty(0, dtype=compute, device=gates.device),
        torch.stack(saved_all, 1).reshape(*lead, groups, info.saved * hidden),
    )  # fmt: skip


def _width(t: Tensor | None, width: int, like: Tensor) -> Tensor:
    """[N, D, width] of a gradient over time, zeros where it is None."""
    if t is None:
        return like.new_zeros(1, 1, 1).expand(like.shape[0], like.shape[1], width)
    return t.reshape(like.shape[0], like.shape[1], width).to(like.dtype)


def scan_backward(
    cell: str,
    doutput: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    dsaved: Tensor | None,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`scan`, differentiable in every tensor argument.

    Takes the gradients of scan's five results (None: zero), the results that backward needs and
    scan's own arguments. ``dcells`` and ``dsaved`` are there for second derivatives.

    Returns:
        dgates [T, B, D, G * H], drecurrent [T, B, D, R * H] (recurrent products of the last R
        gates), and with a projection the whole gradient of h after each step [T, B, D, P] and
        o tanh(c) of each step [T, B, D, H] (else [0]); dh0 [D, B, P] and dc0 [D, B, H] (or [0]).
    """
    info, dtype, groups = CELLS[cell], output.dtype, output.shape[-2]
    compute, hidden, size = _compute(dtype), weight_hh.shape[1] // info.gates, weight_hh.shape[2]
    rows, lead = rows_of_steps(output, batch_sizes), output.shape[:-2]
    batch = rows[0].stop
    empty = output.new_empty(0)
    out = output.reshape(-1, groups, size).to(compute)
    c_all = _width(cells, hidden, out) if info.has_c else out
    saved_all = _width(saved, info.saved * hidden, out)
    d_out, d_cells = _width(doutput, size, out), _width(dcells, hidden, out)
    dsaved_all = None if dsaved is None else _width(dsaved, info.saved * hidden, out)
    per_group: list[tuple[Tensor, ...]] = []
    with torch.autocast(output.device.type, enabled=False):
        for d in range(groups):
            reverse = reversed_group(d, groups, direction)
            w_hh = weight_hh[d].to(compute)
            w_hr = None if weight_hr is None else weight_hr[d].to(compute)
            h_first = _initial(h0, d, out, batch, size)
            c_first = _initial(c0, d, out, batch, hidden)
            dh = _initial(dh_n, d, out, batch, size)
            dc = _initial(dc_n, d, out, batch, hidden)
            order = rows[::-1] if reverse else rows
            parts: list[tuple[Tensor, ...]] = []
            for step in range(len(order) - 1, -1, -1):
                row = order[step]
                n = row.stop - row.start
                previous = order[step - 1] if step > 0 else slice(0, 0)
                kept = min(previous.stop - previous.start, n)
                index = slice(previous.start, previous.start + kept)
                before = State(
                    torch.cat([out[index, d], h_first[kept:n]]),
                    torch.cat([c_all[index, d], c_first[kept:n]]) if info.has_c else c_first[:n],
                )
                after = State(out[row, d], c_all[row, d])
                s = list(saved_all[row, d].chunk(info.saved, -1)) if info.saved else []
                ds = None if dsaved_all is None or not s else list(
                    dsaved_all[row, d].chunk(info.saved, -1))  # fmt: skip
                dp = dh[:n] + d_out[row, d]
                dm = dp if w_hr is None else dp @ w_hr
                m = s[3] * torch.tanh(after.c) if w_hr is not None else empty
                g = info.backward(s, before, after, dm, dc[:n] + d_cells[row, d], ds)
                dx, own = torch.cat(g.dx, -1), g.dr
                dr = torch.cat([*g.dx[: info.gates - info.own], *own], -1)
                parts.append((dx, torch.cat(own, -1) if own else dx[:, :0], dp, m))
                through = dr @ w_hh
                dh = torch.cat([through if w_hr is not None else through + g.dh, dh[n:]])
                dc = torch.cat([g.dc, dc[n:]])
            dx_d, own_d, dp_d, m_d = (
                _back_in_order(list(p), not reverse) for p in zip(*parts, strict=True)
            )
            per_group.append((dx_d, own_d, dp_d, m_d, dh, dc))
    dgates, drecurrent, dprojected, m_all, dh0, dc0 = zip(*per_group, strict=True)

    def over_time(tensors: tuple[Tensor, ...], wanted: bool = True) -> Tensor:
        if not wanted:
            return empty
        return torch.stack(tensors, 1).reshape(*lead, groups, tensors[0].shape[-1]).to(dtype)

    projected = weight_hr is not None
    return (
        over_time(dgates),
        torch.stack(drecurrent, 1).reshape(*lead, groups, info.own * hidden).to(dtype),
        over_time(dprojected, projected),
        over_time(m_all, projected),
        torch.stack(dh0).to(dtype),
        torch.stack(dc0).to(dtype) if info.has_c else empty,
    )
