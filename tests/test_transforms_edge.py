"""What surrounds transforms of layers: backward passes that are mapped, changes in place, narrow
dtypes, autocast, tensors without data, threads, memory, hooks; and what is refused, clearly."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drop_in import LAYERS
from loops import NO_REFERENCE
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from compare import check
from fastrnn import _backend, _ops

on_kernels = NO_REFERENCE[0]
each_name = pytest.mark.parametrize("name", LAYERS)
needs_native = pytest.mark.skipif(_ops.native_error is not None, reason="pure-Python install")
REFERENCE_RUNS = pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference")


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Layers of torch.nn and fastrnn of equal weights."""
    theirs = getattr(nn, name)(3, 4, dtype=dtype, **options)
    ours = getattr(fastrnn, name)(3, 4, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def data(*lead: int) -> Tensor:
    return torch.randn(*lead, 5, 2, 3, dtype=torch.float64)


def loss_of(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)[0].square().sum()


def by_autograd(layer: Any, x: Tensor, change: Callable[[Tensor], Tensor] = lambda o: o) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(change(layer(leaf)[0]).square().sum(), leaf)[0]


@each_name
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["vmap", "is_grads_batched", "jacobian"])
@REFERENCE_RUNS
def test_backward_is_mapped(name: str, create_graph: bool, how: str) -> None:
    """Many vectors through one backward pass; the graph of it is another's input."""
    results = []
    for layer in pair(name, num_layers=2, bidirectional=True):
        torch.manual_seed(3)
        x = data().requires_grad_()
        output = layer(x)[0]
        leaves = [x, *layer.parameters()]
        vectors = torch.randn(3, *output.shape, dtype=torch.float64)

        def one(v: Tensor, o: Tensor = output, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(o, leaves, v, create_graph=create_graph, retain_graph=True)

        if not isinstance(layer, fastrnn.modules.Layer):
            found = [torch.stack(c) for c in zip(*map(one, vectors), strict=True)]
        elif how == "vmap":
            found = list(vmap(one)(vectors))
        elif how == "is_grads_batched":
            found = list(torch.autograd.grad(
                output, leaves, vectors, is_grads_batched=True, create_graph=create_graph,
            ))  # fmt: skip
        else:
            whole = torch.autograd.functional.jacobian(
                lambda t: layer(t)[0], x, vectorize=True, create_graph=create_graph  # noqa: B023
            )
            found = [torch.tensordot(vectors, whole, 3)]
        if how == "jacobian":
            found = found[:1]
        if create_graph:
            total = sum((f.square().sum() for f in found), torch.zeros(()).double())
            found.append(torch.autograd.grad(total, x)[0])
        results.append(found)
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@on_kernels
@each_name
def test_outputs_changed_in_place(name: str) -> None:
    """Between vmap and an outer backward pass; under torch.func.grad it is refused, where torch.nn
    computes on: a deliberate difference."""
    theirs, ours = pair(name)
    x = data(4).requires_grad_()
    output = vmap(lambda t: ours(t)[0].mul_(2))(x)
    got = torch.autograd.grad(output.square().sum(), x)[0]
    for i, own in enumerate(x):
        torch.testing.assert_close(got[i], by_autograd(theirs, own, lambda o: 2 * o))
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda t: ours(t)[0].mul_(2))(x), output.detach())

    def changed(t: Tensor) -> Tensor:
        return ours(t)[0].mul_(2).square().sum()

    if _ops.native_error is None:
        for run in (lambda: grad(changed)(x[0]), lambda: vmap(grad(changed))(x)):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run()


@on_kernels
@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    """By the rule of fastrnn.parity, of members and of per-sample gradients."""
    theirs, ours = pair(name, dtype)
    exact, x = copy.deepcopy(theirs).double(), data(3).to(dtype)

    def looped(layer: Any, kind: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"output": []}
        for own in x.to(kind):
            output = layer(own)[0]
            found["output"].append(output.detach())
            gradients = torch.autograd.grad(output.sum(), list(layer.parameters()))
            for (key, _), g in zip(layer.named_parameters(), gradients, strict=True):
                found.setdefault(key, []).append(g)
        return {k: torch.stack(v) for k, v in found.items()}

    weights = {k: v.detach() for k, v in ours.named_parameters()}
    gradient = grad(lambda w, t: functional_call(ours, w, (t,))[0].sum())
    got = {"output": vmap(lambda t: functional_call(ours, weights, (t,))[0])(x)}
    got |= vmap(gradient, (None, 0))(weights, x)
    check(got, looped(theirs, dtype), looped(exact, torch.float64))


@on_kernels
@each_name
def test_autocast(name: str) -> None:
    _, layer = pair(name, torch.float32)
    x = data(3).float()
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = vmap(lambda t: layer(t)[0])(x), vmap(grad(loss_of(layer)))(x)
        expected = torch.stack([layer(own)[0] for own in x])
        singles = torch.stack([by_autograd(layer, own) for own in x])
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradients, singles, rtol=5e-2, atol=5e-2)


@needs_native
@on_kernels
@each_name
def test_tensors_without_data(name: str) -> None:
    """Shapes on the meta device, and a graph that is traced through the transforms."""
    _, layer = pair(name)
    x = data(4)
    abstract = copy.deepcopy(layer).to("meta")
    assert vmap(lambda t: abstract(t)[0])(x.to("meta")).shape == (4, 5, 2, 4)
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    gradient = vmap(grad(lambda w, t: functional_call(layer, w, (t,))[0].sum()), (None, 0))
    empty = {k: v.to("meta") for k, v in weights.items()}
    shapes = {k: v.shape for k, v in gradient(empty, x.to("meta")).items()}
    assert shapes == {k: (4, *v.shape) for k, v in weights.items()}
    graph = make_fx(gradient)(weights, x)
    for key, found in graph(weights, 2 * x).items():
        torch.testing.assert_close(found, gradient(weights, 2 * x)[key])


@on_kernels
@each_name
def test_what_stands_around(name: str) -> None:
    """Hooks, tied weights, saved-tensor hooks, inference mode; transforms of something else."""
    theirs, ours = pair(name)
    x = data(3)
    seen: list[Any] = []
    handle = ours.register_forward_hook(lambda *given: seen.append(given))
    outputs = vmap(lambda t: ours(t)[0])(x)
    handle.remove()
    assert len(seen) == 1
    with torch.inference_mode():
        torch.testing.assert_close(vmap(lambda t: ours(t)[0])(x), outputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(vmap(loss_of(ours))(leaf).sum(), leaf)[0]
    torch.testing.assert_close(found[1], by_autograd(theirs, x[1]))

    def scaled(t: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda s: (loss_of(ours)(t) * s).sum()

    whole = vmap(lambda t: grad(scaled(t))(torch.ones(()).double()))(x)
    torch.testing.assert_close(whole, torch.stack([loss_of(theirs)(own) for own in x]).detach())
    by_input = grad(lambda t: vmap(scaled(t))(torch.arange(3.0).double()).sum())(x[0])
    torch.testing.assert_close(by_input, 3 * by_autograd(theirs, x[0]))

    class Tied(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.first, self.second = layer, copy.deepcopy(layer)
            for key, parameter in layer.named_parameters():
                setattr(self.second, key, parameter)

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = self.first(x)[0] + self.second(x.flip(0))[0].sin()
            return total.square().sum()

    tied = Tied(ours)
    weights = {k: v.detach() for k, v in tied.named_parameters()}
    got = grad(lambda w: functional_call(tied, w, (x[0],)))(weights)
    expected = torch.autograd.grad(tied(x[0]), list(tied.parameters()))
    for g, e in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(g, e)


@each_name
def test_functionalize_runs_on_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    _, layer = pair(name)
    x = data(3)
    with pytest.warns(UserWarning, match="slow reference"):
        got = functionalize(lambda t: layer(t)[0])(x[0])
    torch.testing.assert_close(got, layer(x[0])[0])
    mapped = functionalize(vmap(grad(loss_of(layer))))(x)
    torch.testing.assert_close(mapped, torch.stack([by_autograd(layer, own) for own in x]))


@needs_native
def test_what_is_refused() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    weights = [p.detach() for p in layer.parameters()]
    counts = torch.tensor([[3, 2], [3, 2]])
    rows = torch.randn(2, 5, 3)
    with pytest.raises(RuntimeError, match="vmap over batch_sizes"):
        vmap(lambda d, b: layer(PackedSequence(d, b))[0].data)(rows, counts)
    h0 = torch.zeros(1, 3, 4)
    with pytest.raises(RuntimeError, match="vmap over batch_sizes"):
        vmap(lambda b: torch.ops.fastrnn.layer("gru", rows[0], weights, h0, None, b, 1, 0, False))(
            counts
        )
    with pytest.raises(RuntimeError, match="vmap over a dimension of size 0"):
        vmap(lambda t: layer(t)[0])(x.expand(0, 5, 2, 3))
    with pytest.raises(RuntimeError, match="input_size"):
        vmap(lambda t: layer(t)[0])(torch.randn(4, 5, 2, 6))
    with pytest.raises(RuntimeError, match="setup_context"):  # of torch: eager layers have a rule
        grad(lambda t: torch.ops.fastrnn.layer("gru", t, weights, None, None, None, 1, 0, True)[
            0].sum())(x)


@on_kernels
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_threads(name: str) -> None:
    run = getattr(fastrnn.functional, name)
    layer = getattr(fastrnn, name.upper())(3, 4)
    weights, x = [p.detach() for p in layer.parameters()], torch.randn(3, 5, 2, 3)

    def once() -> list[Tensor]:
        gradient = grad(lambda w, t: run(t, w)[0].square().sum())
        return list(vmap(gradient, (None, 0))(weights, x))

    expected, wrong = once(), []

    def work() -> None:
        for _ in range(10):
            wrong.extend(a for a, b in zip(once(), expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@on_kernels
def test_no_memory_is_lost() -> None:
    layer = fastrnn.LSTM(16, 32)
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    x = torch.randn(4, 9, 8, 16)

    def loss(w: dict[str, Tensor], t: Tensor) -> Tensor:
        return functional_call(layer, w, (t,))[0].square().sum()

    def work(times: int) -> int:
        for _ in range(times):
            vmap(grad(loss), (None, 0))(weights, x)
            ensemble = {k: torch.stack([v, v]).requires_grad_() for k, v in weights.items()}
            vmap(loss, (0, None))(ensemble, x[0]).sum().backward()
            grad(lambda t: grad(loss, 1)(weights, t).square().sum())(x[0, :2])
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    work(40)
    grown = [-work(0) + work(60) for _ in range(3)]
    assert min(grown) < 60 * 5_000, grown  # each keeps some 300,000 bytes while it runs
