"""Derivatives of a layer by PyTorch's own rules for the reference: of second order, and with
forward-mode derivatives. They can be differentiated and transformed again.

The leaves of a layer: input, h0, c0 and its weights, in this order; None where one is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference


class Call(NamedTuple):
    """What says how ``reference.layer`` runs, beside its leaves."""

    cell: str
    batch_sizes: Tensor | None
    groups: int
    direction: int
    resets: Tensor | None = None


Optional = Sequence[Tensor | None]


def gradients(
    call: Call, grads: Optional, leaves: Optional, wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradients of the leaves that are wanted, from those of output, h_n, c_n and cells. An
    integer n > 1 asks for those of a weight by n parts of the batch, as of the operator."""
    parts = max(wanted)
    if parts > 1:
        if set(wanted[3:]) - {0, parts}:
            raise RuntimeError(f"fastrnn: one number of parts for all weights, got {wanted[3:]}")
        return _gradients_of_parts(call, grads, leaves, wanted, parts)
    asked = [t if want else None for t, want in zip(leaves, wanted, strict=True)]

    def run(*own: Tensor) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = _with(leaves, asked, own)
        results = reference.layer(
            call.cell, input, weights, h0, c0, *call[1:]
        )
        return tuple(r for r, g in zip(results[:4], grads, strict=True) if g is not None)

    return _pulled(run, asked, [g for g in grads if g is not None])


def _gradients_of_parts(
    call: Call, grads: Optional, leaves: Optional, wanted: Sequence[int], parts: int
) -> list[Tensor | None]:
    """[parts, ...] of a weight, by the gradients of each part on its own."""
    rows, weights = [*grads, *leaves[:3]], leaves[3:]
    split: Optional = [
        t if t is None else t.unflatten(1, (parts, t.shape[1] // parts)) for t in rows
    ]
    each = [int(n > 0) for n in wanted]
    found: list[Tensor | None] = [None] * len(leaves)
    there = [i for i, (t, n) in enumerate(zip(leaves, each, strict=True)) if n and t is not None]

    def of_part(*own: Tensor) -> tuple[Tensor | None, ...]:
        given = _with(split, split, own)
        of_leaves = gradients(call, given[: len(grads)], [*given[len(grads) :], *weights], each)
        return tuple(of_leaves[i] for i in there)

    of_rows = [i < 3 for i in there]
    mapped = torch.func.vmap(of_part, in_dims=1, out_dims=tuple(map(int, of_rows)))
    results: Any = mapped(*(t for t in split if t is not None))
    for i, by_rows, result in zip(there, of_rows, results, strict=True):
        found[i] = result.flatten(1, 2) if by_rows else result
    return found


def second_gradients(
    call: Call, grads: Optional, leaves: Optional, wanted: Sequence[int], cotangents: Optional,
    needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the arguments of ``gradients``, grads and leaves, that are needed, from the
    cotangents of its results."""
    given = [*grads, *leaves]
    asked = [t if need else None for t, need in zip(given, needed, strict=True)]
    taken = [c is not None and want > 0 for c, want in zip(cotangents, wanted, strict=True)]

    def run(*own: Tensor) -> tuple[Tensor, ...]:
        all_of = _with(given, asked, own)
        found = gradients(call, all_of[: len(grads)], all_of[len(grads) :], wanted)
        return tuple(t for t, take in zip(found, taken, strict=True) if take and t is not None)

    kept = zip(cotangents, leaves, taken, strict=True)
    chosen = [c for c, leaf, take in kept if take and c is not None and leaf is not None]
    return _pulled(run, asked, chosen)


def _with(given: Optional, asked: Optional, own: Sequence[Tensor]) -> list[Any]:
    """What was given, with `own` in place of what was asked for."""
    rest = iter(own)
    return [t if a is None else next(rest) for t, a in zip(given, asked, strict=True)]


def _pulled(
    run: Callable[..., tuple[Tensor, ...]], asked: Optional, cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The vector-Jacobian product of `run`, a function of the tensors that are asked for."""
    own = [t for t in asked if t is not None]
    if not torch.is_grad_enabled():  # or torch.func would record what nobody differentiates
        own = [t.detach() for t in own]
    if not own or not cotangents:
        return [None] * len(asked)
    found: Iterator[Tensor] = iter(torch.func.vjp(run, *own)[1](tuple(cotangents)))
    return [None if t is None else next(found) for t in asked]
