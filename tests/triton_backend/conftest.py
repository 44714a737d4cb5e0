"""Tests of the Triton backend: on a GPU where there is one, otherwise in Triton's interpreter.

That one runs the kernels in Python, on CPU tensors. It does not support products (tl.dot) of
bfloat16, and what it gives is wrong: those are for a GPU. Kernels of one step leave products to
torch, and run it here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

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


def ask_for(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for kernels, resident ones also of float32: which are for TF32, that the interpreter does
    not know; there they are exact."""
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", kernel)
    if kernel == "resident" and device == "cpu":
        monkeypatch.setattr("fastrnn.triton.passes.allows_tf32", lambda _: True)


@pytest.fixture(params=["step", "resident", "streamed"])
def kernel(
    request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The kernels that are asked for."""
    name: str = request.param
    if name == "resident" and device == "cuda":
        pytest.skip("of float32 only by TF32")
    ask_for(name, device, monkeypatch)
    return name


@pytest.fixture
def ask(device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return functools.partial(ask_for, device=device, monkeypatch=monkeypatch)
