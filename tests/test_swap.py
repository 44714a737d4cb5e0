"""replace, restore and to_torch: which layers change, and what does not."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, build, states
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import fastrnn
from fastrnn import swap


class Tagged(nn.LSTM):
    """A user's subclass, whose code may rely on torch.nn's."""


class Model(nn.Module):
    """Recurrent layers at every kind of place, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.encoder = nn.ModuleDict({"rnn": nn.GRU(4, 4, 2, dropout=0.5, bidirectional=True)})
        self.blocks = nn.ModuleList([nn.LSTM(8, 4), nn.RNN(4, 4, nonlinearity="relu")])
        self.shared = self.blocks[0]
        self.tagged = Tagged(4, 4)
        self.cells = nn.Sequential(nn.GRUCell(4, 4), nn.RNNCell(4, 4))
        self.attend = nn.TransformerEncoderLayer(4, 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder["rnn"](self.embed(x))[0]
        x, state = self.shared(x)
        x, _ = self.blocks[1](x)
        x, _ = self.tagged(x, state)
        return self.attend(self.cells(x[-1]).unsqueeze(0))


SWAPPED = ["encoder.rnn", "blocks.0", "blocks.1", "cells.0", "cells.1"]


def model() -> Model:
    torch.manual_seed(1)
    return Model()


def x() -> Tensor:
    return torch.linspace(-1, 1, 30).reshape(5, 2, 3)


def names(entries: list[swap.Entry]) -> list[str]:
    return [entry.name for entry in entries]


def outcome(m: nn.Module) -> list[Tensor | None]:
    """Output and all gradients, with the same dropout masks each time."""
    torch.manual_seed(2)
    m.zero_grad()
    output = m(x())
    (output * torch.linspace(-1, 2, output.numel()).reshape(output.shape)).sum().backward()
    return [output.detach(), *(None if p.grad is None else p.grad.clone() for p in m.parameters())]


def assert_close(a: list[Tensor | None], b: list[Tensor | None]) -> None:
    assert [t is None for t in a] == [t is None for t in b]
    for left, right in zip(a, b, strict=True):
        assert left is None or torch.allclose(left, right, atol=2e-6)


def test_replace_and_restore_a_model() -> None:
    m = model()
    types = [type(sub) for sub in m.modules()]
    parameters, keys = list(m.parameters()), list(m.state_dict())
    expected = outcome(m)

    report = fastrnn.replace(m)
    assert names(report.swapped) == SWAPPED
    assert names(report.left) == ["tagged"]
    assert type(m.shared) is fastrnn.LSTM
    assert m.shared is m.blocks[0]
    assert all(a is b for a, b in zip(m.parameters(), parameters, strict=True))
    assert list(m.state_dict()) == keys
    assert_close(outcome(m), expected)

    restored = fastrnn.restore(m)
    assert names(restored.swapped) == SWAPPED
    assert [type(sub) for sub in m.modules()] == types
    for a, b in zip(outcome(m), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_report() -> None:
    report = fastrnn.replace(model())
    assert report.swapped[0] == ("encoder.rnn", "torch.nn.GRU", "now fastrnn.GRU")
    (left,) = report.left
    assert left.type == f"{__name__}.Tagged"
    assert "subclass of torch.nn.LSTM" in left.why
    lines = str(report).splitlines()
    assert lines[0] == "5 swapped, 1 left"
    assert len(lines) == 7
    assert len({line.index("now") for line in lines[1:-1]}) == 1  # aligned
    assert str(fastrnn.replace(nn.Linear(2, 2))) == "0 swapped, 0 left"


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_the_model_itself(name: str) -> None:
    layer = build(nn, name, 3, 4)
    same = layer
    attributes = set(vars(layer))
    data = x()[0] if name in CELLS else x()
    expected = states(layer(data))[0]
    report = fastrnn.replace(layer)
    assert report.swapped == [("", f"torch.nn.{name}", f"now fastrnn.{name}")]
    assert "(model)" in str(report)
    assert layer is same
    assert type(layer) is getattr(fastrnn, name)
    assert torch.allclose(states(layer(data))[0], expected, atol=1e-6)
    assert set(vars(layer)) - {"_direct_call"} == attributes  # kept from the call; not restored
    assert fastrnn.replace(layer).left == [("", f"fastrnn.{name}", f"already a fastrnn.{name}")]
    fastrnn.restore(layer)
    assert type(layer) is getattr(nn, name)
    assert set(vars(layer)) == attributes
    assert torch.equal(states(layer(data))[0], expected)


def test_filter() -> None:
    m, seen = model(), []

    def only_blocks(name: str, module: nn.Module) -> bool:
        seen.append((name, type(module)))
        return name.startswith("blocks")

    report = fastrnn.replace(m, only_blocks)
    assert names(report.swapped) == ["blocks.0", "blocks.1"]
    assert [name for name, _ in seen] == SWAPPED  # asked about nothing else
    assert seen[0][1] is nn.GRU
    assert {e.name: e.why for e in report.left}["cells.0"] == "refused by filter_fn"
    assert type(m.cells[0]) is nn.GRUCell


def test_filter_that_raises_changes_nothing() -> None:
    m = model()

    def broken(name: str, module: nn.Module) -> bool:
        if name == "blocks.1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fastrnn.replace(m, broken)
    assert fastrnn.restore(m).swapped == []


@pytest.mark.parametrize("function", [fastrnn.replace, fastrnn.restore, swap.to_torch])
@pytest.mark.parametrize("value", [None, nn.LSTM, [nn.LSTM(3, 4)]])
def test_not_a_module(function: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        function(value)


def test_filter_must_be_callable() -> None:
    with pytest.raises(TypeError, match="filter_fn must be callable"):
        fastrnn.replace(nn.LSTM(3, 4), "blocks")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_optimizer_goes_on(make: Any) -> None:
    finals = []
    for swapped in (False, True):
        m = model().eval()
        optimizer = make(m.parameters(), lr=0.1)
        for step in range(4):
            if swapped and step == 2:
                fastrnn.replace(m)
            optimizer.zero_grad()
            m(x()).square().sum().backward()
            optimizer.step()
        finals.append([p.detach() for p in m.parameters()])
    for a, b in zip(*finals, strict=True):
        assert torch.allclose(a, b, atol=1e-3)  # Adam divides by small second moments


def test_hooks_stay() -> None:
    layer, calls = build(nn, "LSTM", 3, 4), []
    layer.register_forward_pre_hook(lambda m, args: calls.append("before"))
    layer.register_forward_hook(lambda m, args, result: calls.append("after"))
    layer.register_full_backward_hook(lambda m, inner, outer: calls.append("backward"))
    layer.weight_hh_l0.register_hook(lambda grad: calls.append("weight"))
    for change in (fastrnn.replace, fastrnn.restore):
        change(layer)
        calls.clear()
        layer(x().requires_grad_())[0].sum().backward()
        assert sorted(calls) == ["after", "backward", "before", "weight"]


def test_flags_and_buffers_stay() -> None:
    layer = build(nn, "GRU", 3, 4).eval().double()
    layer.weight_hh_l0.requires_grad_(False)
    layer.register_buffer("note", torch.ones(2))
    layer.extra = "kept"
    fastrnn.replace(layer)
    assert not layer.training
    assert not layer.weight_hh_l0.requires_grad
    assert layer.weight_ih_l0.dtype == torch.float64
    assert (layer.extra, layer.note.sum()) == ("kept", 2)


def test_wrapped_by_data_parallel() -> None:
    wrapped = nn.DataParallel(model())
    report = fastrnn.replace(wrapped)
    assert names(report.swapped) == [f"module.{name}" for name in SWAPPED]
    assert type(wrapped) is nn.DataParallel


@pytest.mark.parametrize("through", ["torch.save", "pickle"])
def test_loaded_model(through: str) -> None:
    layer = build(nn, "LSTM", 3, 4, 2)
    if through == "pickle":
        loaded = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert len(fastrnn.replace(loaded).swapped) == 1
    assert torch.allclose(loaded(x())[0], layer(x())[0], atol=1e-6)
    again = pickle.loads(pickle.dumps(loaded))
    assert type(again) is fastrnn.LSTM


# Layers that are left


def test_forward_overridden_on_the_object() -> None:
    layer = build(nn, "LSTM", 3, 4)
    inner = layer.forward
    layer.forward = lambda input: inner(input)  # bound to torch.nn's forward
    (left,) = fastrnn.replace(layer).left
    assert "forward is overridden" in left.why
    assert type(layer) is nn.LSTM


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_layer() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    m = nn.Sequential(torch.jit.script(Holder()), nn.Sequential(nn.Linear(4, 4)))
    expected = m(x())
    report = fastrnn.replace(m)
    assert report.swapped == []
    assert [(e.name, e.why[:23]) for e in report.left] == [("0.rnn", "compiled by TorchScript")]
    assert torch.equal(m(x()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantized_layer() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine here")
    m = nn.Sequential(nn.LSTM(3, 4))
    m = quantization.quantize_dynamic(m, {nn.LSTM}, dtype=torch.qint8)
    report = fastrnn.replace(m)
    assert report.swapped == []
    assert [(e.name, e.why) for e in report.left] == [("0", "quantized")]


def test_unknown_relative() -> None:
    class Odd(nn.RNNBase):
        pass

    (left,) = fastrnn.replace(Odd("LSTM", 3, 4)).left
    assert "subclass of torch.nn.RNNBase" in left.why


# Parametrisations put a class of their own in front


@pytest.mark.parametrize("apply", [weight_norm, spectral_norm])
def test_parametrized_layer(apply: Any) -> None:
    layer = apply(build(nn, "LSTM", 3, 4), "weight_hh_l0").eval()
    twin = copy.deepcopy(layer)  # shares the class in front
    front, keys = type(layer), list(layer.state_dict())
    expected = layer(x())[0].detach()
    report = fastrnn.replace(layer)
    assert report.swapped == [("", "torch.nn.LSTM", "now fastrnn.LSTM")]
    assert isinstance(layer, fastrnn.LSTM)
    assert type(twin) is front
    assert list(layer.state_dict()) == keys
    output, _ = layer(x())
    assert torch.allclose(output, expected, atol=1e-6)
    output.sum().backward()
    assert layer.parametrizations.weight_hh_l0[0] is not None
    assert all(p.grad is not None for p in layer.parameters())
    assert len(fastrnn.replace(layer).swapped) == 0

    fastrnn.restore(layer)
    assert isinstance(layer, nn.LSTM)
    assert type(layer).__bases__ == (nn.LSTM,)
    assert torch.allclose(layer(x())[0], expected, atol=1e-6)
    fastrnn.replace(layer)
    remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is fastrnn.LSTM
    assert torch.allclose(layer(x())[0], expected, atol=1e-6)
    assert torch.allclose(twin(x())[0], expected, atol=1e-6)


# to_torch


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_to_torch(name: str) -> None:
    layer = build(fastrnn, name, 3, 4).double().eval()
    layer.register_forward_hook(lambda m, args, result: None)
    next(layer.parameters()).requires_grad_(False)
    data = (x()[0] if name in CELLS else x()).double()
    copied = layer.to_torch()
    assert type(copied) is getattr(nn, name)
    assert type(layer) is getattr(fastrnn, name)
    assert not copied.training
    assert len(copied._forward_hooks) == 1
    for a, b in zip(layer.parameters(), copied.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert torch.allclose(states(copied(data))[0], states(layer(data))[0], atol=1e-12)
    with torch.no_grad():
        copied.weight_hh.zero_() if name in CELLS else copied.weight_hh_l0.zero_()
    assert (layer.weight_hh if name in CELLS else layer.weight_hh_l0).abs().sum() > 0


def test_to_torch_of_a_model() -> None:
    m = model().eval()
    expected = m(x())
    fastrnn.replace(m)
    copied = swap.to_torch(m)
    assert type(copied.shared) is nn.LSTM
    assert copied.shared is copied.blocks[0]
    assert type(m.shared) is fastrnn.LSTM
    assert torch.equal(copied(x()), expected)


def test_to_torch_refuses_a_subclass() -> None:
    class Own(fastrnn.LSTM):
        pass

    with pytest.raises(TypeError, match=r"no torch\.nn equivalent: a subclass of fastrnn\.LSTM"):
        Own(3, 4).to_torch()
    assert names(fastrnn.restore(nn.Sequential(Own(3, 4))).left) == ["0"]
