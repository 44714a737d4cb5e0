"""What ``vmap`` makes of the two operators: one call of the same operator for all that is mapped.

Where the weights are shared and the data dense, the mapped batch (S) becomes rows: S * B rows of
one call, whose weight gradients are asked for in S parts. Otherwise each member of the mapped batch
becomes a group with weights of its own: group g of a layer becomes groups g * S to g * S + S - 1,
and inputs that differ lie side by side, [T, B, S * I].

Dimension key: reference.py, and S size of the mapped batch. The operators: csrc/ops.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Dim = int | None


def layer(
    run: Callable[..., Any], size: int, in_dims: Sequence[Any], cell: str, input: Tensor,
    weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, batch_sizes: Tensor | None,
    groups: int, direction: int, *rest: Any,
) -> tuple[tuple[Tensor, ...], tuple[Dim, ...]]:  # fmt: skip
    """Results of ``run`` (the operator ``layer``) for a mapped batch, and where it lies in each.
    ``in_dims``: where it lies in the arguments, shaped as they are. ``rest``: save and resets, of
    the operator."""
    save = rest[:1]
    refuse(*rest[1:])
    _, input_dim, weight_dims, h_dim, c_dim, sizes_dim, *_ = in_dims
    _refuse(size, sizes_dim)
    if batch_sizes is None and all(d is None for d in weight_dims):
        rows = _Rows(size, input, input_dim)
        results = run(
            cell, rows.join(input, input_dim), weights, rows.join(h0, h_dim), rows.join(c0, c_dim),
            None, groups, direction, *save,
        )  # fmt: skip
        parts = [*(rows.part(r) for r in results[:3]), *(rows.part_times(r) for r in results[3:])]
    else:
        members = _Groups(size, weights, weight_dims)
        results = run(
            cell, members.join_inputs(input, input_dim), members.weights, members.join(h0, h_dim),
            members.join(c0, c_dim), batch_sizes, groups * size, direction, *save,
        )  # fmt: skip
        parts = [members.part_features(results[0], groups), *map(members.part, results[1:])]
    return tuple(t for t, _ in parts), tuple(d for _, d in parts)


def layer_backward(
    run: Callable[..., Any], size: int, in_dims: Sequence[Any], cell: str,
    doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor,
    output: Tensor, cells: Tensor, saved: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    wanted: Sequence[int], resets: Tensor | None = None, dcells: Tensor | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # fmt: skip
    """The same for ``layer_backward``."""
    refuse(resets, dcells)
    _, *grad_dims, input_dim, output_dim, cells_dim, saved_dim, weight_dims = in_dims[:9]
    h_dim, c_dim, sizes_dim = in_dims[9:12]
    _refuse(size, sizes_dim)
    grads = list(zip((doutput, dh_n, dc_n), grad_dims, strict=True))
    if batch_sizes is None and all(d is None for d in weight_dims):
        rows = _Rows(size, input, input_dim)
        dinput, dweights, *dstates = run(
            cell, *(rows.join(*g) for g in grads), rows.join(input, input_dim),
            rows.join(output, output_dim), rows.join_times(cells, cells_dim),
            rows.join_times(saved, saved_dim), weights, rows.join(h0, h_dim),
            rows.join(c0, c_dim), None, groups, direction,
            [*wanted[:3], *(size * parts for parts in wanted[3:])],
        )  # fmt: skip
        found = [rows.part(dinput), *map(rows.part, dstates)]
        by_weight = [
            rows.part_gradients(g, n) for g, n in zip(dweights, wanted[3:], strict=True)
        ]
    else:
        members = _Groups(size, weights, weight_dims)
        dinput, dweights, *dstates = run(
            cell, members.join_features(doutput, grad_dims[0], groups),
            *(members.join(*g) for g in grads[1:]),
            members.join_inputs(input, input_dim, own=bool(wanted[0])),
            members.join_features(output, output_dim, groups), members.join(cells, cells_dim),
            members.join(saved, saved_dim), members.weights, members.join(h0, h_dim),
            members.join(c0, c_dim), batch_sizes, groups * size, direction,
            wanted,
        )  # fmt: skip
        found = [members.part_features(dinput, members.inputs), *map(members.part, dstates)]
        by_weight = members.part_weights(dweights, wanted[3:])
    (dinput, input_dim), *states = found
    return (
        (dinput, [g for g, _ in by_weight], *(t for t, _ in states)),
        (input_dim, [d for _, d in by_weight], *(d for _, d in states)),
    )


def refuse(resets: Tensor | None = None, dcells: Tensor | None = None) -> None:
    """Raises where the operators are given what has no rule here."""
    if resets is not None or dcells is not None:
        raise RuntimeError("fastrnn: vmap over operators with resets or dcells is not possible")


def _refuse(size: int, batch_sizes_dim: Dim) -> None:
    if size == 0:
        raise RuntimeError("fastrnn: vmap over a dimension of size 0 is not possible")
    if batch_sizes_dim is not None:
        raise RuntimeError("fastrnn: vmap over batch_sizes of packed data is not possible")


def _in_front(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    """[S, ...]; expanded where all share it."""
    if dim == 0:
        return tensor
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _split(tensor: Tensor, dim: int, *counts: int) -> Tensor:
    """A view with a dimension cut into ``counts`` equal parts, and these again: what ``unflatten``
    does, which takes several times as long."""
    shape = list(tensor.shape)
    shape[dim : dim + 1] = (*counts, shape[dim] // math.prod(counts))
    return tensor.view(shape)


def _is_absent(tensor: Tensor) -> bool:
    """Whether it is the empty tensor [0] that stands for what a cell does not have, or for a
    gradient that is not wanted."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


