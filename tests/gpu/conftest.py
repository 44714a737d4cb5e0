"""Tests of the GPU's pass: on a GPU where there is one, otherwise rehearsed with its kernels run on
the host (cuda_on_host.py). What only a GPU has is skipped there.

With FASTRNN_BACKEND=triton those that are not about CUDA kernels run on Triton's, without a GPU in
Triton's interpreter (tests/triton_backend/conftest.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import cuda_on_host
import fastrnn
from fastrnn import _ops

# Poisoned memory comes with torch's deterministic mode, in which some versions ask for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HAS_GPU = torch.cuda.is_available()
ON_TRITON = fastrnn.get_backend() == "triton"
if ON_TRITON:
    collect_ignore = [f"test_gpu_{what}.py" for what in ("graphs", "persistent", "grid", "choice")]


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """The device of a test's tensors."""
    if not HAS_GPU and ON_TRITON:
        yield "cpu"
        return
    if not HAS_GPU:
        reason = cuda_on_host.why_not()
        if reason is not None:
            pytest.skip(f"neither a GPU nor its kernels on the host: {reason}")
        with cuda_on_host.on_host_kernels():
            yield "cpu"
        return
    if not _ops.has_cuda and not ON_TRITON:
        pytest.fail(f"there is a GPU, but fastrnn has no CUDA kernels: {_ops.native_error}")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with fastrnn.use_backend("triton" if ON_TRITON else "native"):
        yield "cuda"
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["step", "step-graph"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that are asked for."""
    name: str = request.param
    if ON_TRITON and name != "step":
        pytest.skip("of the CUDA kernels")
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", name)
    return name
