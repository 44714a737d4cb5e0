"""Launching Triton kernels, and the products of torch beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import memory, steps

VARYING = frozenset(memory.VARYING)

# TRITON_INTERPRET=1: the kernels run in Python, on CPU tensors too.
interpreted: bool = not isinstance(steps.gates_forward, triton.JITFunction)


class Launch:
    """A kernel and those of its arguments that stay; the others are given with each launch.

    The kernel that the first launch has compiled runs the next ones, which saves most of the time
    that finding it takes: with each launch only numbers of memory.VARYING are given.
    """

    def __init__(self, kernel: Any, options: dict[str, Any], **arguments: Any) -> None:
        known = set(kernel.arg_names)
        assert known.issuperset(arguments), set(arguments) - known
        assert options.keys() - known <= {"num_warps", "num_stages"}, options
        self._kernel, self._options, self._arguments = kernel, options, arguments
        self._compiled: Any = None
        tiles = {name: value for name, value in options.items() if name in kernel.arg_names}
        self._positional = [(arguments | tiles).get(name) for name in kernel.arg_names]
        self._places = {name: i for i, name in enumerate(kernel.arg_names)}

    def __call__(self, grid: tuple[int, int, int], **numbers: int) -> None:
        if 0 in grid:
            return
        assert VARYING.issuperset(numbers)
        if self._compiled is None:
            self._compiled = self._kernel[grid](**self._arguments, **numbers, **self._options)
            return
        for name, value in numbers.items():
            self._positional[self._places[name]] = value
        self._compiled[grid](*self._positional)


def compute_type(dtype: torch.dtype) -> Any:
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def multiply(result: Tensor, a: Tensor, b: Tensor) -> None:
    """result = a b; of 16-bit numbers result may be in float32, as its sums are."""
    if a.dtype == result.dtype:
        torch.mm(a, b, out=result)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=result.dtype, out=result)
    else:
        torch.mm(a.to(result.dtype), b.to(result.dtype), out=result)


def allows_tf32(device: torch.device) -> bool:
    """Whether torch's products of float32 may be those of TF32."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """On the device of the tensors, and with nothing around the products of torch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield
