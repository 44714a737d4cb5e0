"""Layers and cells on Triton kernels against torch.nn, by the rule; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from cases import CASES, CELLS, DTYPES, Case, expected
from compare import check, check_identical, run_cell
from fastrnn.triton import forward

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore::RuntimeWarning:triton",  # numpy, of masked numbers
)

BY_ID = {case.id: case for case in CASES}
# Of the shapes of cases.py those in which kernels differ; what modules do is tested elsewhere.
STEP_CASES = [
    "base", "T1", "T1-B1-I1-H1", "H3", "H77", "B0-layers", "unbatched-layers", "batch-first",
    "no-bias-layers", "no-hx", "strided-hx", "P1", "P7", "all", "saturated", "packed-sorted",
    "packed-unsorted", "packed-T1", "packed-all", "frozen-weights", "frozen-states", "only-h0",
    "frozen-hh", "frozen-ih", "eval", "no-grad",
]  # fmt: skip
SEQUENCE_CASES = [
    "base", "T1", "T1-B1-I1-H1", "H17", "B65", "no-bias-layers", "no-hx", "all", "packed-unsorted",
    "packed-all", "frozen-states", "no-grad",
]  # fmt: skip
# Beyond them: several blocks of rows, and of units in either direction of the products.
WIDE = [
    Case("wide", "several blocks of rows and units", T=2, B=18, H=70, bidirectional=True),
    Case("wide-packed", "the same, rows come and go", H=70, lengths=(4, *[2] * 16, 1)),
    Case("square", "blocks without a rest", T=3, B=16, H=64),
]  # fmt: skip


def check_case(device: str, cell: str, case: Case, dtype: str) -> dict[str, Tensor]:
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    found = problem.run(fastrnn, device=device)
    check(found, torch_same, ref64)
    return found


@pytest.mark.parametrize("case", STEP_CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_steps(device: str, monkeypatch: pytest.MonkeyPatch, cell: str, case: str) -> None:
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "step")
    if BY_ID[case].supports(cell):
        check_case(device, cell, BY_ID[case], "float32")


@pytest.mark.parametrize("case", ["base", "packed-all"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_of_steps(
    device: str, monkeypatch: pytest.MonkeyPatch, cell: str, dtype: str, case: str
) -> None:
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "step")
    check_case(device, cell, BY_ID[case], dtype)


@pytest.mark.parametrize("case", SEQUENCE_CASES)
@pytest.mark.parametrize("path", ["resident", "streamed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_sequences(
    device: str, ask: Callable[[str], None], cell: str, path: str, case: str
) -> None:
    if path == "resident":  # of float32 only by TF32, then torch's too
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ask(path)
    check_case(device, cell, BY_ID[case], "float32")


@pytest.mark.parametrize("case", [BY_ID["base"], BY_ID["packed-all"], WIDE[1]], ids=lambda c: c.id)
@pytest.mark.parametrize("path", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_dtypes_of_sequences(
    device: str, monkeypatch: pytest.MonkeyPatch, cell: str, dtype: str, path: str, case: Case
) -> None:
    if device == "cpu" and dtype == "bfloat16":
        pytest.skip("Triton's interpreter does not support products of bfloat16")
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", path)
    check_case(device, cell, case, dtype)


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_blocks(device: str, cell: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a second run of the same input gives the same bits."""
    for path in ("streamed", "step"):
        monkeypatch.setenv("FASTRNN_TRITON_KERNEL", path)
        first = check_case(device, cell, case, "float32")
        problem, _, _ = expected(cell, case, torch.float32, device)
        check_identical(problem.run(fastrnn, device=device), first)


@pytest.mark.parametrize("case", [BY_ID["all"], BY_ID["packed-all"]], ids=lambda case: case.id)
@pytest.mark.parametrize("cell", ["gru"])
def test_chunks_of_input_products(
    device: str, kernel: str, cell: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "GATES_BYTES", 5000)
    check_case(device, cell, case, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(device: str, name: str, dtype: str) -> None:
    theirs, low = getattr(nn, name)(5, 8), DTYPES[dtype]
    values = [torch.randn(3, 5), torch.randn(3, 8), torch.randn(3, 8)]
    cotangents = {"h": torch.randn(3, 8), "c": torch.randn(3, 8)}
    if name != "LSTMCell":
        del values[2], cotangents["c"]

    def run(library: Any, kind: torch.dtype, place: str) -> dict[str, Tensor]:
        cell = getattr(library, name)(5, 8)
        cell.load_state_dict(theirs.state_dict())
        first, *rest = (v.to(low).to(place, kind).requires_grad_() for v in values)
        hx = tuple(rest) if name == "LSTMCell" else rest[0]
        given = {k: v.to(place, kind) for k, v in cotangents.items()}
        return run_cell(cell.to(low).to(place, kind), first, hx, given)

    check(run(fastrnn, low, device), run(nn, low, device), run(nn, torch.float64, "cpu"))
