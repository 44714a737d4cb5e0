"""What the direct call of steps refuses, straight at the extension: each None, and nothing is read
or written. The general path, which runs then, says what is wrong."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fastrnn import _backend, _ops, autograd

if TYPE_CHECKING:
    from fastrnn._C import DirectCall

pytestmark = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))

B, INPUT, H, P, LAYERS = 2, 3, 6, 4, 2


def weights(per_layer: dict[str, Tensor], **changes: Tensor) -> list[Tensor]:
    """Those of two layers, some of the second layer's changed."""
    second = per_layer | {"ih": per_layer["hh"].new_zeros(4 * H, P)} | changes
    return [*per_layer.values(), *second.values()]


def of_kind(kind: str) -> dict[str, Tensor]:
    """The weights of the first layer of a projected LSTM, float32 or quantized."""
    dtype = {"float": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[kind]
    scales = {"ih_s": torch.zeros(4 * H), "hh_s": torch.zeros(4 * H)} if kind == "int8" else {}
    matrices = {"ih": torch.zeros(4 * H, INPUT), "hh": torch.zeros(4 * H, P)}
    biases = {"b_ih": torch.zeros(4 * H), "b_hh": torch.zeros(4 * H)}
    stored = {name: t.to(dtype) for name, t in matrices.items()}
    return stored | scales | biases | {"hr": torch.zeros(P, H)}


KIND = {"cell": "lstm", "L": LAYERS, "I": INPUT, "H": H, "P": P, "bias": True}


def arguments(kind: str = "float") -> dict[str, Any]:
    """Right ones: of StepKind, and of the call."""
    return KIND | {
        "quantized": kind != "float", "weights": weights(of_kind(kind)),
        "input": torch.randn(B, INPUT), "h": torch.zeros(LAYERS, B, P),
        "c": torch.zeros(LAYERS, B, H), "out": None,
    }  # fmt: skip


@torch.no_grad()
def call(
    weights: list[Tensor], input: Any, h: Any, c: Any, out: Any, state: Any = (), **kind: Any
) -> Any:
    extension = importlib.import_module("fastrnn._C")
    named = {str(i): weight for i, weight in enumerate(weights)}
    direct: DirectCall = extension.DirectCall(
        _backend.plain_calls, _ops.python_tensors, {}, [(True, name) for name in named],
        extension.StepKind(**kind), autograd.record,
    )  # fmt: skip
    given = state if state != () else (h, c)
    return direct.call({"_parameters": named, "_buffers": {}}, input, given, out, False)


def cut_short(*sizes: int) -> Tensor:
    tensor = torch.zeros(sizes)
    tensor.untyped_storage().resize_(4)
    return tensor


FLOAT = of_kind("float")
CHANGES: dict[str, dict[str, Any]] = {
    "cell of fewer gates": {"cell": "gru"},
    "no weights": {"weights": []},
    "weight missing": {"weights": weights(FLOAT)[:-1]},
    "weight too many": {"weights": [*weights(FLOAT), torch.zeros(1)]},
    "weight_ih columns": {"weights": weights(FLOAT, ih=torch.zeros(4 * H, INPUT))},
    "weight_hh rows": {"weights": weights(FLOAT, hh=torch.zeros(4 * H - 1, P))},
    "weight_hh transposed": {"weights": weights(FLOAT, hh=torch.zeros(P, 4 * H).mT)},
    "weight_hh 3-D": {"weights": weights(FLOAT, hh=torch.zeros(1, 4 * H, P))},
    "weight_hh float64": {"weights": weights(FLOAT, hh=torch.zeros(4 * H, P).double())},
    "weight_hh bfloat16": {"weights": weights(FLOAT, hh=torch.zeros(4 * H, P).bfloat16())},
    "bias_ih width": {"weights": weights(FLOAT, b_ih=torch.zeros(H))},
    "bias_hh cut short": {"weights": weights(FLOAT, b_hh=cut_short(4 * H))},
    "weight_hr shape": {"weights": weights(FLOAT, hr=torch.zeros(P, H - 1))},
    "int8 as float": {"weights": weights(of_kind("int8"))},
    "float as quantized": {"quantized": True},
    "L": {"L": LAYERS + 1},
    "L zero": {"L": 0},
    "L negative": {"L": -LAYERS},
    "I": {"I": INPUT - 1},
    "I negative": {"I": -1},
    "I overflow": {"I": 2**62},
    "H": {"H": H + 1},
    "H zero": {"H": 0},
    "P": {"P": P + 1},
    "P above H": {"P": H + 1},
    "P negative": {"P": -P},
    "no bias": {"bias": False},
    "input width": {"input": torch.zeros(B, INPUT + 1)},
    "input 0-D": {"input": torch.tensor(0.0)},
    "input 4-D": {"input": torch.zeros(1, 1, B, INPUT)},
    "input no steps": {"input": torch.zeros(0, B, INPUT)},
    "input no rows": {"input": torch.zeros(0, INPUT)},
    "input meta": {"input": torch.zeros(B, INPUT, device="meta")},
    "input sparse": {"input": torch.zeros(B, INPUT).to_sparse()},
    "input mkldnn": {"input": torch.zeros(B, INPUT).to_mkldnn()},
    "input int": {"input": torch.zeros(B, INPUT, dtype=torch.int32)},
    "input complex": {"input": torch.zeros(B, INPUT, dtype=torch.complex64)},
    "input parameter": {"input": torch.nn.Parameter(torch.zeros(B, INPUT))},
    "input negated": {"input": torch._neg_view(torch.zeros(B, INPUT))},
    "input list": {"input": [[0.0] * INPUT] * B},
    "input None": {"input": None},
    "input cut short": {"input": cut_short(B, INPUT)},
    "state tensor": {"state": torch.zeros(2, LAYERS, B, P)},
    "state of three": {"state": (torch.zeros(LAYERS, B, P),) * 3},
    "state number": {"state": 0},
    "input float64": {"input": torch.zeros(B, INPUT).double()},
    "h layers": {"h": torch.zeros(1, B, P)},
    "h expanded": {"h": torch.zeros(1, B, P).expand(2**40, B, P)},
    "input expanded": {"input": torch.zeros(1, 1).expand(B, 2**40)},
    "h batch": {"h": torch.zeros(LAYERS, B - 1, P)},
    "h width": {"h": torch.zeros(LAYERS, B, H)},
    "h half": {"h": torch.zeros(LAYERS, B, P).half()},
    "c width": {"c": torch.zeros(LAYERS, B, P)},
    "c without h": {"h": None},
    "h without c": {"c": None},
}
QUANTIZED_CHANGES: dict[str, dict[str, Any]] = {
    "weight_hh float": {"weights": weights(of_kind("int8"), hh=torch.zeros(4 * H, P))},
    "weight_hh rows": {
        "weights": weights(of_kind("int8"), hh=torch.zeros(H, P, dtype=torch.int8))
    },
    "scale width": {"weights": weights(of_kind("int8"), hh_s=torch.zeros(4 * H - 1))},
    "scale float64": {"weights": weights(of_kind("int8"), ih_s=torch.zeros(4 * H).double())},
    "bias bfloat16": {"weights": weights(of_kind("int8"), b_ih=torch.zeros(4 * H).bfloat16())},
    "without scales": {
        "weights": weights({k: t for k, t in of_kind("int8").items() if "_s" not in k})
    },
    "not said to be": {"quantized": False},
}


@pytest.mark.parametrize("kind", ["float", "bf16", "int8"])
def test_right_arguments_are_accepted(kind: str) -> None:
    given = arguments(kind)
    output, (h_n, c_n) = call(**given)
    assert (output.shape, h_n.shape, c_n.shape) == ((B, P), given["h"].shape, given["c"].shape)
    again, state = call(**(given | {"out": (h_n.clone(), c_n.clone())}))
    for a, b in zip((output, h_n, c_n), (again, *state), strict=True):
        assert torch.equal(a, b)
    strided = given["input"].t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(call(**(given | {"input": strided}))[0], output)


@pytest.mark.parametrize("wrong", CHANGES)
def test_refused(wrong: str) -> None:
    given = arguments() | CHANGES[wrong]
    assert call(**given) is None
    out = torch.full((LAYERS, B, P), 7.0), torch.full((LAYERS, B, H), 7.0)
    assert call(**(given | {"out": out})) is None
    assert all((t == 7).all() for t in out)


@pytest.mark.parametrize("wrong", QUANTIZED_CHANGES)
def test_quantized_refused(wrong: str) -> None:
    assert call(**(arguments("int8") | QUANTIZED_CHANGES[wrong])) is None


OUT_CHANGES: dict[str, dict[str, Any]] = {
    "h_n layers": {"h_n": torch.zeros(1, B, P)},
    "h_n strided": {"h_n": torch.zeros(LAYERS, P, B).mT},
    "h_n None": {"h_n": None},
    "c_n None": {"c_n": None},
    "c_n width": {"c_n": torch.zeros(LAYERS, B, P)},
    "c_n half": {"c_n": torch.zeros(LAYERS, B, H).half()},
    "c_n meta": {"c_n": torch.zeros(LAYERS, B, H, device="meta")},
}


@pytest.mark.parametrize("wrong", OUT_CHANGES)
def test_out_refused(wrong: str) -> None:
    right = {"h_n": torch.zeros(LAYERS, B, P), "c_n": torch.zeros(LAYERS, B, H)}
    out = tuple((right | OUT_CHANGES[wrong]).values())
    assert call(**(arguments() | {"out": out})) is None


def test_overlap_refused() -> None:
    given, memory = arguments(), torch.zeros(2 * LAYERS * B * (P + H))
    h, c = LAYERS * B * P, LAYERS * B * H
    given["h"] = memory[:h].view(LAYERS, B, P)
    c_n = memory[-c:].view(LAYERS, B, H)
    beside = memory[1 : 1 + h].view(LAYERS, B, P)
    assert call(**(given | {"out": (beside, c_n)})) is None
    within = c_n.flatten()[:h].view(LAYERS, B, P)
    assert call(**(given | {"out": (within, c_n)})) is None
    assert call(**(given | {"out": (given["h"], c_n)})) is not None
    at_h = memory[:c].view(LAYERS, B, H)  # of another width: not the same rows
    assert call(**(given | {"out": (torch.zeros(LAYERS, B, P), at_h)})) is None
    at_input = given["input"].new_zeros(LAYERS * B * P)
    given["input"] = at_input[: B * INPUT].view(B, INPUT)
    assert call(**(given | {"out": (at_input.view(LAYERS, B, P), c_n)})) is None
    given["c"], given["h"] = c_n, torch.zeros(LAYERS, B, P)
    assert call(**(given | {"out": (beside, c_n)})) is not None


def test_unknown_cell() -> None:
    with pytest.raises(RuntimeError, match="lstmm"):
        call(**(arguments() | {"cell": "lstmm"}))


def test_threads_share_a_module() -> None:
    """The lock of Python is free while kernels run."""
    given = arguments()
    expected = call(**given)[0]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: call(**given)[0], range(200)):
            assert torch.equal(found, expected)
