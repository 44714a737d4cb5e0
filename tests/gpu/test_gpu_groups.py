"""Members and parts of the batch (tests/test_ops_groups.py) on CUDA kernels; see conftest.py."""

from __future__ import annotations

import pytest
import torch
from test_ops_groups import CELLS, GROUPS, SIZES, agree, problem

import cuda_on_host
import fastrnn


@pytest.mark.parametrize("cell", CELLS)
def test_members_and_parts(device: str, kernel: str, cell: str) -> None:
    if fastrnn.get_backend() == "triton":
        pytest.skip("tests/triton_backend/test_triton_groups.py")
    ops = torch.ops.fastrnn if device == "cuda" else cuda_on_host.load()
    for i, groups in enumerate(GROUPS):
        size = SIZES[i % len(SIZES)]
        parts = [n for n in range(1, size[1] + 1) if size[1] % n == 0]
        call = problem(cell, groups, size, torch.float64 if i % 2 else torch.float32)
        agree(ops, call, parts[-1 - i % len(parts)], device=device)
    agree(ops, problem(cell, (2, 4, 2), SIZES[0], packed=True), 1, device=device)
