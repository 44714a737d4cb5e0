"""A layer whose backward pass computes again what it needs, a segment of the steps at a time.

Forward keeps the states between segments and nothing else of the steps inside. Backward goes
through the segments from the end: forward over one with everything saved, then backward over it.
So what backward needs, and the gradients of the gates, exist for one segment at a time:

    without   D T B (A + has_c + G) H elements beside input, output and their gradients
    with      the same of one segment of S steps, and D (T / S) B (P + has_c H) of states

for one more forward pass. Every direction is segmented in its own order of time.

Dimension key: see reference.py; S steps of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops, derivatives, modes, reference
from .derivatives import Call


def steps_of(recompute: bool | int, call: Call, input: Tensor) -> int:
    """S: as asked, or about as many steps as make a segment and all the states equally large, but
    at least ``_ROWS`` rows of data."""
    if recompute is not True:
        return recompute
    if call.batch_sizes is None:
        steps, batch = input.shape[:2]
    else:
        steps, batch = len(call.batch_sizes), int(call.batch_sizes[0])
    info = reference.CELLS[call.cell]
    of_step = 2 * info.gates + info.has_c  # in units of H, and of a state: 1 + has_c
    even = math.isqrt(steps * (1 + info.has_c) // of_step)
    return max(even, _ROWS // max(1, batch), 1)


# Of a segment: with 1024, what is around its two calls of an operator (0.1 ms) makes a training
# step of an RNN (H = 64) 1.49 times as long as without segments, with 1536 1.36 times.
_ROWS = 1536


@torch._disable_dynamo  # a graph that may break has broken in front of it
def layer(
    backend: str, call: Call, leaves: Sequence[Tensor | None], steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n of ``autograd.layer``, recomputed in backward by segments of so many
    steps."""
    input, h0, c0, *weights = leaves
    if modes.has_tangents(leaves):
        raise RuntimeError("fastrnn: recompute has no forward-mode derivative")
    results: tuple[Tensor, Tensor, Tensor] = _Segmented.apply(
        backend, call, steps, input, h0, c0, *weights
    )
    return results


class _Segment(NamedTuple):
    """Steps [begin, end) of one group, and the rows of data and of the batch they have."""

    begin: int
    end: int
    rows: slice  # of the data: of steps of dense data, of rows of packed data
    batch: int  # rows of its first step
    batch_sizes: Tensor | None


