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


# Probabilities that scale what is kept by a power of two: integer data stay integers, and no
# rounding decides on which side of its kink a ReLU is (see fastrnn.parity.Sampler).
DROPOUT = (
    Case("dropout", "masks between layers", layers=3, dropout=0.5, H=24),
    Case("dropout-bidirectional", "masks over both directions", layers=2, dropout=0.75,
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


# torch.nn's dense LSTM autocasts through oneDNN, which on a CPU without AVX-512 has no such LSTM.
NO_LSTM_HERE = "could not create a primitive descriptor for the LSTM"


def torch_under_autocast(problem: Problem) -> dict[str, Tensor]:
    """torch.nn's results under autocast; where it cannot run, those of everything cast by hand."""
    try:
        with torch.autocast("cpu", dtype=problem.dtype):
            return problem.run(torch.nn, torch.float32)
    except RuntimeError as error:
        if NO_LSTM_HERE not in str(error):
            raise
    cast = problem.run(torch.nn, problem.dtype)
    return {k: v.float() if k.startswith("d ") else v for k, v in cast.items()}


def check_autocast(
    low: torch.dtype,
    dtypes: dict[str, torch.dtype],
    got: dict[str, Tensor],
    torch_same: dict[str, Tensor],
    ref64: dict[str, Tensor],
) -> None:
    """Gradients are float32, results have `dtypes`, and the numbers are as good as torch.nn's."""
    for name, value in got.items():
        assert value.dtype == dtypes.get(name, torch.float32), name
    # A float32 result of 16-bit arithmetic carries the errors of the 16 bits.
    for c in compare(got, torch_same, ref64):
        assert not c.problem, str(c)
        assert c.error <= 2 * c.torch_error + EPS[low], str(c)


AUTOCAST: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"layers": 2, "bidirectional": True},
    "no-hx": {"hx": "none"},
    "unbatched": {"unbatched": True},
    "packed": {"lengths": (2, 6, 1, 4)},
    "packed-two": {"lengths": (2, 6, 1), "layers": 2, "bidirectional": True, "hx": "none"},
    "no-grad": {"grad": False},
}


@pytest.mark.parametrize("options", AUTOCAST)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(engine: str, cell: str, dtype: str, options: str) -> None:
    case = dataclasses.replace(BY_ID["base"], H=24, **AUTOCAST[options])
    low = DTYPES[dtype]
    problem = build(cell, case, low)  # float32 parameters that the 16-bit type can represent
    with torch.autocast("cpu", dtype=low):
        got = problem.run(fastrnn, torch.float32)
    dtypes = {"output": low, "h_n": low, "c_n": low}
    if cell == "gru" or (cell == "lstm" and case.lengths is not None):
        dtypes = {}
    elif cell == "lstm_proj":
        dtypes["c_n"] = torch.float32
    ref64 = problem.run(torch.nn, torch.float64)
    check_autocast(low, dtypes, got, torch_under_autocast(problem), ref64)


CELL_MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}


def cell_results(
    namespace: Any, cell: str, dtype: torch.dtype, compute: torch.dtype,
    B: int | None, I: int, H: int, hx: str, bias: bool,  # noqa: E741
) -> dict[str, Tensor]:  # fmt: skip
    """What the cell of `namespace` gives in `compute` for values of `dtype`."""
    name, options = CELL_MODULES[cell]
    rows = () if B is None else (B,)
    states = ("h", "c") if cell == "lstm" else ("h",)
    sampler = Sampler(0, dtype, integers=cell == "rnn_relu")
    module = getattr(namespace, name)(I, H, bias=bias, dtype=compute, **options)
    parameters = {k: sampler.parameter(p.shape, H) for k, p in module.state_dict().items()}
    module.load_state_dict(parameters)
    input = sampler.data((*rows, I)).to(compute).requires_grad_()
    leaves = [sampler.data((*rows, H)).to(compute).requires_grad_() for _ in states]
    state = None if hx == "no-hx" else tuple(leaves) if cell == "lstm" else leaves[0]
    cotangents = {s: sampler.normal((*rows, H)) for s in states}
    return run_cell(module, input, state, cotangents)


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
    low, sizes = DTYPES[dtype], (B, I, H, hx, bias)
    check(
        cell_results(fastrnn, cell, low, low, *sizes),
        cell_results(torch.nn, cell, low, low, *sizes),
        cell_results(torch.nn, cell, low, torch.float64, *sizes),
    )


@pytest.mark.parametrize("hx", ["hx", "no-hx"])
@pytest.mark.parametrize("B", [3, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELL_MODULES)
def test_autocast_of_a_cell(engine: str, cell: str, dtype: str, B: int | None, hx: str) -> None:
    low, sizes = DTYPES[dtype], (B, 4, 24, hx, True)
    with torch.autocast("cpu", dtype=low):
        got, torch_same = (
            cell_results(namespace, cell, low, torch.float32, *sizes)
            for namespace in (fastrnn, torch.nn)
        )
    ref64 = cell_results(torch.nn, cell, low, torch.float64, *sizes)
    dtypes = {"h": low} if cell.startswith("rnn") else {}
    check_autocast(low, dtypes, got, torch_same, ref64)


def test_given_zero_states_equal_no_states(engine: str) -> None:
    layer = fastrnn.LSTM(4, 8, num_layers=2)
    input = torch.randn(5, 3, 4)
    zeros = torch.zeros(2, 3, 8)
    given, absent = run_layer(layer, input, (zeros, zeros)), run_layer(layer, input)
    for name in given:
        assert torch.equal(given[name], absent[name])
