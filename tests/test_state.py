"""Parameters from outside: state dicts, pickles of any age, copies, conversions, and everything
that replaces, reparametrises or updates a weight between two calls."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries, build, states
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastrnn
from compare import check, with_gradients

OPTIONS = [("RNN", {"nonlinearity": "relu"}), ("LSTM", {"proj_size": 2}), ("GRU", {"bias": False})]
OPTIONS += [(name, {"num_layers": 2, "bidirectional": True}) for name in LAYERS]
OPTIONS += [(name, {}) for name in CELLS]


def data(name: str) -> Tensor:
    return torch.linspace(-1, 1, 30).reshape((10, 3) if name in CELLS else (5, 2, 3))


def flat(module: nn.Module, x: Tensor) -> Tensor:
    """Everything that a call returns, in one vector."""
    first, *rest = states(module(x))
    return torch.cat([t.flatten() for part in (first, *rest) for t in states(part)])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


Run = Callable[[ModuleType, torch.dtype], dict[str, Tensor]]


def check_run(run: Run) -> None:
    """``run(library, dtype)`` gives numbers with fastrnn that are as good as with torch.nn."""
    check(run(fastrnn, torch.float32), run(nn, torch.float32), run(nn, torch.float64))


def changed(name: str, change: Callable[[nn.Module], Any]) -> None:
    """``change`` alters a layer: fastrnn's result follows it as torch.nn's does."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        layer, x = build(lib, name, 3, 4).to(dtype), data(name).to(dtype)
        before = flat(layer, x).detach()
        change(layer)
        after = flat(layer, x).detach()
        assert not same(after, before)
        return {"after": after}

    check_run(run)


# Dictionaries and pickles


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("direction", ["torch to fastrnn", "fastrnn to torch"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_state_dict(name: str, options: dict[str, Any], assign: bool, direction: str) -> None:
    libs = (nn, fastrnn) if direction.startswith("torch") else (fastrnn, nn)
    source, target = (getattr(lib, name)(3, 4, **options) for lib in libs)
    x = data(name)
    flat(target, x)  # whatever a first call might cache must not survive
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert str(result) == "<All keys matched successfully>"
    torch_layer, fast = (source, target) if libs[0] is nn else (target, source)
    in_float64 = copy.deepcopy(torch_layer).double()
    check({"y": flat(fast, x)}, {"y": flat(torch_layer, x)}, {"y": flat(in_float64, x.double())})
    if name in LAYERS:
        weights = zip(target._flat_weights, target.parameters(), strict=True)
        assert all(a is b for a, b in weights)


@both_libraries
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_state_dict_errors(lib: ModuleType, name: str, options: dict[str, Any]) -> None:
    layer = getattr(lib, name)(3, 4, **options)
    state = layer.state_dict()
    key = next(iter(state))
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        layer.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "weight_xx": state[key]})
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        layer.load_state_dict({**state, key: torch.zeros(1)})


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@both_libraries
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("copier", [through_pickle, through_file, copy.deepcopy])
def test_copies(
    lib: ModuleType, name: str, options: dict[str, Any], copier: Callable[[nn.Module], nn.Module]
) -> None:
    layer, x = getattr(lib, name)(3, 4, **options).eval(), data(name)
    expected = flat(layer, x)
    next(layer.parameters()).requires_grad_(False)
    copied = copier(layer)
    assert type(copied) is type(layer)
    assert not copied.training
    assert repr(copied) == repr(layer)
    assert torch.equal(flat(copied, x), expected)
    pairs = zip(layer.parameters(), copied.parameters(), strict=True)
    assert all(a is not b and a.requires_grad == b.requires_grad for a, b in pairs)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(flat(layer, x), expected)
    assert not torch.equal(flat(copied, x), expected)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_old_pickles(lib: ModuleType, name: str, bias: bool) -> None:
    layer, x = getattr(lib, name)(3, 4, 2, bias=bias, bidirectional=True), data(name)
    before_projections = layer.__getstate__()
    del before_projections["proj_size"]  # before torch 1.8
    before_names = copy.copy(before_projections)  # weights, where later their names stood
    before_names["all_weights"] = layer.all_weights
    for key in ("_all_weights", "_flat_weights", "_flat_weights_names"):
        del before_names[key]
    for state in (before_projections, before_names):
        restored = type(layer).__new__(type(layer))
        restored.__setstate__(copy.deepcopy(state))
        assert restored.proj_size == 0
        assert restored._flat_weights_names == layer._flat_weights_names
        assert torch.equal(flat(restored, x), flat(layer, x))


# Weights that change between two calls


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_optimizer_steps_are_seen(name: str) -> None:
    def step(layer: nn.Module) -> None:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        flat(layer, data(name).to(next(layer.parameters()))).square().sum().backward()
        optimizer.step()

    changed(name, step)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_changes_through_data_are_seen(name: str) -> None:
    def double(layer: nn.Module) -> None:
        for p in layer.parameters():
            p.data.mul_(2)  # does not count as a version of p

    changed(name, double)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_new_data_is_seen(name: str) -> None:
    def exchange(layer: nn.Module) -> None:
        for p in layer.parameters():
            p.data = p.data * 2

    changed(name, exchange)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_assigned_parameter_is_seen(name: str) -> None:
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"

    def assign(layer: nn.Module) -> None:
        setattr(layer, weight, nn.Parameter(getattr(layer, weight).detach() * 3 + 1))

    changed(name, with_state(assign, name))


def with_state(change: Callable[[nn.Module], Any], name: str) -> Callable[[nn.Module], Any]:
    """``change``, with a bias large enough that one step from a zero state shows it as well."""

    def apply(layer: nn.Module) -> None:
        change(layer)
        with torch.no_grad():
            getattr(layer, "bias_ih" if name in CELLS else "bias_ih_l0").add_(1)

    return apply


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functional_call(name: str) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        layer, x = build(lib, name, 3, 4).to(dtype), data(name).to(dtype)
        original = flat(layer, x).detach()
        other = {k: (p * 2).detach().requires_grad_() for k, p in layer.named_parameters()}
        result = functional_call(layer, other, (x,))
        result = torch.cat([t.flatten() for part in states(result) for t in states(part)])
        assert torch.equal(flat(layer, x), original)
        return with_gradients({"y": result}, other, {"y": 2 * result.detach()})

    check_run(run)


# Reparametrisation

WEIGHTS = [("LSTM", "weight_hh_l0"), ("GRU", "weight_ih_l0"), ("RNN", "weight_hh_l0")]
WEIGHTS += [("LSTMCell", "weight_ih"), ("GRUCell", "weight_ih")]


@pytest.mark.parametrize(("name", "weight"), WEIGHTS)
@pytest.mark.parametrize("kind", ["new weight_norm", "legacy weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_norms(name: str, weight: str, kind: str) -> None:
    apply = {
        "new weight_norm": weight_norm,
        "legacy weight_norm": nn.utils.weight_norm,
        "spectral_norm": spectral_norm,
    }[kind]
    gain = {"new weight_norm": f"parametrizations.{weight}.original0"}.get(kind, f"{weight}_g")

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = apply(build(lib, name, 3, 4), weight).to(dtype)
        layer.eval()  # spectral_norm iterates in training
        x = data(name).to(dtype)
        first = flat(layer, x)
        first.square().sum().backward()
        grads = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
        if kind != "spectral_norm":
            with torch.no_grad():
                dict(layer.named_parameters())[gain].mul_(2)
            assert not same(flat(layer, x), first)  # the next call sees the new gain
        with torch.no_grad():  # with a graph, torch.nn's layers cannot be copied either
            then = flat(layer, x)
            copied = copy.deepcopy(layer) if kind != "legacy weight_norm" else layer
        return {"first": first, "then": then, "copy": flat(copied, x), **grads}

    check_run(run)


@pytest.mark.parametrize(("name", "weight"), WEIGHTS)
def test_pruning(name: str, weight: str) -> None:
    def cut(layer: nn.Module) -> None:
        prune.l1_unstructured(layer, weight, amount=0.5)

    def cut_for_good(layer: nn.Module) -> None:
        cut(layer)
        prune.remove(layer, weight)

    changed(name, with_state(cut, name))
    changed(name, with_state(cut_for_good, name))


# Conversions


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_conversion(name: str, swap: bool, dtype: torch.dtype) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        results = []
        for lib in (nn, fastrnn):
            layer = build(lib, name, 3, 4)
            flat(layer, data(name))
            with torch.no_grad():
                flat(layer, data(name))
            layer = layer.half() if dtype == torch.float16 else layer.to(dtype)
            assert all(p.dtype == dtype for p in layer.parameters())
            x = data(name).to(dtype)
            results.append({"y": flat(layer, x)})
            if name in LAYERS:
                weights = zip(layer._flat_weights, layer.parameters(), strict=True)
                assert all(a is b for a, b in weights)
        torch_same, got = results
        assert got["y"].dtype == dtype
        layer = build(nn, name, 3, 4).to(dtype).double()
        check(got, torch_same, {"y": flat(layer, x.double())})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@both_libraries
@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("grad", [False, True])
def test_calls_keep_no_reference(lib: ModuleType, name: str, grad: bool) -> None:
    """To a weight, or through an attribute of it to the module: swapped and freed as torch.nn's."""
    layer = build(lib, name, 3, 4)
    first = next(layer.parameters())
    with torch.set_grad_enabled(grad):
        flat(layer, data(name))
        if name in CELLS:  # torch.nn.RNNBase keeps weak references, which swap_tensors refuses
            torch.utils.swap_tensors(first, nn.Parameter(torch.zeros_like(first)))
            assert not first.any()
            flat(layer, data(name))
    cast(Any, first).owner = layer
    gone = weakref.ref(layer)
    del layer, first
    gc.collect()
    assert gone() is None


@both_libraries
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_shared_memory(lib: ModuleType, name: str) -> None:
    layer = build(lib, name, 3, 4)
    before = flat(layer, data(name))
    layer.share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    assert torch.equal(flat(layer, data(name)), before)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_data_parallel_replica(lib: ModuleType, name: str) -> None:
    layer = build(lib, name, 3, 4)
    before = flat(layer, data(name)).detach()
    replica = layer._replicate_for_data_parallel()
    assert replica._flat_weights is not layer._flat_weights
    for key, p in layer.named_parameters():  # as torch.nn.parallel.replicate does
        setattr(replica, key, p.detach() * 2)
    assert not same(flat(replica, data(name)), before)
    assert torch.equal(flat(layer, data(name)), before)
