"""Wrong calls to fastrnn.functional and straight into the operators: each raises, none crashes.

Kernels read through bare pointers, so whatever reaches an operator is checked there again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _ops, functional

T, B, INPUT, H = 3, 2, 3, 4
GATES = {"rnn": 1, "lstm": 4, "gru": 3}

needs_native = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))


# Functional


def weights_of(name: str) -> list[Tensor]:
    rows = GATES[name] * H
    return [torch.randn(rows, INPUT), torch.randn(rows, H), torch.randn(rows), torch.randn(rows)]


def layer_with(change: Callable[[list[Tensor]], Any], **options: Any) -> Callable[[str], Any]:
    """A call of rnn, lstm or gru with changed weights or options."""

    def call(name: str) -> Any:
        weights = change(weights_of(name))
        return getattr(functional, name)(torch.randn(T, B, INPUT), weights, **options)

    return call


def same(weights: list[Tensor]) -> list[Tensor]:
    return weights


def replaced(index: int, shape: tuple[int, ...]) -> Callable[[list[Tensor]], list[Tensor]]:
    def change(weights: list[Tensor]) -> list[Tensor]:
        return [*weights[:index], torch.randn(shape), *weights[index + 1 :]]

    return change


LAYER_CALLS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "no weights": (layer_with(lambda w: []), ValueError),
    "weight missing": (layer_with(lambda w: w[:3]), ValueError),
    "weight too many": (layer_with(lambda w: [*w, w[-1]]), ValueError),
    "weights without bias": (layer_with(lambda w: w[:2]), ValueError),
    "biases with bias=False": (layer_with(same, bias=False), ValueError),
    "weights of one layer for two": (layer_with(same, num_layers=2), ValueError),
    "weights of one direction for two": (layer_with(same, bidirectional=True), ValueError),
    "weight None": (layer_with(lambda w: [w[0], None, *w[2:]]), ValueError),
    "weights are a tensor": (layer_with(lambda w: w[0]), (ValueError, RuntimeError)),
    "weights are a number": (layer_with(lambda w: 3), TypeError),
    "weight_ih 1-D": (layer_with(replaced(0, (H,))), ValueError),
    "weight_ih rows": (layer_with(replaced(0, (13, INPUT))), RuntimeError),
    "weight_ih columns": (layer_with(replaced(0, (4 * H, INPUT + 1))), RuntimeError),
    "weight_ih empty": (layer_with(replaced(0, (0, INPUT))), (RuntimeError, ValueError)),
    "weight_hh rows": (layer_with(replaced(1, (H + 1, H))), RuntimeError),
    "weight_hh columns": (layer_with(replaced(1, (4 * H, H - 1))), RuntimeError),
    "weight_hh 3-D": (layer_with(replaced(1, (1, 4 * H, H))), RuntimeError),
    "bias_ih size": (layer_with(replaced(2, (H + 1,))), RuntimeError),
    "bias_hh 2-D": (layer_with(replaced(3, (1, 4 * H))), RuntimeError),
    "weight dtype": (layer_with(lambda w: [w[0], w[1].double(), *w[2:]]), RuntimeError),
    "bias dtype": (layer_with(lambda w: [*w[:3], w[3].half()]), RuntimeError),
    "all weights float64": (layer_with(lambda w: [x.double() for x in w]), ValueError),
    "weight device": (layer_with(lambda w: [w[0], w[1].to("meta"), *w[2:]]), RuntimeError),
    "num_layers 0": (layer_with(same, num_layers=0), ValueError),
    "num_layers -1": (layer_with(same, num_layers=-1), ValueError),
    "dropout 2": (layer_with(same, dropout=2.0), ValueError),
    "dropout nan": (layer_with(same, dropout=float("nan")), ValueError),
    "bidirectional 1": (layer_with(same, bidirectional=1), TypeError),
    "unknown option": (layer_with(same, layers=1), TypeError),
    "options by position": (
        lambda name: getattr(functional, name)(torch.randn(T, B, 3), weights_of(name), None, 1),
        TypeError,
    ),
    "input None": (lambda name: getattr(functional, name)(None, weights_of(name)), AttributeError),
    "no weights at all": (lambda name: getattr(functional, name)(torch.randn(T, B, 3)), TypeError),
    "packed contradiction": (
        lambda name: getattr(functional, name)(
            PackedSequence(torch.randn(5, INPUT), torch.tensor([2, 2])), weights_of(name)
        ),
        RuntimeError,
    ),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("wrong", LAYER_CALLS)
def test_functional_layer(name: str, wrong: str) -> None:
    call, error = LAYER_CALLS[wrong]
    with pytest.raises(error, match=r"\S"):
        call(name)


def test_functional_projection_and_nonlinearity() -> None:
    weights, x = weights_of("lstm"), torch.randn(T, B, INPUT)
    with pytest.raises(ValueError, match="weights"):
        functional.lstm(x, weights, proj_size=2)  # no weight_hr
    projected = [weights[0], torch.randn(4 * H, 2), *weights[2:], torch.randn(2, H + 1)]
    with pytest.raises(RuntimeError, match="weight 4"):
        functional.lstm(x, projected, proj_size=2)
    with pytest.raises(ValueError, match="proj_size"):
        functional.lstm(x, weights, proj_size=-1)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'elu'"):
        functional.rnn(x, weights_of("rnn"), nonlinearity="elu")


def cell_call(name: str, **changes: Any) -> Any:
    rows = GATES[name] * H
    hx: Any = torch.zeros(B, H)
    given = {
        "input": torch.randn(B, INPUT),
        "hx": (hx, hx) if name == "lstm" else hx,
        "weight_ih": torch.randn(rows, INPUT),
        "weight_hh": torch.randn(rows, H),
        "bias_ih": torch.randn(rows),
        "bias_hh": torch.randn(rows),
    }
    return getattr(functional, name + "_cell")(**{**given, **changes})


CELL_CHANGES: dict[str, dict[str, Any]] = {
    "input features": {"input": torch.zeros(B, INPUT + 1)},
    "input dtype": {"input": torch.zeros(B, INPUT, dtype=torch.float64)},
    "input 3-D": {"input": torch.zeros(1, B, INPUT)},
    "weight_ih rows": {"weight_ih": torch.zeros(5, INPUT)},
    "weight_ih 1-D": {"weight_ih": torch.zeros(INPUT)},
    "weight_hh rows": {"weight_hh": torch.zeros(5, H)},
    "weight_hh columns": {"weight_hh": torch.zeros(12, H + 1)},
    "weight_hh 1-D": {"weight_hh": torch.zeros(H)},
    "weight_hh 3-D": {"weight_hh": torch.zeros(1, 12, H)},
    "bias_ih size": {"bias_ih": torch.zeros(5)},
    "bias_hh 2-D": {"bias_hh": torch.zeros(1, 12)},
    "only one bias": {"bias_hh": None},
    "weight dtype": {"weight_hh": torch.zeros(12, H, dtype=torch.float64)},
    "weight None": {"weight_hh": None},
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("wrong", CELL_CHANGES)
def test_functional_cell(name: str, wrong: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"\S"):
        cell_call(name, **CELL_CHANGES[wrong])


# Operators


def layer_arguments(cell: str) -> dict[str, Any]:
    """Right arguments of ``layer`` for one group; see csrc/ops.cpp."""
    rows = GATES_OF[cell] * H
    return {
        "cell": cell,
        "input": torch.randn(T, B, INPUT),
        "weights": [
            torch.randn(rows, INPUT), torch.randn(rows, H), torch.randn(rows), torch.randn(rows),
        ],
        "h0": torch.zeros(1, B, H),
        "c0": torch.zeros(1, B, H) if cell == "lstm" else None,
        "batch_sizes": None,
        "groups": 1,
        "direction": 0,
        "save": True,
    }  # fmt: skip


GATES_OF = {"rnn_tanh": 1, "lstm": 4, "gru": 3}


def packed_sizes(*sizes: int) -> dict[str, Any]:
    return {"input": torch.zeros(5, INPUT), "batch_sizes": torch.tensor(sizes)}


def weights(**changes: Any) -> dict[str, Any]:
    """The weights of a projected LSTM of 2 projected units, some of them changed."""
    named = {
        "ih": torch.zeros(4 * H, INPUT), "hh": torch.zeros(4 * H, 2), "b_ih": torch.zeros(4 * H),
        "b_hh": torch.zeros(4 * H), "hr": torch.zeros(2, H),
    }  # fmt: skip
    return {"weights": list((named | changes).values()), "h0": torch.zeros(1, B, 2)}


LAYER_CHANGES: dict[str, dict[str, Any]] = {
    "unknown cell": {"cell": "lstmm"},
    "empty cell name": {"cell": ""},
    "direction 3": {"direction": 3},
    "direction -1": {"direction": -1},
    "both directions of one group": {"direction": 2},
    "no groups": {"groups": 0},
    "negative groups": {"groups": -1},
    "three groups": {"groups": 3},
    "two groups of two": {"groups": 2},
    "no weights": {"weights": []},
    "one weight": {"weights": [torch.zeros(4 * H, INPUT)]},
    "input 1-D": {"input": torch.zeros(INPUT)},
    "input 2-D": {"input": torch.zeros(B, INPUT)},
    "input 4-D": {"input": torch.zeros(T, B, 1, INPUT)},
    "input 0-D": {"input": torch.tensor(0.0)},
    "input width": {"input": torch.zeros(T, B, INPUT + 1)},
    "input no steps": {"input": torch.zeros(0, B, INPUT)},
    "input int": {"input": torch.zeros(T, B, INPUT, dtype=torch.int64)},
    "input complex": {"input": torch.zeros(T, B, INPUT, dtype=torch.complex64)},
    "input float64": {"input": torch.zeros(T, B, INPUT, dtype=torch.float64)},
    "input sparse": {"input": torch.zeros(T, B, INPUT).to_sparse()},
    "weight_ih 1-D": weights(ih=torch.zeros(4 * H)),
    "weight_ih rows": weights(ih=torch.zeros(4 * H - 1, INPUT)),
    "weight_ih columns": weights(ih=torch.zeros(4 * H, INPUT - 1)),
    "weight_hh 3-D": weights(hh=torch.zeros(1, 4 * H, 2)),
    "weight_hh rows": weights(hh=torch.zeros(4 * H + 1, 2)),
    "weight_hh columns": weights(hh=torch.zeros(4 * H, 1)),
    "weight_hh empty": weights(hh=torch.zeros(0, 2)),
    "weight_hh no columns": weights(hh=torch.zeros(4 * H, 0)),
    "weight_hh bfloat16": weights(hh=torch.zeros(4 * H, 2, dtype=torch.bfloat16)),
    "weight_hh sparse": weights(hh=torch.zeros(4 * H, 2).to_sparse()),
    "bias_ih width": weights(b_ih=torch.zeros(H)),
    "bias_hh 2-D": weights(b_hh=torch.zeros(1, 4 * H)),
    "bias_hh float64": weights(b_hh=torch.zeros(4 * H, dtype=torch.float64)),
    "weight_hr shape": weights(hr=torch.zeros(3, H)),
    "weight_hr 3-D": weights(hr=torch.zeros(1, 2, H)),
    "h0 batch": {"h0": torch.zeros(1, B - 1, H)},
    "h0 width": {"h0": torch.zeros(1, B, H - 1)},
    "h0 groups": {"h0": torch.zeros(2, B, H)},
    "h0 2-D": {"h0": torch.zeros(B, H)},
    "h0 float64": {"h0": torch.zeros(1, B, H, dtype=torch.float64)},
    "c0 batch": {"c0": torch.zeros(1, B + 1, H)},
    "c0 width": {"c0": torch.zeros(1, B, 1)},
    "c0 half": {"c0": torch.zeros(1, B, H, dtype=torch.float16)},
    "sizes with dense input": {"batch_sizes": torch.tensor([2, 2, 2])},
    "sizes short": packed_sizes(2, 2),
    "sizes long": packed_sizes(2, 2, 2),
    "sizes increasing": packed_sizes(2, 1, 2),
    "sizes zero": packed_sizes(2, 2, 1, 0),
    "sizes negative": packed_sizes(2, 2, 2, -1),
    "sizes overflow": packed_sizes(2**62, 2**62, 2**62, 2**62, 5),
    "sizes empty": packed_sizes() | {"batch_sizes": torch.zeros(0, dtype=torch.int64)},
    "sizes int32": packed_sizes() | {"batch_sizes": torch.tensor([2, 2, 1], dtype=torch.int32)},
    "sizes float": packed_sizes() | {"batch_sizes": torch.tensor([2.0, 2.0, 1.0])},
    "sizes 2-D": packed_sizes() | {"batch_sizes": torch.tensor([[2, 2, 1]])},
    "sizes strided": packed_sizes() | {"batch_sizes": torch.tensor([2, 9, 2, 9, 1, 9])[::2]},
    "packed without h0": packed_sizes(2, 2, 1) | {"h0": None},
    "packed h0 batch": packed_sizes(2, 2, 1) | {"h0": torch.zeros(1, 3, H)},
    "packed c0 batch": packed_sizes(2, 2, 1) | {"c0": torch.zeros(1, 1, H)},
}


@needs_native
def test_right_arguments_are_accepted() -> None:
    assert torch.ops.fastrnn.layer(**layer_arguments("lstm"))[0].shape == (T, B, H)
    packed = layer_arguments("lstm") | packed_sizes(2, 2, 1)
    assert torch.ops.fastrnn.layer(**packed)[0].shape == (5, H)
    assert torch.ops.fastrnn.layer(**(layer_arguments("lstm") | weights()))[0].shape == (T, B, 2)
    given = backward_arguments("lstm")
    assert torch.ops.fastrnn.layer_backward(**given)[0].shape == (T, B, INPUT)


@needs_native
@pytest.mark.parametrize("wrong", LAYER_CHANGES)
def test_layer_refuses(wrong: str) -> None:
    given = layer_arguments("lstm") | LAYER_CHANGES[wrong]
    with pytest.raises((RuntimeError, NotImplementedError), match="fastrnn"):
        torch.ops.fastrnn.layer(**given)


@needs_native
@pytest.mark.parametrize("change", [{"c0": torch.zeros(1, B, H)}, weights()])
def test_layer_refuses_what_a_cell_has_not(change: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="fastrnn"):
        torch.ops.fastrnn.layer(**(layer_arguments("rnn_tanh") | change))


def backward_arguments(cell: str) -> dict[str, Any]:
    """Right arguments of ``layer_backward``, from a real forward pass."""
    given = layer_arguments(cell)
    output, h_n, c_n, cells, saved = torch.ops.fastrnn.layer(**given)
    del given["save"]
    results = {"output": output, "cells": cells, "saved": saved}
    incoming = {"doutput": torch.ones_like(output), "dh_n": torch.ones_like(h_n), "dc_n": None}
    if cell == "lstm":
        incoming["dc_n"] = torch.ones_like(c_n)
    return given | results | incoming | {"wanted": [1, 1, int(cell == "lstm"), 1, 1, 1, 1]}


BACKWARD_CHANGES: dict[str, dict[str, Any]] = {
    "unknown cell": {"cell": "peephole"},
    "direction": {"direction": 7},
    "groups": {"groups": 2},
    "input steps": {"input": torch.zeros(T + 1, B, INPUT)},
    "input width": {"input": torch.zeros(T, B, INPUT + 1)},
    "input float64": {"input": torch.zeros(T, B, INPUT, dtype=torch.float64)},
    "output width": {"output": torch.zeros(T, B, H + 1)},
    "output 4-D": {"output": torch.zeros(T, B, 1, H)},
    "output no steps": {"output": torch.zeros(0, B, H)},
    "doutput steps": {"doutput": torch.zeros(T - 1, B, H)},
    "doutput float64": {"doutput": torch.zeros(T, B, H, dtype=torch.float64)},
    "dh_n batch": {"dh_n": torch.zeros(1, B + 1, H)},
    "dc_n width": {"dc_n": torch.zeros(1, B, H + 1)},
    "cells missing": {"cells": torch.zeros(0)},
    "cells steps": {"cells": torch.zeros(1, (T - 1) * B, H)},
    "cells half": {"cells": torch.zeros(1, T * B, H, dtype=torch.float16)},
    "saved missing": {"saved": torch.zeros(0)},
    "saved width": {"saved": torch.zeros(1, T * B, H)},
    "saved steps": {"saved": torch.zeros(1, (T + 1) * B, 4 * H)},
    "weights": {"weights": [torch.zeros(4 * H, INPUT), torch.zeros(4 * H, H + 1)]},
    "h0 batch": {"h0": torch.zeros(1, 1, H)},
    "c0 batch": {"c0": torch.zeros(1, 1, H)},
    "sizes with dense data": {"batch_sizes": torch.tensor([2, 2, 2])},
    "sizes short": {"input": torch.zeros(6, INPUT), "batch_sizes": torch.tensor([2, 2])},
    "wanted short": {"wanted": [1, 1, 1]},
    "wanted long": {"wanted": [1] * 8},
}


@needs_native
@pytest.mark.parametrize("wrong", BACKWARD_CHANGES)
def test_layer_backward_refuses(wrong: str) -> None:
    given = backward_arguments("lstm") | BACKWARD_CHANGES[wrong]
    with pytest.raises(RuntimeError, match="fastrnn"):
        torch.ops.fastrnn.layer_backward(**given)


@needs_native
@pytest.mark.parametrize(
    "change", [{"c0": torch.zeros(1, B, H)}, {"wanted": [1, 1, 1, 1, 1, 1, 1]}]
)
def test_layer_backward_refuses_what_a_cell_has_not(change: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="fastrnn"):
        torch.ops.fastrnn.layer_backward(**(backward_arguments("rnn_tanh") | change))
