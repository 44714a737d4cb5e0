"""Every Triton kernel, compiled ahead of time for GPUs that do not have to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastrnn.reference import CELLS
from fastrnn.triton.plan import GPUS, Shape, shared_bytes

SCRIPT = Path(__file__).parent / "ahead_of_time.py"
ITEM = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
SHARED = {
    architecture: GPUS[gpu].shared_bytes
    for architecture, gpu in ((80, "a100"), (90, "h100"), (100, "b200"))
}
MOST_SPILLED = 64  # bytes of a thread; 48 were found, in products of float32 without TF32


def compile_for(architecture: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(architecture)], env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict[str, Any]]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED, pool.map(compile_for, SHARED), strict=True))


@pytest.mark.parametrize("architecture", SHARED)
def test_kernels_compile(compiled: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    """No kernel spills more than said, or needs more than a multiprocessor has; products of 16-bit
    numbers, and of TF32, are those of tensor cores; a kernel that hands numbers from thread to
    thread through memory has barriers."""
    wrong = []
    for found in compiled[architecture]:
        most = SHARED[architecture]
        if found["path"] == "resident":  # what the plan reckons with
            G, item = CELLS[found["cell"]].gates, ITEM[found["dtype"]]
            most = shared_bytes(Shape(G, 3, found["H"], 2, item, False, False))
        cores = found["path"] != "step" and found["dtype"] in ("float16", "bfloat16", "tf32")
        good = [
            found["launch"],
            found["spilled"] <= MOST_SPILLED,
            found["shared"] <= most <= SHARED[architecture],
            (found["mma"] > 0) == cores,
            found["barriers"] > 0 or found["path"] == "step",
        ]
        if not all(good):
            wrong.append((found, good))
    assert not wrong


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_is_there(
    compiled: dict[int, list[dict[str, Any]]], architecture: int
) -> None:
    """Each cell and dtype, forward and backward."""
    found = {(k["kernel"], k["cell"], k["dtype"]) for k in compiled[architecture]}
    cells = ("rnn_tanh", "rnn_relu", "lstm", "gru")
    expected = {
        (f"{name}_{way}", cell, dtype)
        for way in ("forward", "backward")
        for cell in cells
        for name, dtypes in (
            ("gates", ("float32", "float64", "float16", "bfloat16")),
            ("enter", ("float32", "float64", "float16", "bfloat16")),
            ("resident", ("tf32", "float16", "bfloat16")),
            ("streamed", ("float32", "tf32", "float16", "bfloat16")),
        )
        for dtype in dtypes
    }
    assert expected - found == set()
    projected = {k["kernel"] for k in compiled[architecture] if k["projected"]}
    assert projected == {
        "gates_forward", "gates_backward", "project_forward", "project_backward", "enter_forward",
        "enter_backward",
    }  # fmt: skip
