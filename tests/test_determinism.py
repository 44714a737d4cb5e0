"""The same call gives the same bits: again, with another number of threads, from other threads.

Backends and instruction sets may round differently from each other; each agrees with itself.
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from cases import CASES, CELLS, DTYPES, Case, build
from compare import check_identical, engines

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
BY_ID = {case.id: case for case in CASES}

# Rows split over threads, units split over threads, and shapes that neither divides.
SHAPES = [(1, 257), (2, 150), (33, 33), (64, 40), (67, 7)]


@pytest.mark.parametrize("case", ["all", "packed-all", "H150-B9"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_second_run_is_bit_identical(engine: str, cell: str, dtype: str, case: str) -> None:
    problem = build(cell, BY_ID[case], DTYPES[dtype])
    check_identical(problem.run(fastrnn), problem.run(fastrnn))


def both_passes(cell: str, B: int, H: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that the two operators return."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    T, D, I = 6, 2, 19  # noqa: E741 - the dimension key
    gates = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3}.get(cell, 4)
    projected, name = cell == "lstm_proj", cell.removesuffix("_proj")
    P = max(1, H // 2) if projected else H
    weights = []
    for _ in range(D):
        weights += [draw(gates * H, I), draw(gates * H, P) / H**0.5]
        weights += [draw(gates * H), draw(gates * H)]
        weights += [draw(P, H) / H**0.5] if projected else []
    h0 = draw(D, B, P)
    c0 = draw(D, B, H) if name == "lstm" else None
    x = draw(T, B, I)
    forward = torch.ops.fastrnn.layer(name, x, weights, h0, c0, None, D, 2, True)
    output, _, _, cells, saved = forward
    dc_n = draw(D, B, H) if c0 is not None else None
    wanted = [1, 1, int(c0 is not None), *[1] * len(weights)]
    dinput, dweights, dh0, dc0 = torch.ops.fastrnn.layer_backward(
        name, draw(*output.shape), draw(D, B, P), dc_n, x, output, cells, saved, weights, h0, c0,
        None, D, 2, wanted,
    )  # fmt: skip
    return {str(i): t for i, t in enumerate((*forward, dinput, *dweights, dh0, dc0))}


@pytest.mark.parametrize("engine", [e for e in engines() if e != "reference"], indirect=True)
@pytest.mark.parametrize(("B", "H"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_operators_do_not_depend_on_the_number_of_threads(
    engine: str, cell: str, dtype: str, B: int, H: int
) -> None:
    torch.set_num_threads(1)
    one = both_passes(cell, B, H, DTYPES[dtype])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        check_identical(both_passes(cell, B, H, DTYPES[dtype]), one)


@pytest.mark.parametrize(("B", "H"), SHAPES)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_layers_do_not_depend_on_the_number_of_threads(
    engine: str, cell: str, B: int, H: int
) -> None:
    """All results and gradients; of the reference those without the matrix products of torch, which
    may cut their sums by the number of threads."""
    reference = engine == "reference"
    problem = build(
        cell, Case("threads", "", T=6, B=B, I=1 if reference else 19, H=H), torch.float32
    )
    results: list[dict[str, Any]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result = problem.run(fastrnn)
        kept = ("output", "h_n", "c_n", "d h_0", "d c_0")
        results.append({name: result[name] for name in result if name in kept or not reference})
    assert len(results[0]) >= (5 if cell.startswith("lstm") else 3)
    check_identical(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_calls_from_several_threads_do_not_disturb_each_other(engine: str, cell: str) -> None:
    problems = [build(cell, BY_ID[case], torch.float32) for case in ("all", "H77", "packed-all")]
    expected = [problem.run(fastrnn) for problem in problems]
    backend = fastrnn.get_backend()

    def run(i: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)  # torch counts them for each calling thread
        with fastrnn.use_backend(backend):  # the choice of a block is one thread's own
            return problems[i % len(problems)].run(fastrnn)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(pool.map(run, range(24))):
            check_identical(result, expected[i % len(problems)])
