"""A unidirectional net without gradients: what ``module.step`` runs, and ``forward`` where it can,
with as little around the kernels as there can be.

The weights are read where they lie, so that no update of them can be missed: in place, through
``.data``, by an optimizer or by ``load_state_dict``. What is kept from call to call is where they
lie, and a call that finds another tensor, or the same one elsewhere, looks anew.

Dimension key: see layers.py.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import _ops, checks
from .checks import LayerSpec

T = TypeVar("T")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class StepWeights(NamedTuple):
    """The weights of a net for its steps, for each layer weight_ih, weight_hh, both biases,
    weight_hr, both scales; and where the module holds each of them."""

    layers: list[tuple[Tensor | None, ...]]
    names: list[tuple[str | None, ...]]
    quantized: bool


class Stepper:
    """The steps over a module's weights, where these lie. Copies and pickles of the module do
    without it."""

    def __init__(self, module: nn.Module, spec: LayerSpec, weights: StepWeights) -> None:
        held = [
            (name in module._parameters, name, t)
            for names, layer in zip(weights.names, weights.layers, strict=True)
            for name, t in zip(names, layer, strict=True)
            if name is not None and t is not None
        ]
        tensors = [torch.empty(0) if t is None else t for layer in weights.layers for t in layer]
        net: int = torch.ops.fastrnn.step_net(
            spec.cell, tensors, spec.hidden_size, spec.output_size, weights.quantized
        )
        weakref.finalize(self, torch.ops.fastrnn.step_free, net)
        direct = importlib.import_module("fastrnn._C").DirectCall(
            _ops.plain_calls, Tensor, description_of(module), spec.has_c, held, net,
            _ops.step._op, _ops.step_out._op,
        )  # fmt: skip
        # call(attributes of the module, input [B, I], [I] or [T, B, I], state, out): output and
        # new state. None with gradients, dropout or anything but plain native calls, if the module
        # or a weight is another one or lies elsewhere, or an argument is not simply right.
        self.call: Callable[..., tuple[Tensor, Any] | None] = direct.call

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def weights_of_layers(
    spec: LayerSpec, names: Sequence[str], weights: Sequence[Tensor]
) -> StepWeights:
    """The weights of a plain module as a Stepper takes them."""
    per_layer = len(weights) // spec.num_layers

    def in_places(found: Sequence[T]) -> tuple[T | None, ...]:
        ih, hh, *rest = found
        hr = rest.pop() if spec.proj_size else None
        b_ih, b_hh = rest or (None, None)
        return ih, hh, b_ih, b_hh, hr, None, None

    parts = [slice(i * per_layer, (i + 1) * per_layer) for i in range(spec.num_layers)]
    return StepWeights(
        [in_places(weights[part]) for part in parts],
        [in_places(names[part]) for part in parts],
        quantized=False,
    )


def description_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that say what a layer or a cell computes."""
    names = ("mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "proj_size")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


def can_step(spec: LayerSpec, tensors: Sequence[Tensor]) -> bool:
    """Whether a Stepper can read these weights."""
    first = tensors[0]
    return (
        _ops.native_error is None
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and first.is_cpu
        and first.dtype in _DTYPES
        and not any(t.is_neg() for t in tensors)
        and all(t.is_contiguous() and t.dtype == first.dtype and t.is_cpu for t in tensors)
        and all(
            t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.element_size()
            for t in tensors
        )
        and tuple(t.shape for t in tensors) == tuple(map(torch.Size, spec.weight_shapes))
    )


def run(module: Any, input: Tensor, state: Any, out: Any = None) -> tuple[Tensor, Any] | None:
    """The steps of ``module`` over the input by its Stepper; None where the general path has to
    run, or to say what is wrong."""
    if torch.compiler.is_compiling() or _ops.native_error is not None:
        return None
    if out is not None and not _may_be_written(out):
        return None
    attributes = module.__dict__
    stepper: Stepper | None = attributes.get("_stepper")
    if stepper is not None:
        result = stepper.call(attributes, input, state, out)
        if result is not None:
            return result
    if torch.is_grad_enabled() or type(input) is not Tensor or not _ops.is_plain_native():
        return None
    if module.training and attributes.get("dropout"):
        return None
    attributes["_stepper"] = None
    try:
        stepper = attributes["_stepper"] = module._new_stepper()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return None if stepper is None else stepper.call(attributes, input, state, out)


def _may_be_written(out: Any) -> bool:
    """Whether the operator may write the new state, as an operator in place: its version grows, and
    tensors of inference mode are left to the general path outside of it."""
    targets = list(out) if isinstance(out, (tuple, list)) else [out]
    if not all(type(t) is Tensor for t in targets):
        return False
    if any(t.is_inference() for t in targets):
        return torch.is_inference_mode_enabled() and all(t.is_inference() for t in targets)
    torch.autograd.graph.increment_version(targets)
    return True


def step(module: Any, spec: LayerSpec, input: Tensor, state: Any, out: Any) -> tuple[Tensor, Any]:
    """``module.step`` for the layers of :mod:`fastrnn.modules`, outside its fast path."""
    if spec.directions == 2:
        raise ValueError(
            f"{spec.name}: a bidirectional layer has no single step, its reverse direction begins "
            "at the end of the sequence"
        )
    checks.step_input(spec, input)
    batched = input.dim() == 2
    data = input.unsqueeze(1 if batched and module.batch_first else 0)
    output, state = module(data, state)
    output = output.squeeze(1 if batched and module.batch_first else 0)
    if out is not None:
        checks.step_out(spec, out, state)
        for target, value in zip(
            out if spec.has_c else [out], state if spec.has_c else [state], strict=True
        ):
            target.copy_(value)
        state = out
    return output, state
