"""Tests of the Triton backend: on a GPU where there is one, otherwise in Triton's interpreter.

That one runs the kernels in Python, on CPU tensors. It does not support products (tl.dot) of
bfloat16, and what it gives is wrong: those are for a GPU. Kernels of one step leave products to
torch, and run it here too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastrnn
from fastrnn import _backend

if _backend.triton_error() is not None:  # not installed: other platforms
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """The device of a test's tensors."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with fastrnn.use_backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["step", "resident", "streamed"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that are asked for."""
    name: str = request.param
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", name)
    return name