class _Direction:
    """One group of a layer, segment by segment in its order of time."""

    def __init__(
        self, backend: str, call: Call, d: int, steps: int, leaves: Sequence[Tensor | None]
    ) -> None:
        input, h0, c0, *weights = leaves
        assert input is not None
        self.backend, self.call, self.d, self.input = backend, call, d, input
        count = len(weights) // call.groups
        self.weights: list[Any] = weights[d * count : (d + 1) * count]
        self.reverse = reference.reversed_group(d, call.groups, call.direction)
        self.info = reference.CELLS[call.cell]
        sizes = call.batch_sizes
        self.batch = input.shape[1] if sizes is None else int(sizes[0])
        self.segments = self._cut(steps)
        self.initial = [
            None if s is None else s[d : d + 1] for s in ((h0, c0) if self.info.has_c else (h0,))
        ]

    def _cut(self, steps: int) -> list[_Segment]:
        sizes = self.call.batch_sizes
        total = self.input.shape[0] if sizes is None else len(sizes)
        offsets = None if sizes is None else [0, *sizes.cumsum(0).tolist()]
        found = []
        for begin in range(0, total, steps):
            end = min(begin + steps, total)
            if sizes is None or offsets is None:
                found.append(_Segment(begin, end, slice(begin, end), self.batch, None))
            else:
                rows = slice(offsets[begin], offsets[end])
                found.append(_Segment(begin, end, rows, int(sizes[begin]), sizes[begin:end]))
        return found[::-1] if self.reverse else found

    def first_states(self) -> list[Tensor]:
        """The states [1, B, ...] that enter."""
        weight_hh = self.weights[1]
        widths = (weight_hh.shape[-1], weight_hh.shape[0] // self.info.gates)
        return [
            self.input.new_zeros(1, self.batch, width) if s is None else s[:, : self.batch].clone()
            for s, width in zip(self.initial, widths, strict=False)
        ]

    def behind_reset(self, i: int, like: Tensor) -> Tensor:
        """The states [1, B, ...] that enter behind a reset."""
        state = self.initial[i]
        return torch.zeros_like(like) if state is None else state[:, self.batch :]

    def crossed(self, segment: _Segment) -> Tensor | None:
        """In reverse, the rows [b, 1] of a segment in front of which, behind its end, a reset lies:
        its boundary is one of the segment run before, which the operator does not see."""
        resets, sizes = self.call.resets, self.call.batch_sizes
        if resets is None or not self.reverse or segment is self.segments[0]:
            return None
        if sizes is None:
            return resets[segment.end].bool()[:, None]
        first = segment.rows.stop
        return resets[first : first + int(sizes[segment.end])].bool()[:, None]

    def enter(self, segment: _Segment, states: list[Tensor]) -> list[Tensor]:
        """The states [1, b, ...] that enter a segment, from those that left the one before."""
        own = [s[:, : segment.batch] for s in states]
        cut = self.crossed(segment)
        if cut is None:
            return own
        n = len(cut)
        return [
            torch.cat([torch.where(cut, self.behind_reset(i, s)[:, :n], o[:, :n]), o[:, n:]], 1)
            for i, (o, s) in enumerate(zip(own, states, strict=True))
        ]

    def arguments(self, segment: _Segment, states: list[Tensor]) -> tuple[Any, ...]:
        """(input, h0, c0), and what follows them in a call of the operator."""
        resets = self.call.resets
        if resets is not None:
            resets = resets[segment.rows]
            states = [
                torch.cat([s, self.behind_reset(i, s)[:, : segment.batch]], 1)
                for i, s in enumerate(states)
            ]
        h, c = (*states, None)[:2]
        leaves = (self.input[segment.rows], h, c)
        return leaves, Call(self.call.cell, segment.batch_sizes, 1, int(self.reverse), resets)

    def run(self, segment: _Segment, states: list[Tensor], save: bool) -> tuple[Tensor, ...]:
        (input, h, c), call = self.arguments(segment, states)
        if self.backend == "reference":
            return reference.layer(call.cell, input, self.weights, h, c, *call[1:])
        results: tuple[Tensor, ...] = _ops.operators(self.backend).layer(
            call.cell, input, self.weights, h, c, call.batch_sizes, 1, call.direction, save,
            call.resets,
        )  # fmt: skip
        return results

    def forward(
        self, i: int, segment: _Segment, states: list[Tensor], kept: list[Tensor], output: Tensor
    ) -> list[Tensor]:  # fmt: skip
        """Segment number i: writes the states that enter it and its output; the states behind."""
        entering = self.enter(segment, states)
        for room, state in zip(kept, entering, strict=True):
            room[i : i + 1, : segment.batch] = state
        found, *last = self.run(segment, entering, False)[: 1 + len(states)]
        P = found.shape[-1]
        output[segment.rows][..., self.d * P : (self.d + 1) * P] = found
        return [_in_front(n, s) for n, s in zip(last, states, strict=True)]

    def gradients(
        self, segment: _Segment, states: list[Tensor], grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Of its input, of the states that entered and of the weights."""
        (input, h, c), call = self.arguments(segment, states)
        asked = [int(wanted[0]), 1, int(self.info.has_c), *map(int, wanted[3:])]
        if self.backend == "reference":
            leaves = (input, h, c, *self.weights)
            dinput, dh, dc, *dweights = derivatives.gradients(call, (*grads, None), leaves, asked)
        else:
            results = self.run(segment, states, True)
            dinput, dweights, dh, dc = _ops.operators(self.backend).layer_backward(
                call.cell, *grads, input, results[0], *results[3:], self.weights, h, c,
                call.batch_sizes, 1, call.direction, asked, call.resets, None,
            )  # fmt: skip
        dstates = [t for t in (dh, dc)[: 1 + self.info.has_c] if t is not None]
        return dinput, dstates, list(dweights)


class _Segmented(Function):
    """Arguments: backend, call, steps of a segment, input, h0, c0, *weights."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, call: Call, steps: int, *leaves: Tensor | None
    ) -> tuple[Tensor, ...]:
        input, weight_hh = leaves[0], leaves[4]
        assert input is not None
        assert weight_hh is not None
        has_c = reference.CELLS[call.cell].has_c
        finals, kept = [], []
        with torch._C._AutoDispatchBelowAutograd():
            output = input.new_empty(*input.shape[:-1], call.groups * weight_hh.shape[-1])
            for d in range(call.groups):
                direction = _Direction(backend, call, d, steps, leaves)
                states = direction.first_states()
                # What stays is there before what goes: gaps between the two would stay unused.
                own = [s.new_empty(len(direction.segments), *s.shape[1:]) for s in states]
                for i, segment in enumerate(direction.segments):
                    states = direction.forward(i, segment, states, own, output)
                kept += own
                finals.append(states)
        ctx.save_for_backward(call.batch_sizes, call.resets, *leaves, *kept)
        ctx.how = (backend, call._replace(batch_sizes=None, resets=None), steps, len(leaves))
        ctx.set_materialize_grads(False)
        h_n, *c_n = (torch.cat(s) for s in zip(*finals, strict=True))
        return output, h_n, c_n[0] if has_c else input.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or modes.is_transformed(grads):
            raise RuntimeError(
                "fastrnn: what recompute saves can be differentiated once and not transformed: "
                "call the layer without recompute for create_graph, is_grads_batched and torch.func"
            )
        backend, call, steps, count = ctx.how
        batch_sizes, resets, *tensors = ctx.saved_tensors
        call = call._replace(batch_sizes=batch_sizes, resets=resets)
        leaves, kept = tensors[:count], tensors[count:]
        wanted = ctx.needs_input_grad[3:]
        if all(g is None for g in grads):
            return (None,) * (3 + count)
        with torch._C._AutoDispatchBelowAutograd():
            found = _gradients(backend, call, steps, leaves, kept, grads, wanted)
        return None, None, None, *found


def _in_front(states: Tensor, whole: Tensor) -> Tensor:
    """Those of the first rows [1, n, ...], then those of the others [1, B, ...]."""
    n = states.shape[1]
    return states if n == whole.shape[1] else torch.cat([states, whole[:, n:]], 1)


def _gradients(
    backend: str, call: Call, steps: int, leaves: Sequence[Any], kept: list[Tensor],
    grads: Sequence[Tensor | None], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Those of the leaves that are wanted."""
    input = leaves[0]
    dinput = torch.empty_like(input) if wanted[0] else None
    dweights: list[Tensor | None] = []
    by_direction = []
    for d in range(call.groups):
        direction = _Direction(backend, call, d, steps, leaves)
        count = len(direction.initial)
        own, kept = kept[:count], kept[count:]
        per = len(direction.weights)
        asked = [wanted[0], True, True, *wanted[3 + d * per : 3 + (d + 1) * per]]
        of_states, of_weights = _of_direction(direction, own, grads, asked, dinput)
        by_direction.append(of_states)
        dweights += of_weights
    dstates: list[Tensor | None] = [torch.cat(s) for s in zip(*by_direction, strict=True)]
    dstates += [None] * (2 - len(dstates))
    return [
        g if want and leaf is not None else None
        for g, want, leaf in zip([dinput, *dstates, *dweights], wanted, leaves, strict=True)
    ]


def _of_direction(
    direction: _Direction, kept: list[Tensor], grads: Sequence[Tensor | None],
    wanted: Sequence[bool], dinput: Tensor | None,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """The gradients of h0 and c0 [1, K, ...] and of the weights; that of the input goes, or
    is added, to ``dinput``."""
    call, d = direction.call, direction.d
    compute, P = reference.compute_dtype(direction.input.dtype), direction.weights[1].shape[-1]
    doutput = None if grads[0] is None else grads[0][..., d * P : (d + 1) * P]
    running = [
        torch.zeros_like(s[:1]) if g is None else g[d : d + 1].clone()
        for s, g in zip(kept, grads[1:], strict=False)
    ]
    resets = [torch.zeros_like(s[:1], dtype=compute) for s in kept]  # of the states behind resets
    sums: list[Tensor | None] = [None] * len(direction.weights)
    for i, segment in reversed(list(enumerate(direction.segments))):
        n = segment.batch
        states = [s[i : i + 1, :n] for s in kept]
        given = [None if doutput is None else doutput[segment.rows], *(g[:, :n] for g in running)]
        of_input, of_states, of_weights = direction.gradients(
            segment, states, (*given, None)[:3], wanted
        )
        if dinput is not None and of_input is not None:
            own = dinput[segment.rows]
            if d == 0:
                own.copy_(of_input)
            else:
                own.add_(of_input)
        for k, gradient in enumerate(of_weights):
            if wanted[3 + k] and gradient is not None:
                total = sums[k]
                sums[k] = gradient.to(compute) if total is None else total.add_(gradient)
        cut = direction.crossed(segment)
        for k, gradient in enumerate(of_states):
            if call.resets is not None:
                resets[k][:, :n] += gradient[:, n:]
            entered = gradient[:, :n]
            if cut is not None:
                rows = len(cut)
                resets[k][:, :rows] += entered[:, :rows].masked_fill(~cut, 0)
                entered = torch.cat([entered[:, :rows].masked_fill(cut, 0), entered[:, rows:]], 1)
            running[k] = _in_front(entered, running[k])
    dtype = direction.input.dtype
    if call.resets is not None:
        running = [torch.cat([s, r.to(dtype)], 1) for s, r in zip(running, resets, strict=True)]
    return running, [g if g is None else g.to(dtype) for g in sums]


__all__ = ["layer", "steps_of"]
