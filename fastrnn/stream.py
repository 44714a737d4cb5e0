"""One time step of a unidirectional net: what ``module.step`` runs, with as little around the
kernels as there can be.

The weights are read where they lie, so that no update of them can be missed: in place, through
``.data``, by an optimizer or by ``load_state_dict``. What is kept from call to call are addresses,
and a call that finds another tensor, address or shape looks them up anew.

Dimension key: see functional.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import _ops, checks
from .checks import LayerSpec

T = TypeVar("T")

_DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}  # fmt: skip


class StepWeights(NamedTuple):
    """The weights of a net for its steps, for each layer weight_ih, weight_hh, biases, weight_hr,
    scales; and where the module holds each of them."""

    layers: list[tuple[Tensor | None, ...]]
    names: list[tuple[str | None, ...]]
    type: str  # "storage", "bfloat16" or "int8"


class Stepper:
    """The addresses behind a module's weights, and the step over them. Copies and pickles of the
    module do without it."""

    def __init__(
        self, module: nn.Module, spec: LayerSpec, weights: StepWeights, dtype: torch.dtype
    ) -> None:
        from . import _C

        self.spec, self.dtype = spec, dtype
        stores = (module._parameters, module._buffers)
        self.held = [
            (store, name, t, t.data_ptr(), t.shape)
            for names, layer in zip(weights.names, weights.layers, strict=True)
            for name, t in zip(names, layer, strict=True)
            if name is not None and t is not None
            for store in stores
            if name in store
        ]
        addresses: list[Any] = [
            tuple(0 if t is None else t.data_ptr() for t in layer) for layer in weights.layers
        ]
        self.run = _C.Step(
            spec.cell, _DTYPES[dtype], weights.type, spec.input_size, spec.hidden_size,
            spec.output_size, addresses,
        ).run  # fmt: skip

    def is_current(self, spec: LayerSpec) -> bool:
        """Whether every weight is still the tensor it was, in the memory where it was, of a layer
        that is what it was."""
        if spec is not self.spec:
            return False
        for store, name, held, address, shape in self.held:
            if (
                store.get(name) is not held
                or held.data_ptr() != address
                or held.shape != shape
                or not held.is_contiguous()
            ):
                return False
        return True

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def step(self, input: Tensor, state: Any, out: Any) -> tuple[Tensor, Any] | None:
        """One step over input [B, I]. None if the arguments are not simply right: the general path
        then says what is wrong with them, or deals with them."""
        if type(input) is not Tensor or input.dim() != 2:
            return None
        return self._run(1, input.shape[0], input, state, out)

    def sequence(self, input: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        """All steps over input [T, B, I]; otherwise as ``step``."""
        if type(input) is not Tensor or input.dim() != 3:
            return None
        return self._run(input.shape[0], input.shape[1], input, state, None)

    def _run(
        self, T: int, B: int, input: Tensor, state: Any, out: Any
    ) -> tuple[Tensor, Any] | None:
        spec, dtype = self.spec, self.dtype
        shape = input.shape
        if shape[-1] != spec.input_size or input.dtype is not dtype or not input.is_cpu:
            return None
        if not input.is_contiguous():
            return None
        h, c = self._states(state, B)
        if state is not None and h is None:
            return None
        h_n, c_n = self._states(out, B)
        if h_n is None:
            if out is not None:
                return None
            L, H, P = spec.num_layers, spec.hidden_size, spec.output_size
            h_n = torch.empty((L, B, P), dtype=dtype)
            c_n = torch.empty((L, B, H), dtype=dtype) if spec.has_c else None
        output = torch.empty((*shape[:-1], spec.output_size), dtype=dtype)
        self.run(
            T,
            B,
            input.data_ptr(),
            0 if h is None else h.data_ptr(),
            0 if c is None else c.data_ptr(),
            output.data_ptr(),
            h_n.data_ptr(),
            0 if c_n is None else c_n.data_ptr(),
        )
        if out is not None:
            return output, out
        return output, h_n if c_n is None else (h_n, c_n)

    def _states(self, state: Any, B: int) -> tuple[Tensor | None, Tensor | None]:
        """h and c of a state whose addresses can be used; None and None for any other."""
        spec = self.spec
        if not spec.has_c:
            return (state, None) if self._fits(state, B, spec.output_size) else (None, None)
        if type(state) is not tuple or len(state) != 2:
            return None, None
        h, c = state
        fits = self._fits(h, B, spec.output_size) and self._fits(c, B, spec.hidden_size)
        return (h, c) if fits else (None, None)

    def _fits(self, t: Any, B: int, width: int) -> bool:
        return (
            type(t) is Tensor
            and t.shape == (self.spec.num_layers, B, width)
            and t.dtype is self.dtype
            and t.is_cpu
            and t.is_contiguous()
        )


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
        "storage",
    )


def can_step(spec: LayerSpec, tensors: Sequence[Tensor]) -> bool:
    """Whether a Stepper can read these weights."""
    first = tensors[0]
    return (
        _ops.native_error is None
        and first.is_cpu
        and first.dtype in _DTYPES
        and all(t.is_contiguous() and t.dtype == first.dtype and t.is_cpu for t in tensors)
        and all(
            t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.element_size()
            for t in tensors
        )
        and tuple(t.shape for t in tensors) == tuple(map(torch.Size, spec.weight_shapes))
    )


def current_stepper(module: Any, spec: LayerSpec) -> Stepper | None:
    """The Stepper over the module's weights as they are now; None where there can be none."""
    if not _ops.is_plain_native():
        return None
    stepper: Stepper | None = module.__dict__.get("_stepper")
    if stepper is None or not stepper.is_current(spec):
        stepper = module.__dict__["_stepper"] = module._new_stepper(spec)
    return stepper


def step(module: Any, spec: LayerSpec, input: Tensor, state: Any, out: Any) -> tuple[Tensor, Any]:
    """``module.step`` for the layers of :mod:`fastrnn.modules`."""
    if not torch.is_grad_enabled() and not (module.training and module.dropout):
        stepper = current_stepper(module, spec)
        result = None if stepper is None else stepper.step(input, state, out)
        if result is not None:
            return result
    return _general(module, spec, input, state, out)


def _general(
    module: Any, spec: LayerSpec, input: Tensor, state: Any, out: Any
) -> tuple[Tensor, Any]:
    """The same by ``module.forward``, for everything else: gradients, other devices, autocast."""
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
