"""Layers and cells on a GPU against torch.nn there (cuDNN), by the rule; see conftest.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cuda_on_host
import fastrnn
from cases import CASES, CELLS, DTYPES, Case, expected
from compare import check, check_identical, run_cell

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])  # float16: LONG
@pytest.mark.parametrize("cell", CELLS)
def test_layer(device: str, cell: str, dtype: str, case: Case) -> None:
    if not case.supports(cell):
        return
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    check(problem.run(fastrnn, device=device), torch_same, ref64)


# Several chunks of input products in either direction, and rows that enter and leave at all steps.
LONG = [
    Case("long", "several chunks", T=23, B=5, H=12, bidirectional=True, layers=2),
    Case("long-packed", "rows come and go", bidirectional=True, H=8, layers=2,
         lengths=(1, 3, 23, 22, 9, 9, 2)),
    Case("odd", "units one by one", T=9, B=4, I=3, H=5, bidirectional=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", CELLS)
def test_layer_of_graphs(
    device: str, monkeypatch: pytest.MonkeyPatch, cell: str, case: Case
) -> None:
    if fastrnn.get_backend() == "triton":
        pytest.skip("of the CUDA kernels")
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "step-graph")
    test_layer(device, cell, "float32", case)


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_long(device: str, kernel: str, cell: str, dtype: str, case: Case) -> None:
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    first = problem.run(fastrnn, device=device)
    check(first, torch_same, ref64)
    check_identical(problem.run(fastrnn, device=device), first)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_groups_and_directions(device: str, cell: str, direction: int, groups: int) -> None:
    """What modules do not ask of the operators: one reversed direction, three groups. The numbers
    are those of the CPU."""
    gates = {"rnn_tanh": 1, "lstm": 4, "gru": 3}[cell]
    T, B, I, H = 4, 3, 5, 6  # noqa: E741
    weights = [
        torch.randn(*shape, dtype=torch.float64)
        for _ in range(groups)
        for shape in ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))
    ]
    x, h0 = torch.randn(T, B, I).double(), torch.randn(groups, B, H).double()
    c0 = torch.randn_like(h0) if cell == "lstm" else None
    results = []
    if fastrnn.get_backend() == "triton":
        on_gpu = torch.ops.fastrnn_triton
    else:
        on_gpu = torch.ops.fastrnn if device == "cuda" else cuda_on_host.load()
    for library, place in ((torch.ops.fastrnn, "cpu"), (on_gpu, device)):
        x, h0, weights = x.to(place), h0.to(place), [w.to(place) for w in weights]
        c0 = None if c0 is None else c0.to(place)
        forward = library.layer(cell, x, weights, h0, c0, None, groups, direction, True)
        output, h_n, c_n, cells, saved = forward
        wanted = [1, 1, int(c0 is not None), *[1] * len(weights)]
        dc_n = torch.ones_like(c_n) if c0 is not None else None
        dx, dw, dh0, dc0 = library.layer_backward(
            cell, torch.ones_like(output), torch.ones_like(h_n), dc_n, x, output, cells, saved,
            weights, h0, c0, None, groups, direction, wanted,
        )  # fmt: skip
        results.append([t.cpu() for t in (*forward, dx, *dw, dh0, dc0)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(device: str, name: str, dtype: str) -> None:
    theirs = getattr(nn, name)(5, 8)
    state: Any = torch.randn(3, 8)
    state = (state, torch.randn(3, 8)) if name == "LSTMCell" else state
    x, cotangents = torch.randn(3, 5), {"h": torch.randn(3, 8), "c": torch.randn(3, 8)}
    cotangents = cotangents if name == "LSTMCell" else {"h": cotangents["h"]}

    def run(library: Any, kind: torch.dtype, place: str) -> dict[str, Tensor]:
        cell = getattr(library, name)(5, 8)
        cell.load_state_dict(theirs.state_dict())
        low = cell.to(DTYPES[dtype]).to(place, kind)
        leaves = [s.to(DTYPES[dtype]).to(place, kind) for s in (x, *states(state))]
        first, *rest = (leaf.requires_grad_() for leaf in leaves)
        hx = tuple(rest) if name == "LSTMCell" else rest[0]
        return run_cell(low, first, hx, {k: v.to(place, kind) for k, v in cotangents.items()})

    low = DTYPES[dtype]
    check(run(fastrnn, low, device), run(nn, low, device), run(nn, torch.float64, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_arrays_that_begin_anywhere(device: str, kernel: str, name: str, dtype: str) -> None:
    """A caller's states and gradients may lie at any element of a larger tensor."""

    def apart(*shape: int) -> Tensor:
        return torch.randn(torch.Size(shape).numel() + 1, device=device).to(low)[1:].view(shape)

    low = DTYPES[dtype]
    layer = getattr(fastrnn, name)(4, 8).to(device, low)
    x, h, dy = apart(5, 3, 4), apart(1, 3, 8), apart(5, 3, 8)
    hx: Any = (h, apart(1, 3, 8)) if name == "LSTM" else h
    results = []
    for copy in (True, False):
        given = [x, *states(hx), dy]
        first, *rest, cotangent = [t.clone() if copy else t for t in given]
        output, state = layer(first, tuple(rest) if name == "LSTM" else rest[0])
        both = [output, *states(state)]
        grads = torch.autograd.grad(both, list(layer.parameters()), [cotangent, *rest])
        results.append([t.detach() for t in (*both, *grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def states(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)
