"""Layers and cells against torch.nn: every engine, cell, dtype and case, by the rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from cases import CASES, CELLS, DTYPES, Case, Problem, build
from compare import check, compare, run_cell, run_layer
from fastrnn.parity import EPS, Sampler

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
BY_ID = {case.id: case for case in CASES}


@functools.cache
def expected(
    cell: str, case: Case, dtype: torch.dtype
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    """The problem, torch.nn's results in `dtype` and in float64."""
    problem = build(cell, case, dtype)
    return problem, problem.run(torch.nn), problem.run(torch.nn, torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_layer(engine: str, cell: str, dtype: str, case: Case) -> None:
    if not case.supports(cell):
        with pytest.raises(ValueError, match="proj_size has to be smaller"):
            fastrnn.LSTM(case.I, case.H, proj_size=case.H)
        return
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype])
    check(problem.run(fastrnn), torch_same, ref64)


DROPOUT = (
    Case("dropout", "masks between layers", layers=3, dropout=0.5, H=24),
    Case("dropout-bidirectional", "masks over both directions", layers=2, dropout=0.25,
         bidirectional=True, batch_first=True),
    Case("dropout-packed", "masks over packed data", layers=2, dropout=0.5,
         lengths=(2, 6, 1, 6)),
    Case("dropout-unbatched", "masks of two-dimensional input", layers=2, dropout=0.5,
         unbatched=True),
    Case("dropout-1", "everything between layers is dropped", layers=2, dropout=1.0),
    Case("dropout-eval", "no dropout outside training", layers=2, dropout=0.5, training=False),
    Case("dropout-one-layer", "dropout has no place to act", layers=1, dropout=0.5),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
@pytest.mark.parametrize("case", DROPOUT, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_draws_the_masks_of_torch(engine: str, cell: str, dtype: str, case: Case) -> None:
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype])
    got = problem.run(fastrnn)
    after = torch.rand(1)
    check(got, torch_same, ref64)
    problem.run(torch.nn)
    assert torch.equal(after, torch.rand(1)), "another amount of randomness was drawn"


def test_dropout_masks_differ_between_calls() -> None:
    layer = fastrnn.GRU(3, 8, num_layers=2, dropout=0.5)
    input = torch.randn(4, 2, 3)
    first, second = layer(input)[0], layer(input)[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "h_0", "c_0"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_go_where_torch_has_them(
    engine: str, cell: str, where: str, poison: float
) -> None:
    """One bad element spreads along its own row in time and nowhere else in the batch."""
    if where == "c_0" and not cell.startswith("lstm"):
        where = "h_0"
    problem = build(cell, dataclasses.replace(BY_ID["base"], H=21), torch.float32)
    problem.values[where][-1, 1, 0] = poison
    check(problem.run(fastrnn), problem.run(torch.nn), problem.run(torch.nn, torch.float64))


@pytest.mark.parametrize("options", [{}, {"layers": 2, "bidirectional": True}], ids=["one", "two"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(engine: str, cell: str, options: dict[str, Any]) -> None:
    """Under bfloat16 autocast the dtypes are torch.nn's and the numbers are as good as its own."""
    case = dataclasses.replace(BY_ID["base"], H=24, **options)
    problem = build(cell, case, torch.bfloat16)  # float32 parameters that bfloat16 can represent
    results = []
    for namespace in (fastrnn, torch.nn):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(problem.run(namespace, torch.float32))
    got, torch_same = results
    assert {name: value.dtype for name, value in got.items()} == {
        name: value.dtype for name, value in torch_same.items()
    }
    # A float32 gradient of bfloat16 arithmetic carries bfloat16's errors.
    eps = EPS[torch.bfloat16]
    for c in compare(got, torch_same, problem.run(torch.nn, torch.float64)):
        assert not c.problem, str(c)
        assert c.error <= 2 * c.torch_error + eps, str(c)


CELL_MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("hx", ["hx", "no-hx"])
@pytest.mark.parametrize(
    ("B", "I", "H"), [(3, 4, 8), (1, 1, 1), (0, 4, 8), (None, 5, 33), (65, 37, 77)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELL_MODULES)
def test_cell(
    engine: str, cell: str, dtype: str, B: int | None, I: int, H: int, hx: str, bias: bool  # noqa: E741
) -> None:
    """Cells in torch.nn's shapes; B = None is a one-dimensional input."""
    name, options = CELL_MODULES[cell]
    rows = () if B is None else (B,)
    states = ("h", "c") if cell == "lstm" else ("h",)
    results = []
    for namespace, compute in (
        (fastrnn, DTYPES[dtype]),
        (torch.nn, DTYPES[dtype]),
        (torch.nn, torch.float64),
    ):
        sampler = Sampler(0, DTYPES[dtype], integers=cell == "rnn_relu")
        module = getattr(namespace, name)(I, H, bias=bias, dtype=compute, **options)
        parameters = {k: sampler.parameter(p.shape, H) for k, p in module.state_dict().items()}
        module.load_state_dict(parameters)
        input = sampler.data((*rows, I)).to(compute).requires_grad_()
        leaves = [sampler.data((*rows, H)).to(compute).requires_grad_() for _ in states]
        state = None if hx == "no-hx" else tuple(leaves) if cell == "lstm" else leaves[0]
        cotangents = {s: sampler.normal((*rows, H)) for s in states}
        results.append(run_cell(module, input, state, cotangents))
    check(*results)


def test_given_zero_states_equal_no_states(engine: str) -> None:
    layer = fastrnn.LSTM(4, 8, num_layers=2)
    input = torch.randn(5, 3, 4)
    zeros = torch.zeros(2, 3, 8)
    given, absent = run_layer(layer, input, (zeros, zeros)), run_layer(layer, input)
    for name in given:
        assert torch.equal(given[name], absent[name])
