"""`fastrnn.functional` against torch.nn, called with the parameters of torch.nn's own modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_modules import BY_ID, CELL_MODULES, DROPOUT, cell_results, expected
from torch import Tensor, nn

from cases import CASES, CELLS, DTYPES, Case
from compare import check
from fastrnn import functional

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def options(layer: nn.RNNBase) -> dict[str, Any]:
    names = ("num_layers", "bias", "batch_first", "dropout", "training", "bidirectional")
    return {name: getattr(layer, name) for name in names}


class RNN(nn.RNN):
    def forward(self, input: Any, hx: Any = None) -> Any:
        activation = {} if self.nonlinearity == "tanh" else {"nonlinearity": self.nonlinearity}
        return functional.rnn(input, list(self.parameters()), hx, **activation, **options(self))


class LSTM(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        projection = {"proj_size": self.proj_size} if self.proj_size else {}
        return functional.lstm(input, list(self.parameters()), hx, **projection, **options(self))


class GRU(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return functional.gru(input, list(self.parameters()), hx, **options(self))


class RNNCell(nn.RNNCell):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        activation = {} if self.nonlinearity == "tanh" else {"nonlinearity": self.nonlinearity}
        return functional.rnn_cell(input, hx, *self.parameters(), **activation)


class LSTMCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return functional.lstm_cell(input, hx, *self.parameters())


class GRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return functional.gru_cell(input, hx, *self.parameters())


FUNCTIONS = SimpleNamespace(
    RNN=RNN, LSTM=LSTM, GRU=GRU, RNNCell=RNNCell, LSTMCell=LSTMCell, GRUCell=GRUCell
)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
@pytest.mark.parametrize(
    ("cell", "case"),
    [(cell, case) for cell in CELLS for case in (*CASES, *DROPOUT) if case.supports(cell)],
    ids=lambda value: getattr(value, "id", value),
)
def test_layer_functions(cell: str, case: Case) -> None:
    problem, torch_same, ref64 = expected(cell, case, torch.float32)
    check(problem.run(FUNCTIONS), torch_same, ref64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_layer_functions_in_every_dtype(engine: str, cell: str, dtype: str) -> None:
    problem, torch_same, ref64 = expected(cell, BY_ID["all"], DTYPES[dtype])
    check(problem.run(FUNCTIONS), torch_same, ref64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("hx", ["hx", "no-hx"])
@pytest.mark.parametrize(("B", "I", "H"), [(3, 4, 8), (0, 4, 8), (None, 5, 33), (65, 37, 77)])
@pytest.mark.parametrize("cell", CELL_MODULES)
def test_cell_functions(
    cell: str, B: int | None, I: int, H: int, hx: str, bias: bool  # noqa: E741
) -> None:  # fmt: skip
    low, sizes = torch.float32, (B, I, H, hx, bias)
    check(
        cell_results(FUNCTIONS, cell, low, low, *sizes),
        cell_results(nn, cell, low, low, *sizes),
        cell_results(nn, cell, low, torch.float64, *sizes),
    )
