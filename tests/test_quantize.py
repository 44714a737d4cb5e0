"""Low-precision weights: as exact as the stored weights allow, close to the originals, undone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from compare import check
from fastrnn.parity import error

KINDS = {"RNN": {}, "LSTM": {}, "GRU": {}, "LSTM proj": {"proj_size": 11}}
# Largest error of an output of a layer with torch.nn's initial weights, relative as in `error`.
ALLOWED = {"int8": 1e-2, "bf16": 1e-2}
# Of what the fixed-point x of int8 products adds: 2^-16 of the largest x in each, through 12 steps.
FIXED_POINT = 2.0**-14
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def make(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fastrnn, kind.split()[0])(21, 37, **options, **KINDS[kind])


def results(module: nn.Module, input: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output, state = copy.deepcopy(module).to(dtype)(input.to(dtype))
    states = state if isinstance(state, tuple) else (state,)
    return {"output": output} | dict(zip(("h", "c"), states, strict=False))


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}]
)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (5, 3), (12, 20)], ids=str)
@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_torch_on_the_stored_weights(
    engine: str, kind: str, weights: str, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    layer = make(kind, **options)
    original = results(layer.to_torch(), input := torch.randn(*shape, 21), torch.float64)
    report = fastrnn.quantize(layer, weights=weights)
    assert len(report.swapped) == 1
    stored = copy.deepcopy(layer)
    stored.__dict__["_originals"] = {}
    fastrnn.dequantize(stored)
    twin = stored.to_torch()
    with torch.no_grad():
        output, state = layer(input)
    states = state if isinstance(state, tuple) else (state,)
    got = {"output": output} | dict(zip(("h", "c"), states, strict=False))
    exact = results(twin, input, torch.float64)
    if weights == "bf16":
        check(got, results(twin, input, torch.float32), exact)
    else:
        assert all(error(got[name], exact[name]) < FIXED_POINT for name in exact)
    assert error(got["output"], original["output"]) < ALLOWED[weights]


def linear_step(inputs: int, weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A quantized layer that computes W x (RNN with ReLU of W x and of -W x), and its W."""
    rows = len(weight)
    layer = fastrnn.RNN(inputs, 2 * rows, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat([weight, -weight]))
        layer.weight_hh_l0.zero_()
    fastrnn.quantize(layer, weights="int8")
    stored = layer.weight_ih_l0.double() * layer.weight_ih_l0_scale.double()[:, None]
    return layer, stored[:rows]


def check_linear(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> None:
    """Assert the bound that fastrnn.quantize states, and the rounding of a float32 sum."""
    with torch.no_grad():
        positive, negative = layer.step(x)[0].double().chunk(2, dim=-1)
    largest = x.double().abs().amax(1, keepdim=True)
    bound = largest * weight.abs().sum(1) * (2.0**-16 + x.shape[1] * 2.0**-24)
    assert ((positive - negative - x.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("inputs", [1, 7, 16, 33, 250, 2048, 2049, 6001])
def test_int8_product_within_its_bound(engine: str, inputs: int) -> None:
    torch.manual_seed(inputs)
    layer, weight = linear_step(inputs, torch.randn(11, inputs))
    for scale in (1.0, 1e-20, 1e20):
        check_linear(layer, weight, torch.randn(2, inputs) * scale)


def test_int8_product_at_its_limits(engine: str) -> None:
    layer, weight = linear_step(5000, torch.ones(3, 5000))
    ones = torch.ones(1, 5000)
    for x in (ones, -ones, 0 * ones, 1e-38 * ones):
        check_linear(layer, weight, x)
    for value in (float("inf"), float("nan")):
        x = ones.clone()
        x[0, 17] = value
        with torch.no_grad():
            output = layer.step(x)[0][0, :3]
        assert (output.isnan() if value != value else output.isinf()).all()


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_steps(engine: str, weights: str) -> None:
    layer = make("LSTM", num_layers=2)
    fastrnn.quantize(layer, weights=weights)
    frames, state, outputs = torch.randn(6, 1, 21), None, []
    with torch.no_grad():
        for frame in frames:
            output, state = layer.step(frame, state)
            outputs.append(output)
        expected, (h, c) = layer(frames)
    got = {"output": torch.stack(outputs), "h": state[0], "c": state[1]}
    check(got, same := {"output": expected, "h": h, "c": c}, same)


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_restored_exactly(weights: str) -> None:
    model = nn.Sequential(fastrnn.GRU(5, 6, num_layers=2), nn.Identity())
    model.head = nn.LSTM(4, 4)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    report = fastrnn.quantize(model, weights=weights)
    assert [entry.name for entry in report.swapped] == ["0"]
    assert [entry.name for entry in report.left] == ["head"]
    assert "replace" in report.left[0].why
    again = fastrnn.quantize(model, weights=weights)
    assert again.left[0].why == "already quantized"
    fastrnn.dequantize(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert type(model[0]) is fastrnn.GRU


def test_stored_size_and_state_dict() -> None:
    layer = make("GRU")
    fastrnn.quantize(layer, keep_originals=False)
    state = layer.state_dict()
    assert state["weight_hh_l0"].dtype == torch.int8
    assert state["weight_hh_l0_scale"].shape == (3 * 37,)
    assert "weight_hh_l0" not in dict(layer.named_parameters())
    twin = make("GRU")
    fastrnn.quantize(twin)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer))
    input = torch.randn(4, 1, 21)
    loaded = pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        assert torch.equal(twin(input)[0], layer(input)[0])
        assert torch.equal(loaded(input)[0], layer(input)[0])
    assert fastrnn.dequantize(layer).swapped
    assert (layer.weight_hh_l0 - make("GRU").weight_hh_l0).abs().max() < 2e-3


def test_zero_rows_and_input_gradient() -> None:
    layer = make("LSTM")
    with torch.no_grad():
        layer.weight_hh_l0[3] = 0
    fastrnn.quantize(layer)
    input = torch.randn(3, 1, 21, requires_grad=True)
    output = layer(input)[0]
    assert output.isfinite().all()
    assert torch.autograd.grad(output.sum(), input)[0].abs().sum() > 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        fastrnn.quantize(make("RNN"), weights="int4")
    with pytest.raises(TypeError, match="Module"):
        fastrnn.quantize("model")  # type: ignore[arg-type]
    assert fastrnn.quantize(make("RNN").double()).left[0].why == "not float32"
    layer = make("RNN")
    fastrnn.quantize(layer, weights="bf16")
    with pytest.raises(RuntimeError, match="quantized"), torch.no_grad():
        layer.double()(torch.zeros(3, 20, 21, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_converted_layers_are_refused(engine: str, weights: str, dtype: torch.dtype) -> None:
    layer = fastrnn.LSTM(3, 4)
    fastrnn.quantize(layer, weights)
    layer.to(dtype)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be converted"):
        layer(torch.randn(5, 2, 3, dtype=dtype))
