"""``layer`` and ``layer_backward`` in plain PyTorch: the oracle, the documentation of the formulas,
the backend that needs no compiler, and (being differentiable) the derivative of the backward pass.

Dimension key: T time, B batch, N rows of data (T * B, or the sum of ``batch_sizes``), H hidden,
P size of h (H, or proj_size), G gates, A saved activations, R gates with a recurrent gradient of
their own, D groups (directions).  Formulas: torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Weights(NamedTuple):
    """The weights of one group: [G * H, I], [G * H, P], [G * H], [G * H], [P, H]."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None

    def to(self, dtype: torch.dtype) -> Weights:
        def cast(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(dtype)

        return Weights(
            self.ih.to(dtype), self.hh.to(dtype), cast(self.b_ih), cast(self.b_hh), cast(self.hr)
        )


def weights_of_groups(weights: Sequence[Tensor], groups: int) -> list[Weights]:
    """The list of an operator, group by group: weight_ih, weight_hh, then both biases or none,
    then weight_hr or none."""
    count = len(weights) // groups
    result = []
    for g in range(groups):
        own = list(weights[g * count : (g + 1) * count])
        b_ih, b_hh = own[2:4] if count >= 4 else (None, None)
        result.append(Weights(own[0], own[1], b_ih, b_hh, own[-1] if count % 2 else None))
    return result


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

    def hidden(self, saved: list[Tensor], after: State) -> Tensor:
        """h before its projection, from what the step saved."""
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

    def hidden(self, saved: list[Tensor], after: State) -> Tensor:
        return saved[3] * torch.tanh(after.c)


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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit tensors are computed in float32, others in their own dtype."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _rows_of_steps(data: Tensor, batch_sizes: Tensor | None) -> list[slice]:
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


def _in_order(parts: list[Tensor], reverse: bool) -> Tensor:
    return torch.cat(parts[::-1] if reverse else parts)


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    groups: int,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all groups of one layer. The contract of ``torch.ops.fastrnn.layer`` with ``save=True``.

    Args:
        cell: a name in :data:`CELLS`.
        input: [T, B, I], or packed [N, I].
        weights: for each group weight_ih [G * H, I], weight_hh [G * H, P], with biases bias_ih and
            bias_hh [G * H], with a projection weight_hr [P, H].
        h0, c0: initial states [D, B, P] and [D, B, H], or None: zeros. Packed data needs h0.
        batch_sizes: rows of each step [T], int64 on the CPU, not increasing; None: dense.
        groups: D, the number of groups.
        direction: 0 forward, 1 reverse, 2 the second half of the groups in reverse.

    Returns:
        output [T, B, D * P] or [N, D * P], h_n [D, B, P], c_n [D, B, H], c of every step [D, N, H]
        in the compute dtype, and saved activations [D, N, A * H]; [0] where the cell has none.
        Computed in float32 for 16-bit tensors, h rounded at each step.
    """
    info, dtype = CELLS[cell], input.dtype
    compute = compute_dtype(dtype)
    rows = _rows_of_steps(input, batch_sizes)
    batch = rows[0].stop
    flat = input.reshape(-1, input.shape[-1]).to(compute)
    empty = input.new_empty(0)
    per_group: list[tuple[Tensor, ...]] = []
    with torch.autocast(input.device.type, enabled=False):
        for d, own in enumerate(weights_of_groups(weights, groups)):
            reverse = reversed_group(d, groups, direction)
            w = own.to(compute)
            hidden, size = w.hh.shape[0] // info.gates, w.hh.shape[1]
            b_ih, b_hh = (0 if b is None else b for b in (w.b_ih, w.b_hh))
            gates = flat @ w.ih.T + b_ih
            h = _initial(h0, d, flat, batch, size)
            c = _initial(c0, d, flat, batch, hidden) if info.has_c else empty
            parts: list[tuple[Tensor, ...]] = []
            for row in reversed(rows) if reverse else rows:
                n = row.stop - row.start
                x = list(gates[row].chunk(info.gates, -1))
                r = list((h[:n] @ w.hh.T + b_hh).chunk(info.gates, -1))
                new, saved = info.forward(x, r, State(h[:n], c[:n]))
                out = (new.h if w.hr is None else new.h @ w.hr.T).to(dtype)
                parts.append((out, new.c, *saved))
                h = torch.cat([out.to(compute), h[n:]])
                c = torch.cat([new.c, c[n:]]) if info.has_c else c
            output, cells, *saved = (_in_order(list(p), reverse) for p in zip(*parts, strict=True))
            saved_d = torch.cat(saved, -1).to(dtype) if saved else output.new_empty(len(flat), 0)
            per_group.append((output, h.to(dtype), c.to(dtype), cells, saved_d))
    outputs, h_n, c_n, cells_all, saved_all = zip(*per_group, strict=True)
    return (
        torch.cat(outputs, 1).reshape(*input.shape[:-1], groups * size),
        torch.stack(h_n),
        torch.stack(c_n) if info.has_c else empty,
        torch.stack(cells_all) if info.has_c else flat.new_empty(0),
        torch.stack(saved_all),
    )


def layer_backward(
    cell: str,
    doutput: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    dsaved: Tensor | None,
    input: Tensor,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    groups: int,
    direction: int,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """The gradient of :func:`layer`, differentiable in every tensor argument.

    Takes the gradients of its five results (None: zero), the results that backward needs and its
    own arguments. ``dcells`` and ``dsaved`` are there for second derivatives.

    Returns:
        dinput, the gradients of all weights, dh0 [D, B, P] and dc0 [D, B, H] (or [0]).
    """
    info, dtype = CELLS[cell], input.dtype
    compute = compute_dtype(dtype)
    rows = _rows_of_steps(input, batch_sizes)
    batch = rows[0].stop
    flat = input.reshape(-1, input.shape[-1]).to(compute)
    dinput: Tensor | float = 0.0
    dweights: list[Tensor] = []
    dh0, dc0 = [], []
    with torch.autocast(input.device.type, enabled=False):
        for d, own_weights in enumerate(weights_of_groups(weights, groups)):
            reverse = reversed_group(d, groups, direction)
            w = own_weights.to(compute)
            hidden, size = w.hh.shape[0] // info.gates, w.hh.shape[1]
            lanes = slice(d * size, (d + 1) * size)
            out = output.reshape(len(flat), -1)[:, lanes].to(compute)
            d_out = None
            if doutput is not None:
                d_out = doutput.reshape(len(flat), -1)[:, lanes].to(compute)
            c_all = cells[d] if info.has_c else out
            d_cells = None if dcells is None else dcells[d]
            dsaved_d = None if dsaved is None else dsaved[d].to(compute)
            saved_d = saved[d].to(compute)
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
                    torch.cat([out[index], h_first[kept:n]]),
                    torch.cat([c_all[index], c_first[kept:n]]) if info.has_c else c_first[:n],
                )
                after = State(out[row], c_all[row])
                s = list(saved_d[row].chunk(info.saved, -1)) if info.saved else []
                ds = None if dsaved_d is None or not s else list(
                    dsaved_d[row].chunk(info.saved, -1))  # fmt: skip
                dp = dh[:n] if d_out is None else dh[:n] + d_out[row]
                dm = dp if w.hr is None else dp @ w.hr
                m = info.hidden(s, after) if w.hr is not None else dm[:, :0]
                dc_now = dc[:n] if d_cells is None else dc[:n] + d_cells[row]
                g = info.backward(s, before, after, dm, dc_now, ds)
                dr = torch.cat([*g.dx[: info.gates - info.own], *g.dr], -1)
                parts.append((torch.cat(g.dx, -1), dr, before.h, dp, m))
                through = dr @ w.hh
                dh = torch.cat([through if w.hr is not None else through + g.dh, dh[n:]])
                dc = torch.cat([g.dc, dc[n:]])
            dx_all, dr_all, h_all, dp_all, m_all = (
                _in_order(list(p), not reverse) for p in zip(*parts, strict=True)
            )
            dinput = dinput + dx_all @ w.ih
            dweights += [dx_all.T @ flat, dr_all.T @ h_all]
            dweights += [dx_all.sum(0), dr_all.sum(0)] if w.b_ih is not None else []
            dweights += [dp_all.T @ m_all] if w.hr is not None else []
            dh0.append(dh)
            dc0.append(dc)
    assert isinstance(dinput, Tensor)
    return (
        dinput.reshape(input.shape).to(dtype),
        [dw.to(dtype) for dw in dweights],
        torch.stack(dh0).to(dtype),
        torch.stack(dc0).to(dtype) if info.has_c else input.new_empty(0),
    )

