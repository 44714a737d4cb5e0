"""torch.func.vmap over layers and cells, against loops over torch.nn: inputs, states and weights
mapped, alone and together, along any dimension, on several levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drop_in import both_libraries
from drop_in import build as build_layer
from loops import NO_REFERENCE, Func, Loops, arguments, both, many, named, runner
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

import fastrnn
from cases import CELLS, Case, Problem, build
from compare import check, error
from fastrnn.parity import EPS

pytestmark = [
    *NO_REFERENCE,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

BASE = Case("plain", "", T=3, B=2, I=3, H=4, hx="none")
CASES = [
    BASE,
    dataclasses.replace(BASE, id="hx", hx="given"),
    dataclasses.replace(BASE, id="layers", layers=2, bidirectional=True, hx="given"),
    dataclasses.replace(BASE, id="no-bias", bias=False, hx="given"),
    dataclasses.replace(BASE, id="batch-first", batch_first=True, bidirectional=True),
    dataclasses.replace(BASE, id="unbatched", unbatched=True, hx="given"),
    dataclasses.replace(BASE, id="packed", lengths=(1, 3, 2), hx="given"),
    dataclasses.replace(BASE, id="packed-layers", lengths=(3, 1), layers=2, bidirectional=True),
    dataclasses.replace(BASE, id="B0", B=0, hx="given"),
    dataclasses.replace(BASE, id="T1-I1", T=1, I=1),
    dataclasses.replace(BASE, id="wide", I=20, H=17, B=1),
]
each_cell = pytest.mark.parametrize("cell", CELLS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
TWO_WAYS = dataclasses.replace(BASE, hx="given", layers=2, bidirectional=True)


def compare(what: Callable[[Any], Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """That torch.func over fastrnn gives what loops over torch.nn give. Returns it."""
    got, expected = both(what)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype == dtype, name
        if tensor.numel():
            assert error(tensor, expected[name]) <= EPS[dtype], name
    return got


def mapped(problem: Problem, size: int, dims: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """The arguments of a problem's runner, mapped where a dimension is given."""
    given = arguments(problem)
    return tuple(g if d is None else many(size, g, d) for g, d in zip(given, dims, strict=True))


@each_cell
@each_case
@pytest.mark.parametrize("size", [1, 3])
def test_inputs_states_weights_and_all(cell: str, case: Case, size: int) -> None:
    problem = build(cell, case, torch.float64)
    whole = (0, 0, 0 if case.hx == "given" else None)
    each = [tuple(d if i == k else None for i, d in enumerate(whole)) for k in range(3)]
    for dims in [whole, *(e for e in each if any(d is not None for d in e))]:
        given = mapped(problem, size, dims)
        compare(lambda side: side.vmap(runner(side, problem), dims)(*given))  # noqa: B023


@each_cell
@pytest.mark.parametrize("dims", [(-1, 1, 2), (None, 2, 1), (-1, None, -1), (0, -1, None)])
def test_other_dimensions(cell: str, dims: tuple[Any, Any, Any]) -> None:
    problem = build(cell, TWO_WAYS, torch.float64)
    given = mapped(problem, 3, dims)
    for out_dims in (0, 1, -1):
        compare(lambda side: side.vmap(runner(side, problem), dims, out_dims)(*given))  # noqa: B023


@each_cell
def test_some_weights(cell: str) -> None:
    """One weight of an ensemble differs, the others are shared."""
    problem = build(cell, TWO_WAYS, torch.float64)
    weights, input, states = arguments(problem)
    for name in weights:
        dims = {k: 0 if k == name else None for k in weights}
        given = {k: many(2, v) if k == name else v for k, v in weights.items()}
        compare(
            lambda side: side.vmap(runner(side, problem), (dims, None, None))(given, input, states)  # noqa: B023
        )


@each_cell
@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: case.id)
@pytest.mark.parametrize("outer", [(0, None, None), (None, -1, None), (None, None, 0), (0, 1, 0)])
@pytest.mark.parametrize("inner", [(0, None, None), (None, 0, 1), (-1, 0, 0)])
def test_nested(cell: str, case: Case, outer: tuple[Any, ...], inner: tuple[Any, ...]) -> None:
    problem = build(cell, case, torch.float64)
    given: Any = mapped(problem, 2, inner)  # type: ignore[arg-type]
    given = [g if d is None else many(3, g, d) for g, d in zip(given, outer, strict=True)]
    compare(lambda side: side.vmap(side.vmap(runner(side, problem), inner), outer)(*given))


@each_cell
def test_three_levels(cell: str) -> None:
    """Every kind of argument is mapped on a level of its own, and all are members in the end."""
    problem = build(cell, dataclasses.replace(TWO_WAYS, layers=1), torch.float64)
    for order in [(0, 1, 2), (2, 1, 0), (1, 0, 2)]:
        levels = [tuple(0 if i == k else None for i in range(3)) for k in order]
        given = mapped(problem, 2, (0, 0, 0))

        def what(side: Any) -> Any:
            f = runner(side, problem)
            for dims in levels:  # noqa: B023
                f = side.vmap(f, dims)
            return f(*given)  # noqa: B023

        compare(what)


@each_cell
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks(cell: str, chunk_size: int) -> None:
    problem = build(cell, TWO_WAYS, torch.float64)
    for dims in [(None, 0, None), (0, 0, 0)]:
        given = mapped(problem, 5, dims)
        compare(
            lambda side: side.vmap(runner(side, problem), dims, chunk_size=chunk_size)(*given)  # noqa: B023
        )