class _Rows:
    """The mapped batch as rows of one call: arrays [..., B, width] become [..., S * B, width]."""

    def __init__(self, size: int, input: Tensor, input_dim: Dim) -> None:
        self.size = size
        self.T = _in_front(input, input_dim, size).shape[1]

    def join(self, tensor: Tensor | None, dim: Dim) -> Tensor | None:
        """[T or D, B, width] -> [T or D, S * B, width]"""
        if tensor is None or (dim is None and _is_absent(tensor)):
            return tensor
        return _in_front(tensor, dim, self.size).transpose(0, 1).flatten(1, 2)

    def part(self, tensor: Tensor) -> tuple[Tensor, Dim]:
        return (tensor, None) if _is_absent(tensor) else (self._split(tensor, 1), 1)

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        return _split(tensor, dim, self.size)

    def join_times(self, tensor: Tensor, dim: Dim) -> Tensor:
        """[D, T * B, width] -> [D, T * S * B, width]"""
        if dim is None and _is_absent(tensor):
            return tensor
        whole = _in_front(tensor, dim, self.size)
        return _split(whole, 2, self.T).movedim(0, 2).flatten(1, 3)

    def part_times(self, tensor: Tensor) -> tuple[Tensor, Dim]:
        if _is_absent(tensor):
            return tensor, None
        whole = _split(tensor, 1, self.T, self.size)
        return whole.movedim(2, 0).flatten(2, 3), 0

    def part_gradients(self, tensor: Tensor, parts: int) -> tuple[Tensor, Dim]:
        """Of a weight: [S * parts, ...] -> [S, parts, ...], or [S, ...] of one part."""
        if parts == 0:
            return tensor, None
        if self.size * parts == 1:
            return tensor.unsqueeze(0), 0
        return (tensor if parts == 1 else self._split(tensor, 0)), 0


class _Groups:
    """The mapped batch as groups of one call: arrays [D, ...] become [D * S, ...], and features
    that lie side by side [..., D, width] become [..., D * S, width]."""

    def __init__(
        self, size: int, weights: Sequence[Tensor], dims: Sequence[Dim]
    ) -> None:
        self.size = size
        self._is_nested = bool(weights) and weights[0].dim() - (dims[0] is not None) == 3
        self.weights = [self._stacked(w, d) for w, d in zip(weights, dims, strict=True)]
        self.inputs = 1  # of a member: join_inputs

    def _stacked(self, weight: Tensor, dim: Dim) -> Tensor:
        """[S, ...], or of weights that are stacked already [R, ...] -> [R * S, ...]"""
        whole = _in_front(weight, dim, self.size)
        return whole.transpose(0, 1).flatten(0, 1) if self._is_nested else whole

    def join(self, tensor: Tensor | None, dim: Dim) -> Tensor | None:
        """[D, ...] -> [D * S, ...]"""
        if tensor is None or (dim is None and _is_absent(tensor)):
            return tensor
        return _in_front(tensor, dim, self.size).transpose(0, 1).flatten(0, 1)

    def part(self, tensor: Tensor) -> tuple[Tensor, Dim]:
        if _is_absent(tensor):
            return tensor, None
        stack = tensor.shape[0] // self.size
        return (tensor.unsqueeze(0) if stack == 1 else _split(tensor, 0, stack)), 1

    def join_features(self, tensor: Tensor | None, dim: Dim, count: int) -> Tensor | None:
        """[..., count * width] -> [..., count * S * width]"""
        if tensor is None:
            return None
        whole = _in_front(tensor, dim, self.size)
        return _split(whole, whole.dim() - 1, count).movedim(0, -2).flatten(-3)

    def part_features(self, tensor: Tensor, count: int) -> tuple[Tensor, Dim]:
        if _is_absent(tensor):
            return tensor, None
        last = tensor.dim() - 1
        if count == 1:
            return _split(tensor, last, self.size), last
        return _split(tensor, last, count, self.size).movedim(-2, 0).flatten(-2), 0

    def join_inputs(self, input: Tensor, dim: Dim, own: bool = False) -> Tensor:
        """The inputs of all members; one for all of them, if it is not mapped and need not be
        ``own`` to each (for gradients of its own)."""
        width = max(1, self.weights[0].shape[-1])
        features = input.movedim(dim, 0).shape[-1] if dim is not None else input.shape[-1]
        self.inputs = max(1, features // width)
        if dim is None and self.inputs == 1 and not own:
            return input
        joined = self.join_features(input, dim, self.inputs)
        assert joined is not None
        return joined

    def part_weights(
        self, gradients: Sequence[Tensor], wanted: Sequence[int]
    ) -> list[tuple[Tensor, Dim]]:
        """Of each weight, those of its members: [S, ...], or of n > 1 parts [n, S, ...]."""
        found: list[tuple[Tensor, Dim]] = []
        for gradient, parts in zip(gradients, wanted, strict=True):
            dim = int(parts > 1)
            if parts and self._is_nested:
                gradient = _split(gradient, dim, gradient.shape[dim] // self.size)
            found.append((gradient, dim + self._is_nested if parts else None))
        return found
