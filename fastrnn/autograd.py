"""The derivatives of ``layer`` and of ``step``, one step of it, of any order.

Eager calls run here, forward and backward on the kernels. Calls that are traced (torch.compile,
torch.export, torch.jit.trace) put the operator itself into the graph, with the derivatives of
traced.py. Calls under torch.func, and backward passes that are differentiated or transformed
themselves, run in transforms.py. Forward-mode derivatives are those of ``reference.layer``, which
is plain PyTorch, and ``_backend.report`` says so.

Dimension key: see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _backend, _ops, checks, derivatives, modes, reference, segments, transforms
from .derivatives import Call


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    groups: int,
    direction: int,
    batch_first: bool = False,
    resets: Tensor | None = None,
    keep_cells: bool = False,
    recompute: bool | int = False,
) -> tuple[Tensor, ...]:
    """Output, h_n and c_n of ``reference.layer``, on the backend that the tensors and the user's
    choice give, with derivatives; with ``keep_cells`` also c of every step. ``batch_first``: the
    output is [B, T, D * P]. ``recompute``: segments.py."""
    call = Call(cell, batch_sizes, groups, direction, resets)
    leaves = (input, h0, c0, *weights)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling:
        backend = _backend.while_compiling(input.device, input.dtype)
    else:
        backend = _backend.resolve(leaves)
    results: tuple[Tensor, ...]
    if backend != "reference" and (resets is not None or keep_cells):
        backend = _with_rules(backend)
    if recompute and _is_recorded(*leaves):
        results = segments.layer(backend, call, leaves, segments.steps_of(recompute, call, input))
    elif backend == "reference":
        results = _on_reference(call, leaves, keep_cells)
    elif is_compiling or modes.is_traced():
        results = _operator(backend, call, leaves, keep_cells)
    else:
        return layer_of(
            backend, cell, input, weights, h0, c0, batch_sizes, groups, direction, batch_first,
            resets, keep_cells,
        )  # fmt: skip
    return _batch_first(results) if batch_first else results


def _with_rules(backend: str) -> str:
    """The backend where it has rules for resets and c of every step."""
    if not torch._C._are_functorch_transforms_active():
        return backend
    _backend.report(f"the {backend} kernels have no rules of torch.func for resets and all states")
    return "reference"


def _batch_first(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results[0].transpose(0, 1), *results[1:]


@torch._disable_dynamo  # torch.compile breaks the graph here
def _on_reference(
    call: Call, leaves: Sequence[Tensor | None], keep_cells: bool
) -> tuple[Tensor, ...]:
    input, h0, c0, *weights = leaves
    assert input is not None
    checks.one_dtype_and_device(input, leaves[1:])
    run: Any = reference.layer
    results: tuple[Tensor, ...] = run(call.cell, input, weights, h0, c0, *call[1:])
    return results[: 4 if keep_cells else 3]


def _operator(
    backend: str, call: Call, leaves: Sequence[Tensor | None], keep_cells: bool
) -> tuple[Tensor, ...]:
    """The operator as a node of a graph. An exported or traced one is for inference: gradients that
    are asked of it nevertheless compute again what backward needs."""
    input, h0, c0, *weights = leaves
    is_for_inference = torch.compiler.is_exporting() or modes.is_traced()
    save = keep_cells or (_wants_gradients(*leaves) and not is_for_inference)
    results: tuple[Tensor, ...] = _ops.operators(backend).layer(
        call.cell, input, weights, h0, c0, call.batch_sizes, call.groups, call.direction, save,
        call.resets,
    )  # fmt: skip
    return results[: 4 if keep_cells else 3]


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_recorded(*tensors: Tensor | None) -> bool:
    return _wants_gradients(*tensors) and not torch.is_inference_mode_enabled()


def layer_of(
    backend: str, cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    batch_first: bool = False, resets: Tensor | None = None, keep_cells: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``layer`` for tensors that the kernels of this backend take."""
    results: tuple[Tensor, ...]
    if torch._C._are_functorch_transforms_active():
        results = transforms.layer(
            layer_of, backend, cell, input, weights, h0, c0, batch_sizes, groups, direction
        )
        return _batch_first(results) if batch_first else results
    save = _is_recorded(input, h0, c0, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        results = _ops.operators(backend).layer(
            cell, input, list(weights), h0, c0, batch_sizes, groups, direction, save or keep_cells,
            resets,
        )  # fmt: skip
        if not save:
            if batch_first:
                results[0].transpose_(0, 1)  # in place: no view, as torch.nn's
            return results[: 4 if keep_cells else 3]
    how = (backend, cell, groups, direction, keep_cells, batch_first)
    results = Layer.apply(how, batch_sizes, resets, results, input, h0, c0, *weights)
    return results


def record(
    cell: str, batch_first: bool, results: tuple[Any, ...], leaves: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Records results of the operator for one native group over a dense batch, which
    csrc/python_stream.cpp computed. The leaves are plain tensors: ``Function.apply`` looks for
    others."""
    if torch.is_inference_mode_enabled():
        if batch_first:
            results[0].transpose_(0, 1)
        return results[:3]
    recorded: tuple[Tensor, Tensor, Tensor | None] = _apply_to_plain(
        ("native", cell, 1, 0, False, batch_first), None, None, results, *leaves
    )
    return recorded


class Layer(Function):
    """A call of a backend's operator that saved what backward needs, as part of a graph."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[Any, ...], batch_sizes: Tensor | None, resets: Tensor | None,
        results: tuple[Any, ...], *leaves: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        output, h_n, c_n, cells, saved = results
        # The user may change the output in place, as torch.nn allows. `data` is an alias that is
        # saved without a check for that; whether it happened is what `changes` counts.
        ctx.save_for_backward(batch_sizes, resets, output.data, cells, saved, *leaves)
        *_, keep_cells, batch_first = how
        if batch_first:
            output.transpose_(0, 1)  # in place: no view, as torch.nn's
        changes = _version_counter(output)
        ctx.how, ctx.changes, ctx.version = how, changes, changes._version
        ctx.set_materialize_grads(False)
        return (output, h_n, c_n, cells) if keep_cells else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[_BEFORE_LEAVES:]
        backend, cell, groups, direction, _, batch_first = ctx.how
        if not reference.CELLS[cell].has_c:
            grads = grads[:2]  # those of empty tensors
        if all(g is None for g in grads):
            return (None,) * (_BEFORE_LEAVES + len(wanted))
        doutput, dh_n, dc_n, dcells = (*grads, None, None)[:4]
        if batch_first and doutput is not None:
            doutput = doutput.transpose(0, 1)
        grads = (doutput, dh_n, dc_n, dcells)
        batch_sizes, resets, output, cells, saved, *leaves = ctx.saved_tensors
        input, h0, c0, *weights = leaves
        call = (h0, c0, batch_sizes, groups, direction)
        operators = _ops.operators(backend)
        if ctx.changes._version != ctx.version:
            output = operators.layer(cell, input, weights, *call, False, resets)[0]
        if _is_differentiated(grads):
            found = _differentiable_gradients(
                backend, Call(cell, *call[2:], resets), grads, (output, cells, saved), leaves,
                wanted,
            )  # fmt: skip
            return *(None,) * _BEFORE_LEAVES, *found
        with torch._C._AutoDispatchBelowAutograd():
            dinput, dweights, dh0, dc0 = operators.layer_backward(
                cell, *grads[:3], input, output, cells, saved, weights, *call,
                list(map(int, wanted)), resets, dcells,
            )  # fmt: skip
        results = zip((dinput, dh0, dc0, *dweights), wanted, strict=True)
        return *(None,) * _BEFORE_LEAVES, *(g if want else None for g, want in results)


_BEFORE_LEAVES = 4  # arguments
_apply_to_plain = super(Function, Layer).apply


def step(
    cell: str, input: Tensor, weights: Sequence[Tensor], h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step of ``layer``: input [B, I], h and c [B, H] or None -> h' and c'."""
    if not (torch.compiler.is_compiling() or modes.is_traced()):
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
    if torch._C._are_functorch_transforms_active():
        data, h0, c0 = _with_time(input, h, c)
        _, h_n, c_n = layer_of(backend, cell, data, weights, h0, c0, None, 1, 0)
        return h_n.squeeze(0), c_n.squeeze(0)
    if _is_recorded(input, h, c, *weights):
        results: tuple[Tensor, Tensor] = Step.apply(backend, cell, input, h, c, *weights)
        return results
    data, h0, c0 = _with_time(input, h, c)
    run = _ops.operators(backend).layer
    with torch._C._AutoDispatchBelowAutograd():
        _, h_n, c_n, _, _ = run(cell, data, weights, h0, c0, None, 1, 0, False)
    return h_n.squeeze_(0), c_n.squeeze_(0)  # in place: no views


class Step(Function):
    """``step`` on the kernels of a backend."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        backend, cell, input, h, c, *weights = arguments
        data, h0, c0 = _with_time(input, h, c)
        run = _ops.operators(backend).layer
        with torch._C._AutoDispatchBelowAutograd():
            output, h_n, c_n, cells, saved = run(
                cell, data, weights, h0, c0, None, 1, 0, True
            )
        ctx.save_for_backward(output, cells, saved, input, h, c, *weights)
        ctx.backend, ctx.cell = backend, cell
        ctx.set_materialize_grads(False)
        return h_n.squeeze_(0), c_n.squeeze_(0)  # no views: the user may change them in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * (2 + len(wanted))
        output, cells, saved, input, h, c, *weights = ctx.saved_tensors
        data, h0, c0, dh_n, dc_n = _with_time(input, h, c, *grads)
        if _is_differentiated(grads):
            dinput, dh, dc, *dweights = _differentiable_gradients(
                ctx.backend, Call(ctx.cell, None, 1, 0), (None, dh_n, dc_n, None),
                (output, cells, saved), (data, h0, c0, *weights), wanted,
            )  # fmt: skip
            of_data = (g if g is None else g.squeeze(0) for g in (dinput, dh, dc))
            return None, None, *of_data, *dweights
        with torch._C._AutoDispatchBelowAutograd():
            dinput, dweights, dh, dc = _ops.operators(ctx.backend).layer_backward(
                ctx.cell, None, dh_n, dc_n, data, output, cells, saved, weights, h0, c0,
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
    if type(tensor) is not Tensor:
        counter.data = tensor.new_empty(0)
        return counter
    key = (tensor.dtype, tensor.device)
    if key not in _NOTHING:
        _NOTHING[key] = tensor.new_empty(0)
    counter.data = _NOTHING[key]
    return counter


_NOTHING: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # kept, as making one takes time


def _is_differentiated(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is part of something larger: differentiated itself, or mapped."""
    return torch.is_grad_enabled() or modes.is_transformed(grads)


def _differentiable_gradients(
    backend: str, call: Call, grads: Sequence[Tensor | None], kept: Sequence[Tensor],
    leaves: Sequence[Tensor | None], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the leaves that are wanted: on the kernels, or where they cannot run, which
    is reported, those of the reference."""
    reason = _backend.why_not(backend, (leaves[0], *grads))  # what was saved was asked in forward
    if reason is None:
        return transforms.layer_gradients(backend, call, grads, kept, leaves, wanted)
    _backend.report(reason)
    return derivatives.gradients(call, grads, leaves, list(map(int, wanted)))


__all__ = ["layer", "layer_of", "step", "step_of"]
