"""Functions with derivatives of their own that pass through the transforms of torch.func, one level
of nesting after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

_functorch = torch._C._functorch


class LevelFunction(Function):
    """A Function of tensors and constants, not of lists and without defaults, whose forward and
    vmap rule return tuples of new tensors.

    ``apply`` does what torch's own does, whose trees of arguments and a class made for each call
    take half a millisecond per level. Its vmap rules do not hear of the kind of randomness.
    """

    _at_level: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        members = {
            "forward": staticmethod(functools.partial(_apply_below, cls)),
            "setup_context": staticmethod(cls.setup_context),
            "backward": staticmethod(cls.backward),
        }
        cls._at_level = type(f"{cls.__name__}AtLevel", (_SingleLevelFunction,), members)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        given = [_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments]
        innermost: Any = _functorch.peek_interpreter_stack()  # None where there is none
        if innermost is None:
            return super(Function, cls).apply(*given)  # type: ignore[misc]
        kind = innermost.key()
        if kind == _functorch.TransformType.Vmap:
            return under_vmap(innermost, given, cls._mapped, cls.apply)
        if kind != _functorch.TransformType.Grad:
            return super().apply(*given)
        lift = _functorch.CGradInterpreterPtr(innermost).lift
        with enable_single_level_autograd_function():
            return cls._at_level.apply(*(lift(a) if isinstance(a, Tensor) else a for a in given))

    @classmethod
    def _mapped(cls, size: int, in_dims: Sequence[Any], *arguments: Any) -> Any:
        return cls.vmap(VmapInfo(size, "error"), in_dims, *arguments)


def under_vmap(
    level: Any, arguments: Sequence[Any], mapped: Callable[..., Any], plain: Callable[..., Any]
) -> Any:
    """Below a level of vmap, ``mapped(size, in_dims, *arguments)``, whose results come with their
    dimensions, or ``plain(*arguments)`` where nothing is mapped there."""
    number = level.level()
    own, in_dims = list(arguments), [None] * len(arguments)
    is_mapped = False
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and _functorch.is_batchedtensor(argument):
            own[i], in_dims[i] = cast(Any, _functorch._unwrap_batched(argument, number))
            is_mapped |= in_dims[i] is not None
    popped = _functorch.pop_dynamic_layer_stack()
    try:
        if not is_mapped:
            return plain(*own)
        size = _functorch.CVmapInterpreterPtr(level).batchSize()
        results, out_dims = mapped(size, in_dims, *own)
    finally:
        _functorch.push_dynamic_layer_stack(popped)
    add = _functorch._add_batch_dim
    return tuple([
        r if d is None else add(r, d, number) for r, d in zip(results, out_dims, strict=True)
    ])


def _apply_below(function: type[LevelFunction], *arguments: Any) -> tuple[Tensor, ...]:
    """``function.apply`` below a level of grad, with its results wrapped for that level."""
    level = pyfunctorch.retrieve_current_functorch_interpreter()
    number = level.level()
    unwrap = _functorch._unwrap_for_grad
    own = [unwrap(a, number) if isinstance(a, Tensor) else a for a in arguments]
    # A function's forward runs with all gradients off; the levels below have their own.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), level.lower():
        results = function.apply(*own)
    return tuple(_functorch._wrap_for_grad(r, number) for r in results)


__all__ = ["LevelFunction", "under_vmap"]
