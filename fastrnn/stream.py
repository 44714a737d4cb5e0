"""A unidirectional net without gradients: what ``module.step`` runs, and ``forward`` where it can,
with as little around the kernels as there can be.

The weights are read where they lie, so that no update of them can be missed: in place, through
``.data``, by an optimizer or by ``load_state_dict``. What is kept from call to call is where they
lie, and a call that finds another tensor, or the same one elsewhere, looks anew.

Dimension key: see layers.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
        self.kind, self.has_c = kind_of(module), spec.has_c
        self.held = [
            (name in module._parameters, name, t)
            for names, layer in zip(weights.names, weights.layers, strict=True)
            for name, t in zip(names, layer, strict=True)
            if name is not None and t is not None
        ]
        tensors = [torch.empty(0) if t is None else t for layer in weights.layers for t in layer]
        self.net: int = torch.ops.fastrnn.step_net(
            spec.cell, tensors, spec.hidden_size, spec.output_size, weights.quantized
        )
        weakref.finalize(self, torch.ops.fastrnn.step_free, self.net)

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module is of the kind it was, and every weight the tensor it was. Whether it
        lies where it lay, the operators find out."""
        if kind_of(module) != self.kind:
            return False
        parameters, buffers = module._parameters, module._buffers
        for is_parameter, name, held in self.held:
            if (parameters if is_parameter else buffers).get(name) is not held:
                return False
        return True

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def run(self, input: Tensor, state: Any, out: Any) -> tuple[Tensor, Any]:
        """Output and new state of input [B, I], [I] or [T, B, I].

        Raises:
            RuntimeError: an argument is not simply right, or a weight has moved.
        """
        if not self.has_c:
            h, c, h_n, c_n = state, None, out, None
        else:
            h, c = (None, None) if state is None else self._pair(state)
            h_n, c_n = (None, None) if out is None else self._pair(out)
        if out is not None:
            return _ops.step_out(self.net, input, h, c, h_n, c_n), out
        output, h_n, c_n = _ops.step(self.net, input, h, c)
        return output, (h_n, c_n) if self.has_c else h_n

    def _pair(self, state: Any) -> Any:
        if not isinstance(state, (tuple, list)) or any(not isinstance(s, Tensor) for s in state):
            raise TypeError(f"LSTM: a state is a pair of Tensors, got {type(state).__name__}")
        return state


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


def kind_of(module: nn.Module) -> str | None:
    """What the cell of a layer (its mode) or of a cell (its nonlinearity) depends on."""
    attributes = module.__dict__
    return attributes.get("mode") or attributes.get("nonlinearity")


def can_step(spec: LayerSpec, tensors: Sequence[Tensor]) -> bool:
    """Whether a Stepper can read these weights."""
    first = tensors[0]
    return (
        _ops.native_error is None
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and first.is_cpu
        and first.dtype in _DTYPES
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
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if type(input) is not Tensor or not _ops.is_plain_native():
        return None
    if module.training and module.__dict__.get("dropout"):
        return None
    stepper: Stepper | None = module.__dict__.get("_stepper")
    if stepper is not None and stepper.is_current(module):
        try:
            return stepper.run(input, state, out)
        except (RuntimeError, TypeError, ValueError):  # tried again below, and then by forward
            pass
    module.__dict__["_stepper"] = None
    try:
        stepper = module.__dict__["_stepper"] = module._new_stepper()
        return None if stepper is None else stepper.run(input, state, out)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


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
