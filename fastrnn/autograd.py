"""The derivatives of ``layer`` and of ``step``, one step of it, of any order.

Forward and backward run the operators. A backward pass that is itself differentiated
(``create_graph=True``) differentiates ``reference.layer``, which is plain PyTorch, and so do
backward passes under torch.func and with forward-mode derivatives, which ``_backend.report`` says.

Dimension key: see reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _backend, _ops, checks, reference


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
    backend = _backend.resolve((input, h0, c0, *weights))
    if backend == "reference":
        checks.one_dtype_and_device(input, (h0, c0, *weights))
        return reference.layer(cell, input, weights, h0, c0, batch_sizes, groups, direction)[:3]
    return layer_of(backend, cell, input, weights, h0, c0, batch_sizes, groups, direction)


def layer_of(
    backend: str, cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``layer`` for tensors that the kernels of this backend take."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, h0, c0, *weights)
    ):
        results: tuple[Tensor, Tensor, Tensor]
        results = Layer.apply(
            backend, cell, batch_sizes, groups, direction, input, h0, c0, *weights
        )
        return results
    run = _ops.operators(backend).layer
    return run(cell, input, list(weights), h0, c0, batch_sizes, groups, direction, False)[:3]


# torch.compile breaks the graph here, as it does at torch.nn's layers.
_layer_uncompiled = torch._disable_dynamo(_layer)


class Layer(Function):
    """``layer`` on the kernels of a backend."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        backend, cell, batch_sizes, groups, direction, input, h0, c0, *weights = arguments
        output, h_n, c_n, cells, saved = _ops.operators(backend).layer(
            cell, input, weights, h0, c0, batch_sizes, groups, direction, True
        )
        # The user may change the output in place, as torch.nn allows. `data` is an alias that is
        # saved without a check for that; whether it happened is what `changes` counts.
        ctx.save_for_backward(batch_sizes, input, h0, c0, output.data, cells, saved, *weights)
        ctx.changes = _version_counter(output)
        ctx.backend, ctx.cell, ctx.groups, ctx.direction = backend, cell, groups, direction
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[5:]
        if all(g is None for g in grads):
            return (None,) * (5 + len(wanted))
        batch_sizes, input, h0, c0, output, cells, saved, *weights = ctx.saved_tensors
        call = (h0, c0, batch_sizes, ctx.groups, ctx.direction)
        if _differentiates_reference(ctx.backend, input, grads):
            gradients = _reference_gradients(
                lambda: reference.layer(ctx.cell, input, weights, *call)[:3],
                grads, (input, h0, c0, *weights), wanted,
            )  # fmt: skip
            return (None, None, None, None, None, *gradients)
        operators = _ops.operators(ctx.backend)
        if ctx.changes._version:
            output = operators.layer(ctx.cell, input, weights, *call, False)[0]
        dinput, dweights, dh0, dc0 = operators.layer_backward(
            ctx.cell, *grads, input, output, cells, saved, weights, *call, list(map(int, wanted))
        )
        found = zip((dinput, dh0, dc0, *dweights), wanted, strict=True)
        return (None, None, None, None, None, *(g if want else None for g, want in found))


def step(
    cell: str, input: Tensor, weights: Sequence[Tensor], h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step of ``layer``: input [B, I], h and c [B, H] or None -> h' and c'."""
    if not torch.compiler.is_compiling():
        backend = _backend.resolve((input, h, c, *weights))
        if backend != "reference":
            return step_of(backend, cell, input, weights, h, c)
    data, h0, c0 = _with_time(input, h, c)
    _, h_n, c_n = layer(cell, data, weights, h0, c0, None, 1, 0)
    return h_n.squeeze(0), c_n.squeeze(0)


def step_of(
    backend: str, cell: str, input: Tensor, weights: Sequence[Tensor], h: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``step`` for tensors that the kernels of this backend take."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, h, c, *weights)
    ):
        results: tuple[Tensor, Tensor] = Step.apply(backend, cell, input, h, c, *weights)
        return results
    data, h0, c0 = _with_time(input, h, c)
    run = _ops.operators(backend).layer
    _, h_n, c_n, _, _ = run(cell, data, weights, h0, c0, None, 1, 0, False)
    return h_n.squeeze_(0), c_n.squeeze_(0)  # in place: no views


class Step(Function):
    """``step`` on the kernels of a backend."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        backend, cell, input, h, c, *weights = arguments
        data, h0, c0 = _with_time(input, h, c)
        output, h_n, c_n, cells, saved = _ops.operators(backend).layer(
            cell, data, weights, h0, c0, None, 1, 0, True
        )
        ctx.save_for_backward(input, h, c, output, cells, saved, *weights)
        ctx.backend, ctx.cell = backend, cell
        ctx.set_materialize_grads(False)
        return h_n.squeeze_(0), c_n.squeeze_(0)  # no views: the user may change them in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * (2 + len(wanted))
        input, h, c, output, cells, saved, *weights = ctx.saved_tensors
        if _differentiates_reference(ctx.backend, input, grads):

            def run() -> list[Tensor]:
                data, h0, c0 = _with_time(input, h, c)
                results = reference.layer(ctx.cell, data, weights, h0, c0, None, 1, 0)
                return [results[1].squeeze(0), results[2].squeeze(0)]

            return None, None, *_reference_gradients(run, grads, (input, h, c, *weights), wanted)
        data, h0, c0 = _with_time(input, h, c)
        dinput, dweights, dh, dc = _ops.operators(ctx.backend).layer_backward(
            ctx.cell, None, *_with_time(*grads), data, output, cells, saved, weights, h0, c0,
            None, 1, 0, list(map(int, wanted)),
        )  # fmt: skip
        found = (dinput.squeeze_(0), dh.squeeze_(0), dc.squeeze_(0), *dweights)
        return None, None, *(g if want else None for g, want in zip(found, wanted, strict=True))


def _with_time(*tensors: Tensor | None) -> list[Any]:
    """[...] as [1, ...]: of one time step, or of one layer and direction."""
    return [t if t is None else t.unsqueeze(0) for t in tensors]


def _version_counter(tensor: Tensor) -> Tensor:
    """A tensor without memory that shares the version counter of another: its ``_version`` grows
    when that one, or a view of it, is changed in place."""
    counter = tensor.detach()
    counter.data = tensor.new_empty(0)
    return counter


def _differentiates_reference(
    backend: str, input: Tensor, grads: Sequence[Tensor | None]
) -> bool:
    """Whether a backward pass is PyTorch's own derivative of the reference: where it is to be
    differentiated itself, and where the kernels cannot run, which is reported."""
    reason = _backend.why_not(backend, (input, *grads))  # what was saved was asked in forward
    if reason is not None:
        _backend.report(reason)
    return reason is not None or torch.is_grad_enabled()


def _reference_gradients(
    run: Callable[[], Sequence[Tensor]],
    grads: Sequence[Tensor | None],
    leaves: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the leaves that are wanted, from those of the results of `run`;
    differentiable if gradients are enabled."""
    differentiated = torch.is_grad_enabled()
    inputs = [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None]
    with torch.enable_grad():
        results = run()
    kept = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad(
            [r for r, _ in kept], inputs, [g for _, g in kept],
            create_graph=differentiated, allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if want else None for want in wanted]


__all__ = ["layer", "layer_of", "step", "step_of"]
