"""The activations of the Triton kernels against wider arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrnn.triton.cells import sigmoid, tanh

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def both(x, s, t, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(s + i, sigmoid(value))
    tl.store(t + i, tanh(value))


def run(x: Tensor) -> tuple[Tensor, Tensor]:
    s, t = torch.empty_like(x), torch.empty_like(x)
    both[(1,)](x, s, t, SIZE=len(x))
    return s.cpu(), t.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors(device: str, dtype: torch.dtype) -> None:
    """In units in the last place, from 1e-30 on to where the gates saturate. A GPU's exp and
    division are approximations in float32, of arguments up to 2 |x|."""
    size = 4096
    sign = torch.tensor([1.0, -1.0]).repeat(size // 2)
    x = torch.cat([
        sign * torch.logspace(-30, 1, size), torch.linspace(-0.7, 0.7, size),
        torch.linspace(-9, 9, 2 * size),
    ]).to(dtype)  # fmt: skip
    exact = x.numpy().astype(np.longdouble)
    wanted: tuple[Any, ...] = 1 / (1 + np.exp(-exact)), np.tanh(exact)
    bound = 3.0 if device == "cpu" or dtype == torch.float64 else 24.0
    for found, right in zip(run(x.to(device)), wanted, strict=True):
        worst = np.max(np.abs((found.numpy() - right) / right)) / torch.finfo(dtype).eps
        assert worst <= bound, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(device: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, 1000.0, -1000.0, inf, -inf, nan, 40.0, -40.0], dtype=dtype)
    s, t = run(x.to(device))
    assert torch.equal(t[:5], torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0], dtype=dtype))
    assert torch.equal(s[:5], torch.tensor([0.5, 1.0, 0.0, 1.0, 0.0], dtype=dtype))
    assert torch.isnan(s[5])
    assert torch.isnan(t[5])
