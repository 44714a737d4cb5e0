"""Tools that look into a model: torch.compile, torch.export, torch.jit, torch.fx, quantization.

What works gives eager's results; what does not is refused, and works after `to_torch`. The README
says which is which.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries, build, states
from torch import Tensor, nn

import fastrnn
from compare import check_identical

OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


class Model(nn.Module):
    """A layer, or a cell, and what comes after it."""

    def __init__(self, lib: ModuleType, name: str) -> None:
        super().__init__()
        self.body = build(lib, name, 3, 4, **({} if name in CELLS else OPTIONS))
        self.head = nn.Linear(4 if name in CELLS else 8, 2)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        first, *rest = states(self.body(input))
        return self.head(first), *(s for state in rest for s in states(state))


def data(name: str) -> Tensor:
    return torch.randn((2, 3) if name in CELLS else (5, 2, 3))


def results(function: Any, model: Model, input: Tensor) -> dict[str, Tensor]:
    """Everything that `function`, made of `model`, returns, and all gradients."""
    model.zero_grad()
    outputs = function(input)
    sum(y.square().sum() for y in outputs).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {**{str(i): y.detach() for i, y in enumerate(outputs)}, **gradients}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_compiled_equals_eager(name: str) -> None:
    """The graph breaks at the layer, which runs as it does without torch.compile."""
    model, x = Model(fastrnn, name), data(name)
    compiled = torch.compile(model, backend="eager")
    check_identical(results(compiled, model, x), results(model, model, x))
    with torch.no_grad():
        for got, expected in zip(compiled(x), model(x), strict=True):
            assert torch.equal(got, expected)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_is_refused(lib: ModuleType, name: str) -> None:
    compiled = torch.compile(Model(lib, name), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(data(name))


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.filterwarnings("ignore:The tensor attributes? self.body._flat_weights:UserWarning")
def test_exported_equals_eager(name: str) -> None:
    model, x, other = Model(fastrnn, name), data(name), data(name)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=False).module()
        for input in (x, other):
            for got, expected in zip(exported(input), model(input), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_without_gradients_equals_eager(name: str) -> None:
    model, x, other = Model(fastrnn, name), data(name), data(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        for got, expected in zip(traced(other), model(other), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tools_that_need_the_layers_of_torch(name: str) -> None:
    model, x = Model(fastrnn, name), data(name)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model.body)
    with pytest.raises((RuntimeError, OSError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(model.body)
    restored = nn.Sequential(model.body.to_torch())
    expected = restored(x)[0]
    assert torch.equal(torch.fx.symbolic_trace(restored)(x)[0], expected)
    assert torch.equal(torch.jit.script(restored)(x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_dynamic_quantization_needs_the_layers_of_torch() -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine here")
    quantize = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = Model(fastrnn, "LSTM")
        assert type(quantize(model, {nn.LSTM}).body) is fastrnn.LSTM
        fastrnn.restore(model)
        assert type(quantize(model, {nn.LSTM}).body) is torch.ao.nn.quantized.dynamic.LSTM