@each_cell
def test_float32_by_the_rule(cell: str) -> None:
    case = dataclasses.replace(TWO_WAYS, T=9, B=5, H=33, I=7)
    problem = build(cell, case, torch.float32)
    doubled = dataclasses.replace(problem, dtype=torch.float64)
    for dims in [(None, 0, 0), (0, None, None), (0, 0, 0)]:
        given = mapped(problem, 3, dims)
        double = torch.utils._pytree.tree_map(Tensor.double, given)
        got, same = both(lambda side: side.vmap(runner(side, problem), dims)(*given))  # noqa: B023
        exact = named(Loops.vmap(runner(Loops, doubled), dims)(*double))
        check(got, same, exact)


@both_libraries
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_of_torch_have_no_rule(lib: Any, name: str) -> None:
    """A deliberate difference: torch.nn refuses vmap over its layers, fastrnn does not."""
    layer = build_layer(lib, name, 3, 4)
    x = torch.randn(6, 3, 2, 3)
    if lib is nn:
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            vmap(lambda t: layer(t)[0])(x)
    else:
        got = vmap(lambda t: layer(t)[0])(x)
        torch.testing.assert_close(got, torch.stack([layer(t)[0] for t in x]))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str, bias: bool, batched: bool) -> None:
    rows = (2,) if batched else ()
    weights = {k: v.detach().double() for k, v in
               build_layer(nn, name, 3, 4, bias=bias).named_parameters()}  # fmt: skip
    x, h = torch.randn(*rows, 3).double(), torch.randn(*rows, 4).double()

    def f(side: Any, with_state: bool) -> Callable[..., Any]:
        cell = getattr(side.library, name)(3, 4, bias=bias).double()

        def run(w: dict[str, Tensor], x: Tensor, h: Tensor) -> Any:
            hx = None if not with_state else (h, h.sin()) if name == "LSTMCell" else h
            return side.call(cell, w, x, hx)

        return run

    for dims in [(0, None, None), (None, 0, None), (None, None, 0), (0, -1, -1), (-1, 0, 0)]:
        given = [t if d is None else many(3, t, d)
                 for t, d in zip((weights, x, h), dims, strict=True)]  # fmt: skip
        for with_state in (True, False) if dims[:2] != (None, None) else (True,):
            compare(lambda side: side.vmap(f(side, with_state), dims)(*given))  # noqa: B023


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_functional(name: str) -> None:
    """Weights as a list, as they come out of a hypernetwork."""
    upper = name.upper()
    layer = build_layer(nn, upper, 3, 4, dtype=torch.float64)
    weights = many(3, [p.detach() for p in layer.parameters()])
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64)

    def what(side: Any) -> Any:
        if side is Func:
            run = getattr(fastrnn.functional, name)
            return side.vmap(lambda w, x: run(x, w)[0])(weights, x)
        names = [n for n, _ in layer.named_parameters()]
        return side.vmap(
            lambda w, x: side.call(layer, dict(zip(names, w, strict=True)), x)[0]
        )(weights, x)

    compare(what)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("shared", [False, True])
def test_dropout(name: str, shared: bool) -> None:
    """Masks differ among members, or are the same, as `randomness` says; "error" raises."""
    layer = getattr(fastrnn, name)(3, 16, num_layers=2, dropout=0.5)
    x, weights = torch.randn(4, 2, 3), dict(layer.named_parameters())
    copies = x.expand(3, 4, 2, 3) if shared else {k: v.expand(3, *v.shape)
                                                  for k, v in weights.items()}  # fmt: skip

    def run(randomness: str) -> Tensor:
        def f(own: Any) -> Tensor:
            given = (weights, own) if shared else (own, x)
            return Func.call(layer, *given)[0]

        result: Tensor = vmap(f, randomness=randomness)(copies)
        return result

    different, same = run("different"), run("same")
    assert torch.allclose(same[0], same[1], atol=1e-6)
    assert torch.allclose(same[0], same[2], atol=1e-6)
    assert not torch.allclose(different[0], different[1], atol=1e-3)
    with pytest.raises(RuntimeError, match="randomness"):
        run("error")
    layer.eval()
    assert torch.allclose(run("error")[1], layer(x)[0], atol=1e-6)


@each_cell
def test_ensemble_of_modules(cell: str) -> None:
    """stack_module_state, as torch's tutorial of ensembles does it, and training it."""
    case = dataclasses.replace(BASE, layers=2)
    problems = [build(cell, case, torch.float64, seed) for seed in range(3)]
    weights, buffers = stack_module_state([p.make(fastrnn) for p in problems])
    module, input = problems[0].make(fastrnn), arguments(problems[0])[1]

    def loss(w: Any, b: Any) -> Tensor:
        output: Tensor = torch.func.functional_call(module, (w, b), (input,))[0]
        return output.square().sum()

    losses = vmap(loss)(weights, buffers)
    losses.sum().backward()
    for i, problem in enumerate(problems):
        alone = problem.make(torch.nn)
        alone_loss = alone(input)[0].square().sum()
        alone_loss.backward()
        assert error(losses[i].detach(), alone_loss.detach()) <= EPS[torch.float64]
        for name, parameter in alone.named_parameters():
            assert error(weights[name].grad[i], parameter.grad) <= EPS[torch.float64]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("features", [1, 2, 3, 5])
def test_inputs_of_other_sizes_are_refused(name: str, features: int) -> None:
    """Inputs of 4 / S features, which side by side have those of one."""
    layer = getattr(fastrnn, name)(4, 6)
    stacked = {k: torch.randn(2, *p.shape) for k, p in layer.named_parameters()}
    x = torch.randn(2, 5, 3, features)
    with pytest.raises(RuntimeError, match=f"Expected 4, got {features}"):
        torch.func.vmap(lambda p, q: torch.func.functional_call(layer, p, (q,))[0])(stacked, x)
