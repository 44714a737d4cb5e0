"""torch.func's derivatives of layers and cells, and what vmap makes of them, against loops over
torch.nn with torch.autograd; and that an ensemble is one call of an operator, not a loop."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from drop_in import build as build_layer
from loops import NO_REFERENCE, Func, Loops, arguments, both, many, named, runner
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import fastrnn
from cases import CELLS, Case, Problem, build
from compare import check, error
from fastrnn import _backend, _ops

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
on_kernels = NO_REFERENCE[0]

BASE = Case("plain", "", T=3, B=2, I=3, H=4, hx="none")
CASES = [
    BASE,
    dataclasses.replace(BASE, id="layers", layers=2, bidirectional=True, hx="given"),
    dataclasses.replace(BASE, id="no-bias", bias=False, hx="given", batch_first=True),
    dataclasses.replace(BASE, id="unbatched", unbatched=True, bidirectional=True, hx="given"),
    dataclasses.replace(BASE, id="packed", lengths=(1, 3, 2), bidirectional=True, hx="given"),
    dataclasses.replace(BASE, id="T1-B1-I1", T=1, B=1, I=1, hx="given"),
    dataclasses.replace(BASE, id="B0", B=0, hx="given"),
]
TINY = dataclasses.replace(BASE, T=2, I=2, H=3, P=2, hx="given")
each_cell = pytest.mark.parametrize("cell", CELLS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
CLOSE = 1e-10  # float64, derivatives of high order


def loss_of(side: Any, problem: Problem) -> Callable[..., Tensor]:
    """A number that depends on every result of a layer, and whose derivatives differ all over."""
    run = runner(side, problem)

    def loss(*given: Any) -> Tensor:
        total = torch.zeros((), dtype=problem.dtype)
        for i, result in enumerate(run(*given)):
            places = torch.arange(1, result.numel() + 1, dtype=result.dtype).view(result.shape)
            total = total + (result * (places + i)).sin().sum()
        return total

    return loss


def compare(what: Callable[[Any], Any], close: float = CLOSE) -> None:
    got, expected = both(what)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in got.items():
        if tensor.numel():
            assert error(tensor.detach(), expected[name].detach()) <= close, name


def argnums(case: Case) -> range:
    """Of weights, input and states, as far as they are given."""
    return range(3 if case.hx == "given" else 2)


def squares(tree: Any) -> Tensor:
    """The square of the norm of all tensors together."""
    return sum((t.square().sum() for t in named(tree).values()), torch.zeros(()).double())


@on_kernels
@each_cell
@each_case
def test_gradients(cell: str, case: Case) -> None:
    problem = build(cell, case, torch.float64)
    given = arguments(problem)
    for k in argnums(case):
        compare(lambda side: side.grad(loss_of(side, problem), k)(*given))  # noqa: B023


@on_kernels
@each_cell
@each_case
def test_per_sample_gradients(cell: str, case: Case) -> None:
    """vmap(grad), of shared weights and of ensembles."""
    problem = build(cell, case, torch.float64)
    for size, dims in [(3, (None, 0, None)), (1, (None, 0, None)), (2, (0, None, None))]:
        given = list(arguments(problem))
        given = [g if d is None else many(size, g) for g, d in zip(given, dims, strict=True)]
        for k in argnums(case):
            compare(
                lambda side: side.vmap(side.grad(loss_of(side, problem), k), dims)(*given)  # noqa: B023
            )


@on_kernels
@each_cell
@each_case
def test_gradient_of_vmap(cell: str, case: Case) -> None:
    """grad(vmap) by each argument, of members that share the others; torch.func outside."""
    problem = build(cell, case, torch.float64)
    for dims in [(None, 0, None), (0, None, None), (0, 0, None)]:
        given = [g if d is None else many(2, g)
                 for g, d in zip(arguments(problem), dims, strict=True)]  # fmt: skip

        def what(side: Any) -> Any:
            mapped = side.vmap(loss_of(side, problem), dims)  # noqa: B023
            by = [side.grad(lambda *a: mapped(*a).sin().sum(), k) for k in argnums(case)]
            return [gradient(*given) for gradient in by]  # noqa: B023

        compare(what)


@on_kernels
@each_cell
@each_case
def test_gradient_of_gradient_norms(cell: str, case: Case) -> None:
    """Second order: of one gradient, of per-sample gradients, and of those of an ensemble whose
    inputs differ too."""
    problem = build(cell, case, torch.float64)

    def norm(side: Any, k: int) -> Callable[..., Tensor]:
        gradient = side.grad(loss_of(side, problem), k)
        return lambda *a: squares(gradient(*a)).sqrt()

    def total(side: Any, k: int, dims: Any) -> Callable[..., Tensor]:
        each = side.vmap(norm(side, k), dims)
        return lambda *a: each(*a).sum()

    given = arguments(problem)
    if case.B == 0:  # the norm is zero, and has no gradient
        return
    compare(lambda side: side.grad(norm(side, 0), 1)(*given))
    compare(lambda side: side.grad(norm(side, 1), 0)(*given))
    for dims in [(None, 0, None), (0, 0, None)]:
        mapped = [g if d is None else many(2, g) for g, d in zip(given, dims, strict=True)]
        compare(lambda side: side.grad(total(side, 0, dims), 0)(*mapped))  # noqa: B023
        compare(lambda side: side.vmap(side.grad(norm(side, 0), 1), dims)(*mapped))  # noqa: B023


@each_cell
@pytest.mark.parametrize("case", [TINY, dataclasses.replace(TINY, lengths=(1, 2), hx="none")],
                         ids=["dense", "packed"])  # fmt: skip
@pytest.mark.parametrize("which", ["jacrev", "jacfwd", "hessian"])
@pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference")
def test_jacobians(cell: str, case: Case, which: str) -> None:
    problem = build(cell, case, torch.float64)
    weights, *rest = arguments(problem)

    def what(side: Any) -> Any:
        run, loss = runner(side, problem), loss_of(side, problem)
        f = loss if which == "hessian" else lambda *a: torch.cat([r.flatten() for r in run(*a)])

        def of_one(w: Tensor, x: Tensor, states: Any) -> Tensor:
            return f(weights | {"weight_hh_l0": w}, x, states)

        by = getattr(side, which)
        return [by(of_one, k)(weights["weight_hh_l0"], *rest) for k in (0, 1)]

    compare(what)


@on_kernels
@each_cell
def test_vjp_and_float32(cell: str) -> None:
    """float32 by the rule of fastrnn.parity."""
    case = dataclasses.replace(CASES[1], T=7, B=5, H=33, I=6)
    problem = build(cell, case, torch.float32)
    doubled = dataclasses.replace(problem, dtype=torch.float64)
    given = arguments(problem)
    given = (given[0], many(3, given[1]), given[2])
    double = torch.utils._pytree.tree_map(Tensor.double, given)
    dims = (None, 0, None)

    def what(side: Any, problem: Problem = problem, given: Any = given) -> Any:
        run = runner(side, problem)

        def loss(*a: Any) -> Tensor:
            return squares(run(*a)).to(problem.dtype)

        return [side.vmap(side.grad(loss, k), dims)(*given) for k in range(3)]

    got, same = both(what)
    check(got, same, named(what(Loops, doubled, double)))
    run = runner(Func, problem)
    value, pull = vjp(lambda *a: squares(run(*a)), *arguments(problem))
    gradients = pull(torch.ones_like(value))
    single = [grad(lambda *a: squares(run(*a)), k)(*arguments(problem)) for k in range(3)]
    for name, tensor in named(list(gradients)).items():
        assert torch.equal(tensor, named(single)[name]), name


@pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference")
@each_cell
@each_case
def test_forward_mode(cell: str, case: Case) -> None:
    """jvp, jvp of vmap, vmap of jvp, jvp of grad and grad of jvp, and dual numbers, by torch.nn's
    products with the same vectors."""
    problem = build(cell, case, torch.float64)
    given = arguments(problem)
    tangent = torch.randn_like(given[1])
    loss, theirs = loss_of(Func, problem), loss_of(Loops, problem)
    first = (Loops.grad(theirs, 1)(*given) * tangent).sum()

    def at(x: Tensor) -> Tensor:
        return loss(given[0], x, given[2])

    def hessian_product() -> Tensor:
        x = given[1].clone().requires_grad_()
        by_input = Loops.grad(theirs, 1)(given[0], x, given[2])
        return torch.autograd.grad((by_input * tangent).sum(), x)[0]

    def is_close(got: Tensor, expected: Tensor) -> None:
        assert got.shape == expected.shape
        if got.numel():
            assert error(got.detach(), expected.detach()) <= CLOSE

    is_close(jvp(at, (given[1],), (tangent,))[1], first)
    both_ways = torch.stack([tangent, -tangent])
    along = vmap(lambda v: jvp(at, (given[1],), (v,))[1])(both_ways)
    is_close(along, torch.stack([first, -first]))
    inputs = torch.stack([given[1], given[1]])
    is_close(jvp(vmap(at), (inputs,), (both_ways,))[1], torch.stack([first, -first]))
    second = hessian_product()
    is_close(jvp(grad(at), (given[1],), (tangent,))[1], second)
    is_close(grad(lambda x: jvp(at, (x,), (tangent,))[1])(given[1]), second)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(at(forward_ad.make_dual(given[1], tangent))).tangent
        assert result is not None
        is_close(result, first)
        twice = forward_ad.make_dual(inputs, torch.stack([tangent, 2 * tangent]))
        mapped = forward_ad.unpack_dual(vmap(at)(twice)).tangent
        assert mapped is not None
        is_close(mapped, torch.stack([first, 2 * first]))


def test_forward_mode_says_once_that_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if _ops.native_error is not None:
        pytest.skip(_ops.native_error)
    monkeypatch.setattr(_backend, "_warned", set())
    layer, x = fastrnn.GRU(3, 4).requires_grad_(False), torch.randn(5, 2, 3)

    def run() -> None:
        for _ in range(2):
            jvp(lambda t: layer(t)[0], (x,), (x,))
            torch.func.jacfwd(lambda t: layer(t)[0])(x)

    with pytest.warns(UserWarning, match="no forward-mode derivative") as seen:
        run()
    ours = [w for w in seen if "slow reference" in str(w.message)]
    assert len(ours) == 1


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of the native operators inside the block."""
    calls = {"layer": 0, "layer_backward": 0}
    before = _ops.layer, _ops.layer_backward

    def count(name: str, run: Any) -> Any:
        def counting(*given: Any) -> Any:
            calls[name] += 1
            return run(*given)

        return counting

    _ops.layer, _ops.layer_backward = (
        count(n, run) for n, run in zip(calls, before, strict=True)
    )
    try:
        yield calls
    finally:
        _ops.layer, _ops.layer_backward = before


