"""What PyTorch has to know of the operators to trace, transform and differentiate them as they are:
the shapes of their results, their derivatives, and what vmap makes of them.

torch.compile, torch.export, torch.jit.trace and direct calls of ``torch.ops`` come here; eager
calls have their own, faster way in autograd.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.utils import _pytree as pytree

from . import batching, derivatives, modes, reference

# csrc/ops.cpp has the same.
LAYER = (
    "layer(str cell, Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, "
    "int groups, int direction, bool save, Tensor? resets=None) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)"
)
LAYER_BACKWARD = (
    "layer_backward(str cell, Tensor? doutput, Tensor? dh_n, Tensor? dc_n, Tensor input, "
    "Tensor output, Tensor cells, Tensor saved, Tensor[] weights, Tensor? h0, Tensor? c0, "
    "Tensor? batch_sizes, int groups, int direction, int[] wanted, Tensor? resets=None, "
    "Tensor? dcells=None) "
    "-> (Tensor dinput, Tensor[] dweights, Tensor dh0, Tensor dc0)"
)


def describe(library: str) -> None:
    """Register all of it for ``layer`` and ``layer_backward`` of ``torch.ops.<library>``."""
    layer, layer_backward = f"{library}::layer", f"{library}::layer_backward"
    operators = getattr(torch.ops, library)
    torch.library.register_fake(layer, _layer_fake)
    torch.library.register_fake(layer_backward, _layer_backward_fake)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _layer_gradients(operators, ctx, *grads[:4])

    _register_derivative(operators.layer.default, backward, _keep_layer)
    _register_derivative(
        operators.layer_backward.default, _second_gradients, _keep_layer_backward
    )

    def map_layer(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return batching.layer(operators.layer, info.batch_size, in_dims, *arguments)

    def map_layer_backward(info: Any, in_dims: Any, *arguments: Any) -> Any:
        run = operators.layer_backward
        return batching.layer_backward(run, info.batch_size, in_dims, *arguments)

    torch.library.register_vmap(layer, map_layer)
    torch.library.register_vmap(layer_backward, map_layer_backward)


def _register_derivative(
    op: Any, backward: Callable[..., Any], keep: Callable[..., None]
) -> None:
    """What ``torch.library.register_autograd`` does; but it would lose tangents without a word."""
    kernel = make_autograd_impl(op, Info(backward, keep))

    def run(keyset: Any, *arguments: Any, **named: Any) -> Any:
        given = pytree.tree_leaves((arguments, named)) if modes.may_have_tangents() else ()
        if modes.has_tangents([t for t in given if isinstance(t, Tensor)]):
            raise RuntimeError(
                f"{op} has no forward-mode derivative: call the layer itself, not a compiled, "
                "exported or traced one"
            )
        # The dispatcher leaves out what is None by default at the end; the derivative counts it.
        absent = len(op._schema.arguments) - len(arguments) - len(named)
        return kernel(keyset, *arguments, *(None,) * absent, **named)

    library = torch.library.Library(op.namespace, "IMPL")
    library.impl(op._opname, run, "Autograd", with_keyset=True)
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # what they registered goes with them


def _sizes(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, resets: Tensor | None
) -> tuple[Any, int, int, int]:
    """The cell, H, P and B."""
    info = reference.CELLS[cell]
    if input.dim() == 3 or h0 is None:
        batch = input.shape[1]
    else:  # packed
        batch = h0.shape[1] if resets is None else h0.shape[1] // 2
    return info, weights[1].shape[-2] // info.gates, weights[1].shape[-1], batch


def _layer_fake(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None,
    batch_sizes: Tensor | None, groups: int, direction: int, save: bool,
    resets: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer``, for tensors without data."""
    info, hidden, size, batch = _sizes(cell, input, weights, h0, resets)
    rows = math.prod(input.shape[:-1])
    compute = reference.compute_dtype(input.dtype)
    keeps = save and info.has_c
    return (
        input.new_empty([*input.shape[:-1], groups * size]),
        input.new_empty([groups, batch, size]),
        input.new_empty([groups, batch, hidden] if info.has_c else [0]),
        input.new_empty([groups, rows, hidden] if keeps else [0], dtype=compute),
        input.new_empty([groups, rows, info.saved * hidden] if save else [0]),
    )


