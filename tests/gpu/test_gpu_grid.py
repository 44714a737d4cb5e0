"""The kernels of grids (FASTRNN_CUDA_KERNEL=persistent-grid, csrc/cuda/grid_kernels.h): what
test_gpu_persistent.py does not ask of them. TF32, sizes around blocks and tiles, rows that share
blocks; on the host blocks under schedules that mean ill, on a GPU long runs and streams."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from test_gpu_parity import LONG
from torch import Tensor

import cuda_on_host
import fastrnn
from cases import CASES, CELLS, DTYPES, Case, expected
from compare import check, check_identical, compare

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
PLAIN_CELLS = [cell for cell in CELLS if cell != "lstm_proj"]


@pytest.fixture(autouse=True, params=["words", "flags"])
def exchange(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "persistent-grid")
    monkeypatch.setenv("FASTRNN_GRID_EXCHANGE", request.param)
    name: str = request.param
    return name


@pytest.fixture
def _tf32(device: str) -> Iterator[None]:
    if device == "cpu":
        cuda_on_host.allow_tf32(True)
        yield
        cuda_on_host.allow_tf32(False)
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


# Units that fill no block, blocks that fill no block of k; rows that fill no tile, tiles that share
# a block (the host has 12 multiprocessors); directions that do not find room at the same time.
SIZES = [
    Case("units-17", "a block of one unit", T=3, B=2, H=17, bidirectional=True),
    Case("units-48", "half a block of k that nobody has", T=3, B=3, H=48),
    Case("tiles-5", "more tiles than blocks, the last of one row", T=5, B=33, H=50),
    Case("tiles-packed", "tiles that rows leave", bidirectional=True, H=70,
         lengths=tuple(range(19, 0, -1))),
    Case("in-turns", "one direction after the other", T=3, B=2, H=100, bidirectional=True),
    Case("windows", "slots of the mailbox again and again", T=75, B=9, H=20),
]  # fmt: skip


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", PLAIN_CELLS)
def test_sizes(device: str, cell: str, dtype: str, case: Case) -> None:
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    first = problem.run(fastrnn, device=device)
    check(first, torch_same, ref64)
    check_identical(problem.run(fastrnn, device=device), first)


SOME_IDS = {
    "base", "T1", "H1", "H17", "H77", "H150-B9", "all", "saturated", "packed-all", "no-grad",
}  # fmt: skip
SOME = [("words", case) for case in CASES if case.id in SOME_IDS]
SOME += [("words", case) for case in LONG + SIZES]
SOME += [("flags", case) for case in SIZES if case.id == "tiles-5"]  # the bits of words, as below
some = pytest.mark.parametrize(
    ("exchange", "case"), SOME, indirect=["exchange"],
    ids=[f"{exchange}-{case.id}" for exchange, case in SOME],
)  # fmt: skip


@some
@pytest.mark.parametrize("cell", PLAIN_CELLS)
def test_float32(device: str, exchange: str, cell: str, case: Case) -> None:
    """As it is, where torch does not allow TF32."""
    problem, torch_same, ref64 = expected(cell, case, torch.float32, device)
    first = problem.run(fastrnn, device=device)
    check(first, torch_same, ref64)
    check_identical(problem.run(fastrnn, device=device), first)


@pytest.mark.usefixtures("_tf32")
@some
@pytest.mark.parametrize("cell", PLAIN_CELLS)
def test_tf32(device: str, exchange: str, cell: str, case: Case) -> None:
    """float32 whose products have the mantissa of float16: held to what the rule allows there."""
    problem, half, ref64 = expected(cell, case, torch.float16, device)
    first = problem.run(fastrnn, torch.float32, device=device)
    allowed = {c.name: c.allowed for c in compare(half, half, ref64)}
    found = compare(first, first, ref64)
    assert [str(c) for c in found if c.problem or not c.error <= allowed[c.name]] == []
    check_identical(problem.run(fastrnn, torch.float32, device=device), first)


@pytest.mark.parametrize("exchange", ["words"], indirect=True)  # and flags, below
@pytest.mark.parametrize("tf32", [False, True])
def test_both_exchanges_have_the_same_bits(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, exchange: str,
    tf32: bool,
) -> None:  # fmt: skip
    if tf32:
        request.getfixturevalue("_tf32")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = fastrnn.LSTM(5, 40, bidirectional=True).to(device, dtype)
        x = torch.randn(20, 12, 5, device=device, dtype=dtype)
        found = []
        for name in ("words", "flags"):
            monkeypatch.setenv("FASTRNN_GRID_EXCHANGE", name)
            output = layer(x)[0]
            grads = torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))
            found.append({str(n): t for n, t in enumerate((output.detach(), *grads))})
        check_identical(*found)


@pytest.mark.skipif(HAS_GPU, reason="a GPU has schedules of its own")
@pytest.mark.parametrize("cell", PLAIN_CELLS)
def test_schedules(device: str, cell: str) -> None:
    """The same bits whatever the order in which blocks run and stores are seen; more of them with
    FASTRNN_SCHEDULES."""
    case = Case("schedules", "", bidirectional=True, H=40, lengths=(40, 40, 33, 20, 20, 9, 3, 2, 1))
    problem = expected(cell, case, torch.bfloat16, device)[0]
    first = problem.run(fastrnn, device=device)
    for seed in range(int(os.environ.get("FASTRNN_SCHEDULES", "5"))):
        cuda_on_host.schedule(seed)
        check_identical(problem.run(fastrnn, device=device), first)


def gradients(layer: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    output = layer(x)[0]
    grads = torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))
    return {str(n): t for n, t in enumerate((output.detach(), *grads))}


@needs_gpu
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(8, 256), (64, 512), (16, 896), (2, 2048)])
def test_large(device: str, name: str, dtype: str, size: tuple[int, int]) -> None:
    """Weights that registers do not hold, and many blocks: against float64, by torch.nn's error."""
    B, H = size
    if dtype == "float32" and H > 1024:
        return  # does not fit
    case = Case(f"B{B}-H{H}", "", T=33, B=B, I=64, H=H)
    cell = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[name]
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    check(problem.run(fastrnn, device=device), torch_same, ref64)


@needs_gpu
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_long_runs_have_the_same_bits(device: str, name: str) -> None:
    """4096 steps, again and again; FASTRNN_LONG_RUNS=1000 for the whole of it."""
    layer = getattr(fastrnn, name)(64, 512).to(device, torch.bfloat16)
    x = torch.randn(4096, 8, 64, device=device).bfloat16()
    first = gradients(layer, x)
    for _ in range(int(os.environ.get("FASTRNN_LONG_RUNS", "20"))):
        check_identical(gradients(layer, x), first)


@needs_gpu
def test_two_streams(device: str) -> None:
    """Grids that both want the whole GPU."""
    layers = [fastrnn.LSTM(64, 1024).to(device, torch.bfloat16) for _ in range(2)]
    x = torch.randn(200, 16, 64, device=device).bfloat16()
    alone = [gradients(layer, x) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(gradients(layer, x))
        torch.cuda.synchronize()
        for got, first in zip(found, alone, strict=True):
            check_identical(got, first)


@needs_gpu
def test_capture(device: str) -> None:
    layer = fastrnn.GRU(64, 512).to(device, torch.bfloat16)
    x = torch.randn(50, 8, 64, device=device).bfloat16()
    first = layer(x)[0]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=side):
        output = layer(x)[0]
    for _ in range(3):
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, first)