@pytest.mark.skipif(_ops.native_error is not None, reason="pure-Python install")
@pytest.mark.filterwarnings("error")
@each_cell
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=["dense", "packed"])
def test_members_are_one_call_of_each_layer(cell: str, case: Case) -> None:
    warnings.filterwarnings("ignore", "LSTM with projections")
    problem = build(cell, case, torch.float64)
    weights, x, states = arguments(problem)
    ensemble, data = many(7, weights), many(5, x)
    loss, outputs, L = loss_of(Func, problem), runner(Func, problem), case.layers
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "inputs": (0, lambda: vmap(loss, (None, 0, None))(weights, data, states)),
        "ensemble": (0, lambda: vmap(loss, (0, None, None))(ensemble, x, states)),
        "per-sample": (1, lambda: vmap(grad(loss), (None, 0, None))(weights, data, states)),
        "all": (1, lambda: vmap(grad(loss), (0, None, None))(ensemble, x, states)),
        "each on each": (1, lambda: vmap(vmap(grad(loss), (None, 0, None)), (0, None, None))(
            ensemble, data, states)),
        "gradient of vmap": (1, lambda: grad(
            lambda w: vmap(loss, (0, None, None))(w, x, states).sum())(ensemble)),
        "jacobian": (1, lambda: torch.func.jacrev(
            lambda x: outputs(weights, x, states)[0])(x)),
    }  # fmt: skip
    for name, (backward, run) in runs.items():
        with counted() as calls:
            run()
        assert calls == {"layer": L, "layer_backward": backward * L}, name


@on_kernels
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("batched", [True, False])
def test_cells(name: str, batched: bool) -> None:
    rows = (2,) if batched else ()
    module = build_layer(nn, name, 3, 4, dtype=torch.float64)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    x, h = torch.randn(*rows, 3).double(), torch.randn(*rows, 4).double()

    def loss(side: Any) -> Callable[..., Tensor]:
        cell = getattr(side.library, name)(3, 4).double().requires_grad_(False)

        def run(w: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
            found = side.call(cell, w, x, (h, h.sin()) if name == "LSTMCell" else h)
            return squares(found)

        return run

    def norms(side: Any) -> Callable[..., Tensor]:
        gradient = side.grad(loss(side))
        return lambda *a: squares(gradient(*a))

    dims = (None, 0, 0)
    given = (weights, many(3, x), many(3, h))
    for k in range(3):
        compare(lambda side: side.grad(loss(side), k)(weights, x, h))  # noqa: B023
        compare(lambda side: side.vmap(side.grad(loss(side), k), dims)(*given))  # noqa: B023
        compare(lambda side: side.vmap(side.grad(norms(side), k), dims)(*given))  # noqa: B023
