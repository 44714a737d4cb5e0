"""The two operators of csrc/ops.cpp on Triton kernels: ``layer`` and ``layer_backward``.

Dimension key, and the arrays of a pass: csrc/scan.h. Input products and the gradients of weights
are products over all steps, by torch; between them a pass runs along time, with the kernels that
plan.py chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backward import BackwardPass
from .forward import ForwardPass
from .launch import on
from .problem import Problem


def layer(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None,
    batch_sizes: Tensor | None, groups: int, direction: int, save: bool,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run all groups of one layer: the contract of ``torch.ops.fastrnn.layer``.

    Raises:
        RuntimeError: arguments of wrong shape, dtype or device.
    """
    p = Problem(cell, input, weights, h0, batch_sizes, groups, direction, resets)
    p.check_c(c0)
    with on(input.device):
        return ForwardPass(p, input, h0, c0, save).run()


def layer_backward(
    cell: str, doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor,
    output: Tensor, cells: Tensor, saved: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    wanted: Sequence[int], resets: Tensor | None = None, dcells: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """The gradients of ``layer``: the contract of ``torch.ops.fastrnn.layer_backward``.

    Raises:
        RuntimeError: arguments of wrong shape, dtype or device.
    """
    p = Problem(cell, input, weights, h0, batch_sizes, groups, direction, resets)
    p.check_c(c0, dc_n, dcells)
    p.check_wanted(wanted, len(weights))
    with on(input.device):
        run = BackwardPass(p, (doutput, dh_n, dc_n, dcells), (output, cells, saved), h0, c0)
        run.run(bool(wanted[1]))
        flat = input.contiguous().view(p.N, p.M, p.I)
        none, members = input.new_empty(0), max(p.stacked, 1)
        per_group = len(weights) * members // groups
        dweights = []
        for i, parts in enumerate(wanted[3:]):
            entry, kind = divmod(i, per_group)
            own = range(entry * members, (entry + 1) * members)
            found = [run.dweight(d, kind, flat, parts) for d in own] if parts else [none.clone()]
            whole = torch.stack(found, int(parts > 1)) if p.stacked and parts else found[0]
            dweights.append(whole)
        dinput = run.dinput().view(input.shape) if wanted[0] else none
        dh0 = run.dh0.to(p.dtype) if wanted[1] else input.new_empty(0)
        dc0 = run.dc0.to(p.dtype) if wanted[2] else input.new_empty(0)
    return dinput, dweights, dh0, dc0


__all__ = ["layer", "layer_backward"]
