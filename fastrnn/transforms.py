"""``layer`` and its backward pass as functions that torch.func transforms (grad, vjp, vmap and what
is made of them), and that can be differentiated again.

Both run on the kernels, a mapped batch in one call (batching.py); the second derivative runs in
plain PyTorch (derivatives.py). How functions pass through transforms: levels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops, batching, derivatives, levels, reference
from .levels import LevelFunction

_CALL = 6  # arguments before the tensors: backend, cell, batch_sizes, groups, direction, resets


def layer(
    below: Callable[..., tuple[Tensor, ...]], backend: str, cell: str, input: Tensor,
    weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, batch_sizes: Tensor | None,
    groups: int, direction: int,
) -> Any:  # fmt: skip
    """Output, h_n and c_n under the innermost transform, without resets; ``below`` is the same
    outside of it."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    kind = innermost.key()
    call = (batch_sizes, groups, direction)
    leaves = (input, h0, c0, *weights)
    if kind == torch._C._functorch.TransformType.Grad:
        return Layer.apply(backend, cell, *call, None, *leaves)[:3]
    if kind != torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(f"fastrnn has no rule for the transform {kind}")
    run = functools.partial(below, backend)

    def plain(input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> Any:
        return run(cell, input, weights, h0, c0, *call)

    def mapped(size: int, in_dims: Sequence[Any], *leaves: Any) -> Any:
        input_dim, h_dim, c_dim, *weight_dims = in_dims
        input, h0, c0, *weights = leaves
        dims = (None, input_dim, weight_dims, h_dim, c_dim, None)
        return batching.layer(run, size, dims, cell, input, weights, h0, c0, *call)

    return levels.under_vmap(innermost, leaves, mapped, plain)


class Layer(LevelFunction):
    """Arguments: backend, cell, batch_sizes, groups, direction, resets, input, h0, c0, *weights.
    Results: those of the operator."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        backend, cell, batch_sizes, groups, direction, resets, input, h0, c0, *weights = arguments
        run = _ops.operators(backend).layer
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = run(
                cell, input, weights, h0, c0, batch_sizes, groups, direction, True, resets
            )
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.cell, batch_sizes, ctx.groups, ctx.direction, resets, *leaves = inputs
        out, _, _, cells, saved = output
        ctx.mark_non_differentiable(cells, saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, out, cells, saved, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, resets, output, cells, saved, *leaves = ctx.saved_tensors
        call = derivatives.Call(ctx.cell, batch_sizes, ctx.groups, ctx.direction, resets)
        kept = (output, cells, saved)
        wanted = ctx.needs_input_grad[_CALL:]
        found = layer_gradients(ctx.backend, call, (*grads[:3], None), kept, leaves, wanted)
        return (*(None,) * _CALL, *found)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        backend, cell, batch_sizes, groups, direction, resets, input, h0, c0, *weights = arguments
        _, _, sizes_dim, _, _, _, input_dim, h_dim, c_dim, *weight_dims = in_dims
        batching.refuse(resets)

        def run(cell: str, input: Tensor, weights: Any, h0: Any, c0: Any, *call: Any) -> Any:
            return Layer.apply(backend, cell, *call, None, input, h0, c0, *weights)

        dims = (None, input_dim, weight_dims, h_dim, c_dim, sizes_dim)
        return batching.layer(
            run, info.batch_size, dims, cell, input, weights, h0, c0, batch_sizes, groups, direction
        )


class LayerBackward(LevelFunction):
    """Arguments: backend, cell, batch_sizes, groups, direction, resets, wanted, doutput, dh_n,
    dc_n, dcells, output, cells, saved, input, h0, c0, *weights. Results: the gradients of input,
    h0, c0 and weights, [0] where not wanted (an integer each, see the operator)."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        backend, cell, batch_sizes, groups, direction, resets, wanted, *tensors = arguments
        *grads, dcells, output, cells, saved, input, h0, c0 = tensors[:10]
        run = _ops.operators(backend).layer_backward
        with torch._C._AutoDispatchBelowAutograd():
            dinput, dweights, dh0, dc0 = run(
                cell, *grads, input, output, cells, saved, tensors[10:], h0, c0, batch_sizes,
                groups, direction, list(wanted), resets, dcells,
            )  # fmt: skip
        return dinput, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.cell, batch_sizes, ctx.groups, ctx.direction, resets, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, *tensors[:4], *tensors[7:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, resets, *given = ctx.saved_tensors
        call = derivatives.Call(ctx.cell, batch_sizes, ctx.groups, ctx.direction, resets)
        needs = ctx.needs_input_grad[_CALL + 1 :]
        found = derivatives.second_gradients(
            call, given[:4], given[4:], ctx.wanted, cotangents,
            [*needs[:4], *needs[7:]],
        )  # fmt: skip
        # What forward kept is not differentiated: the second derivative computes it anew.
        return (*(None,) * (_CALL + 1), *found[:4], None, None, None, *found[4:])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        backend, cell, batch_sizes, groups, direction, resets, wanted, *tensors = arguments
        dims = in_dims[_CALL + 1 :]
        batching.refuse(resets, tensors[3])

        def run(cell: str, *rest: Any) -> Any:
            *tensors, weights, h0, c0, batch_sizes, groups, direction, wanted = rest
            doutput, dh_n, dc_n, input, output, cells, saved = tensors
            dinput, dh0, dc0, *dweights = LayerBackward.apply(
                backend, cell, batch_sizes, groups, direction, None, tuple(wanted), doutput, dh_n,
                dc_n, None, output, cells, saved, input, h0, c0, *weights,
            )  # fmt: skip
            return dinput, dweights, dh0, dc0

        def in_order(own: Sequence[Any]) -> list[Any]:
            """As the operator takes them."""
            *grads, _, output, cells, saved, input, h0, c0 = own[:10]
            return [*grads, input, output, cells, saved, list(own[10:]), h0, c0]

        in_dims = (None, *in_order(dims), in_dims[2])
        given = (cell, *in_order(tensors), batch_sizes, groups, direction, wanted)
        results, out_dims = batching.layer_backward(run, info.batch_size, in_dims, *given)
        (dinput, dweights, *dstates), (input_dim, weight_dims, *state_dims) = results, out_dims
        return (dinput, *dstates, *dweights), (input_dim, *state_dims, *weight_dims)


def layer_gradients(
    backend: str, call: derivatives.Call, grads: Sequence[Tensor | None], kept: Sequence[Tensor],
    leaves: Sequence[Tensor | None], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the leaves that are wanted, differentiable. kept: output, cells and saved of
    the forward pass."""
    if not reference.CELLS[call.cell].has_c:
        grads = (*grads[:2], None, None)
    if all(g is None for g in grads):
        return [None] * len(leaves)
    found = LayerBackward.apply(
        backend, *call, tuple(map(int, wanted)), *grads, *kept, *leaves
    )
    return [g if want else None for g, want in zip(found, wanted, strict=True)]


__all__ = ["Layer", "LayerBackward", "layer", "layer_gradients"]
