"""``layer`` in plain PyTorch: the oracle, the documentation of the formulas, the backend that needs
no compiler, and (being differentiable to any order) the derivative of the backward pass.

Dimension key: T time, B batch, N rows of data (T * B, or the sum of ``batch_sizes``), H hidden,
P size of h (H, or proj_size), G gates, A saved activations, R gates with a recurrent gradient of
their own, D groups (directions).  Formulas: torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """State of n rows: h [n, H] and c [n, H] (unused by cells without c)."""

    h: Tensor
    c: Tensor


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
    then weight_hr or none; or each of them [S, ...] for S groups at a time."""
    S = stacked_groups(weights)
    count = len(weights) * max(S, 1) // groups
    result = []
    for g in range(groups):
        first = g // max(S, 1) * count
        own = list(weights[first : first + count])
        if S:
            own = [w[g % S] for w in own]
        b_ih, b_hh = own[2:4] if count >= 4 else (None, None)
        result.append(Weights(own[0], own[1], b_ih, b_hh, own[-1] if count % 2 else None))
    return result


def stacked_groups(weights: Sequence[Tensor]) -> int:
    """S, of an operator's list whose weights are those of S groups at a time; otherwise 0."""
    return weights[0].shape[0] if weights and weights[0].dim() == 3 else 0


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


@dataclass(frozen=True)
class RnnTanh(Cell):
    """h' = tanh(x + r)"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        return State(torch.tanh(x[0] + r[0]), s.c), []


@dataclass(frozen=True)
class RnnRelu(Cell):
    """h' = max(x + r, 0)"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        return State(torch.relu(x[0] + r[0]), s.c), []


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


@dataclass(frozen=True)
class Gru(Cell):
    """r, z = sigmoid(x + r), n = tanh(x_n + r * r_n), h' = (1 - z) n + z h"""

    def forward(self, x: list[Tensor], r: list[Tensor], s: State) -> tuple[State, list[Tensor]]:
        reset = torch.sigmoid(x[0] + r[0])
        z = torch.sigmoid(x[1] + r[1])
        n = torch.tanh(x[2] + reset * r[2])
        h = n + z * (s.h - n)
        return State(h, s.c), [reset, z, n, r[2]]


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


def _initial(state: Tensor | None, d: int, like: Tensor, rows: int, width: int) -> Tensor:
    if state is None:
        return like.new_zeros(rows, width)
    return state[d].to(like.dtype)


CARRY, RESET, RESTART = range(3)  # what resets hold; csrc/scan.h has the same


def _boundaries(
    resets: Tensor | None, rows: list[slice], reverse: bool
) -> list[Tensor | None]:
    """What enters each step, [n, 1] of its n rows: CARRY the state of the step before it in this
    direction of time, RESET a state of its own, RESTART the initial one; None: all carry."""
    if resets is None:
        return [None] * len(rows)
    codes = resets.reshape(-1, 1)
    if not reverse:
        return [codes[row] for row in rows]
    found: list[Tensor | None] = []
    for row, after in itertools.pairwise(rows):
        ended = (row.stop - row.start) - (after.stop - after.start)  # whose last step this is
        found.append(torch.cat([codes[after], codes.new_zeros(ended, 1)]))
    return [*found, None]


def _entering(state: Tensor, initial: Tensor, code: Tensor | None) -> Tensor:
    """The state [n, H] that enters a step; ``initial`` [2 B, H]: initial ones, then those of
    RESET."""
    if code is None:
        return state
    n, batch = len(state), len(initial) // 2
    state = torch.where(code == RESTART, initial[:n], state)
    return torch.where(code == RESET, initial[batch : batch + n], state)


def _input_of_group(flat: Tensor, weight_ih: Tensor, d: int) -> Tensor:
    """[N, I] of [N, M * I]: one input for all groups, or the (d mod M)-th of those side by side."""
    width, own = flat.shape[1], weight_ih.shape[1]
    if own in (0, width) or width == 0:
        return flat
    return flat.unflatten(1, (-1, own))[:, d % (width // own)]


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
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run all groups of one layer. The contract of ``torch.ops.fastrnn.layer`` with ``save=True``.

    Args:
        cell: a name in :data:`CELLS`.
        input: [T, B, I], or packed [N, I]; or M * I features: M inputs, of which group d reads the
            (d mod M)-th.
        weights: for each group weight_ih [G * H, I], weight_hh [G * H, P], with biases bias_ih and
            bias_hh [G * H], with a projection weight_hr [P, H]; or each of them [S, ...] for S
            groups at a time.
        h0, c0: initial states [D, B, P] and [D, B, H], or None: zeros. Packed data needs h0.
        batch_sizes: rows of each step [T], int64 on the CPU, not increasing; None: dense.
        groups: D, the number of groups.
        direction: 0 forward, 1 reverse, 2 the second half of the groups in reverse.
        resets: uint8 [T, B] or [N]. 1 or 2 at a row is a boundary between this step and the one
            before, which no state passes: in place of it enters, before the step, or in reverse
            before the step that precedes it, row B + b of h0 and c0 (1) or row b (2). Then h0 and
            c0 have 2 B rows.

    Returns:
        output [T, B, D * P] or [N, D * P], h_n [D, B, P], c_n [D, B, H], c of every step [D, N, H]
        in the compute dtype, and saved activations [D, N, A * H]; [0] where the cell has none.
        Computed in float32 for 16-bit tensors, h rounded at each step.
    """
    info, dtype = CELLS[cell], input.dtype
    compute = compute_dtype(dtype)
    rows = _rows_of_steps(input, batch_sizes)
    batch = rows[0].stop
    entering_rows = batch if resets is None else 2 * batch
    flat = input.reshape(-1, input.shape[-1]).to(compute)
    empty = input.new_empty(0)
    per_group: list[tuple[Tensor, ...]] = []
    with torch.autocast(input.device.type, enabled=False):
        for d, own in enumerate(weights_of_groups(weights, groups)):
            reverse = reversed_group(d, groups, direction)
            w = own.to(compute)
            hidden, size = w.hh.shape[0] // info.gates, w.hh.shape[1]
            b_ih, b_hh = (0 if b is None else b for b in (w.b_ih, w.b_hh))
            gates = _input_of_group(flat, w.ih, d) @ w.ih.T + b_ih
            first_h = _initial(h0, d, flat, entering_rows, size)
            first_c = _initial(c0, d, flat, entering_rows, hidden) if info.has_c else empty
            h, c = first_h[:batch], first_c[:batch]
            parts: list[tuple[Tensor, ...]] = []
            steps = list(zip(rows, _boundaries(resets, rows, reverse), strict=True))
            for row, code in reversed(steps) if reverse else steps:
                n = row.stop - row.start
                if code is not None:
                    h = torch.cat([_entering(h[:n], first_h, code), h[n:]])
                    c = torch.cat([_entering(c[:n], first_c, code), c[n:]]) if info.has_c else c
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
