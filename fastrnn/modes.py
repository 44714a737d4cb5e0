"""What PyTorch does around a call: transforms, forward-mode derivatives, tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.func transforms the call, or tensors are mapped by ``is_grads_batched`` or
    carry forward-mode derivatives."""
    return (
        torch._C._are_functorch_transforms_active()
        or is_mapped_by_autograd(tensors)
        or has_tangents(tensors)
    )


def is_mapped_by_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are mapped by ``torch.autograd.grad(is_grads_batched=True)``."""
    return any(t is not None and _functorch.is_legacy_batchedtensor(t) for t in tensors)


def has_tangents(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode derivatives are asked for, by torch.func or without it."""
    if is_under("Jvp"):
        return True
    if forward_ad._current_level < 0:
        return False
    # A transform hides the tangents of what it wraps.
    return torch._C._are_functorch_transforms_active() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def may_have_tangents() -> bool:
    """The same of tensors that are not there yet."""
    return is_under("Jvp") or forward_ad._current_level >= 0


def is_under(transform: str) -> bool:
    """Whether a transform of torch.func of this kind is active, the innermost or not."""
    if not torch._C._are_functorch_transforms_active():
        return False
    kind = getattr(_functorch.TransformType, transform)
    return any(level.key() == kind for level in _functorch.get_interpreter_stack() or ())


def only_maps_and_differentiates() -> bool:
    """Whether nothing but vmap and reverse-mode derivatives of torch.func transform the call."""
    kinds = (_functorch.TransformType.Vmap, _functorch.TransformType.Grad)
    stack = _functorch.get_interpreter_stack() or ()
    return forward_ad._current_level < 0 and all(level.key() in kinds for level in stack)


def is_traced() -> bool:
    """Whether torch.jit.trace records what is called."""
    return torch._C._get_tracing_state() is not None
