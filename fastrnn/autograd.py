"""The derivative of ``layer``, of any order.

Forward and backward run the operators. A backward pass that is itself differentiated
(``create_graph=True``), or that brings gradients for the saved activations (the backward of such a
pass), runs ``reference.layer_backward``, which is plain PyTorch and differentiable in everything.
The same runs under torch.func and forward-mode derivatives, which ``_ops.report`` says.

Dimension key: see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops, checks, reference


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    groups: int,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n of ``reference.layer``, on the backend that the tensors and the user's
    choice give, with derivatives."""
    if torch.compiler.is_compiling():
        return _layer_uncompiled(cell, input, weights, h0, c0, batch_sizes, groups, direction)
    return _layer(cell, input, weights, h0, c0, batch_sizes, groups, direction)


def _layer(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None,
    batch_sizes: Tensor | None, groups: int, direction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _ops.resolve((input, h0, c0, *weights)) == "reference":
        checks.one_dtype_and_device(input, (h0, c0, *weights))
        return reference.layer(cell, input, weights, h0, c0, batch_sizes, groups, direction)[:3]
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, h0, c0, *weights)
    ):
        return Layer.apply(cell, batch_sizes, groups, direction, input, h0, c0, *weights)[:3]
    return _ops.layer(cell, input, list(weights), h0, c0, batch_sizes, groups, direction, False)[:3]


# torch.compile breaks the graph here, as it does at torch.nn's layers.
_layer_uncompiled = torch._disable_dynamo(_layer)


class Layer(Function):
    """``layer`` on the native kernels. Its results c and saved of every step are differentiable
    too, so that a second derivative finds its way back through them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        cell, batch_sizes, groups, direction, input, h0, c0, *weights = arguments
        results = _ops.layer(cell, input, weights, h0, c0, batch_sizes, groups, direction, True)
        output, _, _, cells, saved = results
        ctx.save_for_backward(batch_sizes, input, h0, c0, output, cells, saved, *weights)
        ctx.cell, ctx.groups, ctx.direction = cell, groups, direction
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        if all(g is None for g in grads):
            return (None,) * (4 + len(wanted))
        batch_sizes, input, h0, c0, output, cells, saved, *weights = ctx.saved_tensors
        results: tuple[Any, ...]
        arguments: tuple[Any, ...]
        results = (input, output, cells, saved, weights, h0, c0, batch_sizes, ctx.groups)
        tensors = (input, *grads, output, cells, saved, h0, c0, *weights)
        why_not = _ops.why_not_native(tensors)
        if why_not is not None:
            _ops.report(why_not)
        differentiated = torch.is_grad_enabled() or grads[3] is not None or grads[4] is not None
        if why_not is None and not differentiated:
            arguments = (ctx.cell, *grads[:3], *results, ctx.direction, list(map(int, wanted)))
            dinput, dweights, dh0, dc0 = _ops.layer_backward(*arguments)
        else:
            arguments = (ctx.cell, *grads, *results, ctx.direction)
            dinput, dweights, dh0, dc0 = reference.layer_backward(*arguments)
        gradients = zip((dinput, dh0, dc0, *dweights), wanted, strict=True)
        return (None, None, None, None, *(g if want else None for g, want in gradients))


__all__ = ["layer"]
