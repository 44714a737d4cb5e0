"""A unidirectional net with as little around the kernels as there can be: what ``module.step`` runs
without gradients, and ``forward`` where it can, of one layer with gradients too.

The weights are read where they lie and looked up at each call, so that no update of them can be
missed: in place, through ``.data``, by an optimizer or by ``load_state_dict``. What is kept from
call to call is what the module is and how its weights are called.

Dimension key: see layers.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _backend, _ops, autograd, checks
from .checks import LayerSpec

if TYPE_CHECKING:
    from ._C import DirectCall

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def direct_call(
    module: nn.Module, spec: LayerSpec, names: Sequence[str], quantized: bool = False
) -> DirectCall:
    """The steps over the weights of these names, for each layer weight_ih, weight_hh, (int8: both
    scales), both biases, weight_hr. Copies and pickles of the module do without it.

    Its ``call(attributes of the module, input [B, I], [I] or [T, B, I], state, out, batch_first)``
    gives output ([B, T, P] with ``batch_first``) and new state; None with dropout or anything but
    plain native calls, with gradients but of one layer over [T, B, I], if the module is another
    one, or if a weight or an argument is not simply right."""
    extension = importlib.import_module("fastrnn._C")
    kind = extension.StepKind(
        cell=spec.cell, L=spec.num_layers, I=spec.input_size, H=spec.hidden_size,
        P=spec.output_size, bias=spec.bias, quantized=quantized,
    )  # fmt: skip
    stored = [(name in module._parameters, name) for name in names]
    return extension.DirectCall(
        _backend.plain_calls, _ops.python_tensors, description_of(module), stored, kind,
        autograd.record,
    )  # fmt: skip


def description_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that say what a layer or a cell computes."""
    names = ("mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "proj_size")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


def can_step(spec: LayerSpec, tensors: Sequence[Tensor]) -> bool:
    """Whether the operator of steps can read these weights."""
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
        and tuple(t.shape for t in tensors) == spec.weight_shapes
    )


def run(
    module: Any, input: Tensor, state: Any, out: Any = None, batch_first: bool = False
) -> tuple[Tensor, Any] | None:
    """The steps of ``module`` over the input by its direct call, the output [B, T, P] with
    ``batch_first``; None where the general path has to run, or to say what is wrong."""
    if torch.compiler.is_compiling() or _ops.native_error is not None:
        return None
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function("fastrnn::step"):
            return _run(module, input, state, out, batch_first)
    return _run(module, input, state, out, batch_first)


def _run(
    module: Any, input: Tensor, state: Any, out: Any, batch_first: bool
) -> tuple[Tensor, Any] | None:
    if out is not None and not _may_write(out):
        return None
    attributes = module.__dict__
    direct: DirectCall | None = attributes.get("_direct_call")
    result = None if direct is None else direct.call(attributes, input, state, out, batch_first)
    if result is None:
        if type(input) is not Tensor or not input.is_cpu:
            return None
        if torch.is_grad_enabled() and input.dim() != 3:
            return None
        if not _backend.is_plain_native():
            return None
        if module.training and attributes.get("dropout"):
            return None
        attributes["_direct_call"] = None
        try:
            direct = attributes["_direct_call"] = module._new_direct_call()
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        result = None if direct is None else direct.call(attributes, input, state, out, batch_first)
    if result is not None and out is not None:
        torch.autograd.graph.increment_version([t for t in _targets(out) if not t.is_inference()])
    return result


def _targets(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _may_write(out: Any) -> bool:
    """Whether the kernels may write the tensors for the new state as an operation in place does.
    The general path has to write or to refuse what is no plain tensor, and tensors of inference
    mode outside of it."""
    in_inference = torch.is_inference_mode_enabled()
    return all(type(t) is Tensor and (in_inference or not t.is_inference()) for t in _targets(out))


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