def _layer_backward_fake(
    cell: str, doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor,
    output: Tensor, cells: Tensor, saved: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    wanted: Sequence[int], resets: Tensor | None = None, dcells: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer_backward``, for tensors without data."""
    _, hidden, size, batch = _sizes(cell, input, weights, h0, resets)
    entering = batch if resets is None else 2 * batch
    shapes = [input.shape, [groups, entering, size], [groups, entering, hidden]]
    made = [
        input.new_empty(shape if want else [0])
        for shape, want in zip(shapes, wanted[:3], strict=True)
    ]
    dweights = [
        input.new_empty([n, *w.shape] if n > 1 else w.shape if n else [0])
        for w, n in zip(weights, wanted[3:], strict=True)
    ]
    return made[0], dweights, made[1], made[2]


def _keep_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell, input, weights, h0, c0, batch_sizes, *rest, resets = inputs
    ctx.groups, ctx.direction, ctx.save = rest
    out, _, _, cells, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, h0, c0, batch_sizes, resets, out, cells, saved, *weights)


def _layer_gradients(
    operators: Any, ctx: Any, doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
    dcells: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of the arguments of ``layer``."""
    input, h0, c0, batch_sizes, resets, output, cells, saved, *weights = ctx.saved_tensors
    if not reference.CELLS[ctx.cell].has_c:
        dc_n = dcells = None
    if doutput is None and dh_n is None and dc_n is None and dcells is None:
        return (None, None, [None] * len(weights), *(None,) * 7)
    call = (h0, c0, batch_sizes, ctx.groups, ctx.direction)
    if not ctx.save:  # nobody knew of gradients: what they need is computed now
        output, _, _, cells, saved = operators.layer(ctx.cell, input, weights, *call, True, resets)
    needs = ctx.needs_input_grad
    of_input, of_weights, of_states = needs[1], list(needs[2]), needs[3:5]
    dinput, dweights, *dstates = operators.layer_backward(
        ctx.cell, doutput, dh_n, dc_n, input, output, cells, saved, weights, *call,
        [int(want) for want in (of_input, *of_states, *of_weights)], resets, dcells,
    )  # fmt: skip
    return (
        None, dinput if of_input else None,
        [g if want else None for g, want in zip(dweights, of_weights, strict=True)],
        *(g if want else None for g, want in zip(dstates, of_states, strict=True)),
        *(None,) * 5,
    )  # fmt: skip


def _keep_layer_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    cell, *grads, input, _, _, _, weights, h0, c0, batch_sizes, groups, direction = inputs[:-3]
    wanted, resets, dcells = inputs[-3:]
    ctx.call = (cell, groups, direction, wanted)
    ctx.save_for_backward(*grads, dcells, batch_sizes, resets, input, h0, c0, *weights)


def _second_gradients(
    ctx: Any, of_input: Tensor, of_weights: list[Tensor], *of_states: Tensor
) -> tuple[Any, ...]:
    """The gradients of the arguments of ``layer_backward``: of the gradients it was given, and of
    the layer's own arguments."""
    cell, groups, direction, wanted = ctx.call
    *grads, batch_sizes, resets, input, h0, c0 = ctx.saved_tensors[:9]
    weights = ctx.saved_tensors[9:]
    needs = ctx.needs_input_grad  # of the arguments of the operator, in their order
    found = derivatives.second_gradients(
        derivatives.Call(cell, batch_sizes, groups, direction, resets), grads,
        [input, h0, c0, *weights], wanted, [of_input, *of_states, *of_weights],
        [*needs[1:4], needs[16], needs[4], *needs[9:11], *needs[8]],
    )  # fmt: skip
    *dgrads, dcells, dinput, dh0, dc0 = found[:7]
    return (
        None, *dgrads, dinput, None, None, None, found[7:], dh0, dc0, *(None,) * 5, dcells
    )  # fmt: skip


__all__ = ["LAYER", "LAYER_BACKWARD", "describe"]
