"""Derivatives: of first and second order, what autograd promises around them, and transforms.

Sizes of gradients are compared with torch.nn in test_modules.py; here they are compared with finite
differences, and everything that is not a size is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastrnn
from cases import CELLS, Case, Problem, build
from compare import check, error
from fastrnn import _backend
from fastrnn.parity import EPS

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference"),
]

TINY = Case("tiny", "finite differences cost one run per element", T=3, B=2, I=2, H=3, P=2)
CASES = [
    TINY,
    dataclasses.replace(TINY, id="bidirectional", bidirectional=True),
    dataclasses.replace(TINY, id="layers", layers=2),
    dataclasses.replace(TINY, id="no-bias", bias=False),
    dataclasses.replace(TINY, id="no-hx", hx="none"),
    dataclasses.replace(TINY, id="packed", lengths=(1, 3, 2)),
    dataclasses.replace(TINY, id="packed-no-hx", lengths=(1, 3, 2), hx="none", bidirectional=True),
    dataclasses.replace(TINY, id="dropout", layers=2, dropout=0.5),
]


def as_function(problem: Problem) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The layer as a function of every tensor it depends on, and those tensors."""
    module = problem.make(fastrnn)
    leaves = problem.arguments()[2]
    names = [name for name, _ in module.named_parameters()]
    lengths = problem.case.lengths

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(problem.seed)
        parameters, data = tensors[: len(names)], tensors[len(names) :]
        states = data[1] if len(data) == 2 else tuple(data[1:]) or None
        x: Any = data[0]
        if lengths is not None:
            x = torch.nn.utils.rnn.pack_padded_sequence(
                x, torch.tensor(lengths), enforce_sorted=False
            )
        output, state = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, states)
        )
        output = output if lengths is None else output.data
        return (output, *(state if isinstance(state, tuple) else (state,)))

    return function, [*module.parameters(), *leaves.values()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(engine: str, cell: str, case: Case) -> None:
    """Element by element; the larger problems along random directions (fast_mode)."""
    function, tensors = as_function(build(cell, case, torch.float64))
    large = case.layers > 1 or case.bidirectional
    assert gradcheck(function, tensors, fast_mode=large)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(engine: str, cell: str, case: Case) -> None:
    function, tensors = as_function(build(cell, case, torch.float64))
    assert gradgradcheck(function, tensors, fast_mode=True)


def squared_gradients(namespace: Any, problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of a loss that contains the norm of the input's gradient (gradient penalty)."""
    module = problem.make(namespace, dtype)
    input, hx, leaves = problem.arguments(dtype)
    output, _ = module(input, hx)
    output = output if isinstance(output, Tensor) else output.data
    loss = (output * problem.cotangents["output"].to(output)).sum()
    (slope,) = torch.autograd.grad(loss, leaves["input"], create_graph=True)
    loss = (slope.norm(dim=-1) - 1).square().sum() + loss
    loss.backward()
    tensors = {**dict(module.named_parameters()), **leaves}
    return {f"d {name}": t.grad for name, t in tensors.items() if t.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalty(engine: str, cell: str, dtype: torch.dtype) -> None:
    case = Case("penalty", "a loss of gradients", layers=2, bidirectional=True, H=19)
    problem = build(cell, case, dtype)
    check(
        squared_gradients(fastrnn, problem, dtype),
        squared_gradients(torch.nn, problem, dtype),
        squared_gradients(torch.nn, problem, torch.float64),
    )


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_of_frozen_parts(engine: str, cell: str) -> None:
    """A gradient penalty on the input alone, all parameters frozen."""
    problem = build(cell, Case("frozen", "", frozen=("weights", "h_0", "c_0"), H=9), torch.float64)
    got = squared_gradients(fastrnn, problem, torch.float64)
    assert list(got) == ["d input"]
    expected = squared_gradients(torch.nn, problem, torch.float64)
    assert error(got["d input"], expected["d input"]) <= EPS[torch.float64]


@pytest.mark.parametrize("frozen", [(), ("weights",), ("input",), ("h_0",), ("weight_hh_l0",)])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_fills_grad_only_where_required(
    engine: str, cell: str, frozen: tuple[str, ...]
) -> None:
    problem = build(cell, Case("frozen", "", frozen=frozen), torch.float32)
    module = problem.make(fastrnn)
    input, hx, leaves = problem.arguments()
    module(input, hx)[0].sum().backward()
    for name, tensor in {**dict(module.named_parameters()), **leaves}.items():
        assert (tensor.grad is not None) == problem.wants_grad(name), name


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_required_records_no_graph(engine: str, cell: str) -> None:
    problem = build(cell, Case("none", "", grad=False), torch.float32)
    for tensor in problem.run(fastrnn).values():
        assert tensor.grad_fn is None
    module = problem.make(fastrnn).requires_grad_()
    input, hx, _ = problem.arguments()
    with torch.no_grad():
        assert not module(input, hx)[0].requires_grad
    with torch.inference_mode():
        assert module(input, hx)[0].is_inference()
    assert module(input, hx)[0].requires_grad


@pytest.mark.parametrize("wanted", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_one_result_alone(engine: str, cell: str, wanted: str) -> None:
    """A loss of one result only: the gradients of the others never arrive at the backward pass."""
    if wanted == "c_n" and not cell.startswith("lstm"):
        wanted = "h_n"
    case = Case("one", "", layers=2, bidirectional=True, lengths=(3, 5, 1))
    problem = build(cell, case, torch.float64)
    results = []
    for namespace in (fastrnn, torch.nn):
        module = problem.make(namespace)
        input, hx, leaves = problem.arguments()
        output, state = module(input, hx)
        states = state if isinstance(state, tuple) else (state,)
        named = {"output": output.data, **dict(zip(("h_n", "c_n"), states, strict=False))}
        tensors = {**dict(module.named_parameters()), **leaves}
        gradients = torch.autograd.grad(
            (named[wanted] * problem.cotangents[wanted]).sum(), list(tensors.values()),
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        results.append(dict(zip(tensors, gradients, strict=True)))
    check(results[0], results[1], results[1])


def simple(cell: str = "gru") -> tuple[torch.nn.Module, Tensor]:
    problem = build(cell, Case("simple", "", hx="none", layers=2), torch.float32)
    return problem.make(fastrnn), problem.arguments()[0]


@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice(engine: str, cell: str) -> None:
    """A retained graph gives the same gradients again; a freed one raises."""
    module, input = simple(cell)
    output, _ = module(input)
    first = torch.autograd.grad(output.sum(), [input, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(output.sum(), [input, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), input)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_accumulate(engine: str, cell: str) -> None:
    module, input = simple(cell)
    module(input)[0].sum().backward()
    once = [p.grad.clone() for p in module.parameters()]
    module(input)[0].sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(module.parameters(), once, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_evaluation_mode_equals_training(engine: str, cell: str) -> None:
    module, input = simple(cell)
    training = torch.autograd.grad(module(input)[0].sum(), input)[0]
    evaluation = torch.autograd.grad(module.eval()(input)[0].sum(), input)[0]
    assert torch.equal(training, evaluation)


def overwrite(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1.0)


@pytest.mark.parametrize("what", ["weight_hh_l0", "weight_ih_l1", "input", "h_0", "output"])
@pytest.mark.parametrize("cell", CELLS)
def test_changed_tensors_are_not_used_silently(engine: str, cell: str, what: str) -> None:
    """After a tensor that backward needs was overwritten, backward raises or is still right."""
    problem = build(cell, Case("overwrite", "", layers=2, H=9), torch.float64)
    expected = problem.run(fastrnn)["d weight_ih_l0"]
    module = problem.make(fastrnn)
    input, hx, leaves = problem.arguments()
    output, state = module(input, hx)
    results = {"output": output, "h_n": state} if isinstance(state, Tensor) else {
        "output": output, "h_n": state[0], "c_n": state[1],
    }  # fmt: skip
    loss = sum((results[name] * problem.cotangents[name]).sum() for name in results)
    overwrite({**dict(module.named_parameters()), **leaves, "output": output}[what])
    weight = module.weight_ih_l0
    try:
        (gradient,) = torch.autograd.grad(loss, weight)
    except RuntimeError as raised:
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
        return
    assert what not in ("weight_hh_l0", "input"), "backward did not notice"
    assert error(gradient, expected) <= EPS[torch.float64]


@pytest.mark.parametrize("cell", CELLS)
def test_hooks(engine: str, cell: str) -> None:
    """Tensor hooks and module hooks see the gradients, and what they return is used."""
    module, input = simple(cell)
    plain = torch.autograd.grad(module(input)[0].sum(), [input, module.weight_hh_l0])
    seen: list[Tensor] = []
    module.weight_hh_l0.register_hook(lambda g: seen.append(g) or g * 2)
    module.register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    input.register_hook(lambda g: g * 3)
    output, _ = module(input)
    output.register_hook(lambda g: seen.append(g))
    output.sum().backward()
    assert len(seen) == 3
    assert torch.equal(input.grad, 3 * plain[0])
    assert torch.equal(module.weight_hh_l0.grad, 2 * plain[1])


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoint(engine: str, cell: str) -> None:
    """Recomputing the forward pass during backward gives the same gradients."""
    module, input = simple(cell)
    tensors = [input, *module.parameters()]
    plain = torch.autograd.grad(module(input)[0].sum(), tensors)
    output = torch.utils.checkpoint.checkpoint(module, input, use_reentrant=False)[0]
    again = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def directional_derivative(layer: torch.nn.Module, input: Tensor, tangent: Tensor) -> Tensor:
    """J v in float64 by a central difference; the error of this step is about 1e-9."""
    step = 1e-5
    with torch.no_grad():
        return (layer(input + step * tangent)[0] - layer(input - step * tangent)[0]) / (2 * step)


@pytest.fixture(params=["auto", "native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if _backend.backends().get(request.param) is not None:
        pytest.skip("no native extension")
    with fastrnn.use_backend(request.param):
        yield request.param


class NotSupported(Exception):
    """A transform refused: allowed of the native backend, where a wrong number is not."""


def attempt(backend: str, function: Callable[[], Any]) -> Any:
    if backend != "native":
        return function()
    try:
        return function()
    except RuntimeError as raised:
        assert "backend 'native' cannot run this" in str(raised)  # noqa: PT017
        raise NotSupported from raised


@pytest.fixture
def transform_layer(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Tensor, Tensor]:
    problem = build(request.param, Case("transform", "", hx="none", H=9), torch.float64)
    module = problem.make(fastrnn)
    input = problem.arguments()[0].detach()
    return module, input, torch.randn_like(input)


each_cell = pytest.mark.parametrize("transform_layer", CELLS, indirect=True)


@each_cell
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("how", ["func.jvp", "forward_ad"])
def test_forward_mode_is_right_or_raises(
    backend: str, transform_layer: tuple[torch.nn.Module, Tensor, Tensor], how: str, frozen: bool
) -> None:
    layer, input, tangent = transform_layer
    layer.requires_grad_(not frozen)

    def run() -> Tensor:
        if how == "func.jvp":
            return torch.func.jvp(lambda x: layer(x)[0], (input,), (tangent,))[1]
        with forward_ad.dual_level():
            output = layer(forward_ad.make_dual(input, tangent))[0]
            result = forward_ad.unpack_dual(output).tangent
        assert result is not None, "the derivative was dropped without a word"
        return result

    try:
        got = attempt(backend, run)
    except NotSupported:
        return
    assert error(got, directional_derivative(layer, input, tangent)) < 1e-8


@each_cell
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("how", ["grad", "vjp", "vmap", "vmap-weights", "per-sample", "hessian"])
def test_transforms_are_right_or_raise(
    backend: str, transform_layer: tuple[torch.nn.Module, Tensor, Tensor], how: str, frozen: bool
) -> None:
    layer, input, weight = transform_layer
    layer.requires_grad_(not frozen)
    parameters = dict(layer.named_parameters())

    def loss(x: Tensor, p: dict[str, Tensor] = parameters) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))[0].square().sum()

    def by_autograd(x: Tensor, wanted: str = "") -> Tensor:
        x = x.clone().requires_grad_()
        p = {k: v.detach().clone().requires_grad_() for k, v in parameters.items()}
        return torch.autograd.grad(loss(x, p), p[wanted] if wanted else x)[0]

    many = torch.stack([input, weight, input + weight])
    many_weights = {k: torch.stack([v, 2 * v]).detach() for k, v in parameters.items()}
    runs: dict[str, Callable[[], Tensor]] = {
        "grad": lambda: torch.func.grad(loss)(input),
        "vjp": lambda: torch.func.vjp(loss, input)[1](torch.ones((), dtype=input.dtype))[0],
        "vmap": lambda: torch.func.vmap(lambda x: layer(x)[0])(many),
        "vmap-weights": lambda: torch.func.vmap(lambda p: loss(input, p))(many_weights),
        "per-sample": lambda: torch.func.vmap(
            lambda x: torch.func.grad(lambda p: loss(x, p))(parameters)["weight_hh_l0"]
        )(many),
        "hessian": lambda: torch.func.hessian(lambda x: loss(torch.cat([x, input[1:]])))(input[:1]),
    }
    expected: dict[str, Callable[[], Tensor]] = {
        "grad": lambda: by_autograd(input),
        "vjp": lambda: by_autograd(input),
        "vmap": lambda: torch.stack([layer(x)[0] for x in many]),
        "vmap-weights": lambda: torch.stack([
            loss(input, {k: v[i] for k, v in many_weights.items()}) for i in range(2)
        ]),
        "per-sample": lambda: torch.stack([by_autograd(x, "weight_hh_l0") for x in many]),
        "hessian": lambda: torch.autograd.functional.hessian(
            lambda x: loss(torch.cat([x, input[1:]])), input[:1]
        ),
    }  # fmt: skip
    try:
        got = attempt(backend, runs[how])
    except NotSupported:
        return
    assert error(got, expected[how]()) <= EPS[torch.float64]
