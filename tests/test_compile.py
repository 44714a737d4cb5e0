"""torch.compile: the layers and cells stay in one graph, as the operator that eager calls run, and
give eager's bits, gradients included. torch.nn's layers refuse one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries, build, make_hx
from test_compile_tools import Model, calls, named, results
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map

import fastrnn
from compare import check_identical

pytestmark = pytest.mark.skipif(
    fastrnn._ops.native_error is not None, reason="pure-Python install: there are no operators"
)

DYNAMIC = pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_one_graph(function: Any, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def packed(lengths: tuple[int, ...], sorts: bool = False) -> PackedSequence:
    padded = torch.randn(max(lengths), len(lengths), 3)
    return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=sorts)


def check_compiled(module: nn.Module, *arguments: Any, **options: Any) -> None:
    """Training and inference, in one graph, give eager's bits."""
    compiled = in_one_graph(module, **options)
    check_identical(results(compiled, module, *arguments), results(module, module, *arguments))
    with torch.no_grad():
        check_identical(named(compiled(*arguments)), named(module(*arguments)))


@pytest.mark.parametrize(
    ("options", "shape", "dynamic"),
    [
        ({}, (5, 2, 3), True), (DEEP, (5, 2, 3), None), ({"batch_first": True}, (2, 5, 3), None),
        ({}, (5, 3), None),
    ],
    ids=["plain-dynamic", "deep", "batch_first", "unbatched"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, options: dict[str, Any], shape: tuple[int, ...], dynamic: Any) -> None:
    check_compiled(build(fastrnn, name, 3, 4, **options), torch.randn(shape), dynamic=dynamic)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_with_states(name: str) -> None:
    check_compiled(build(fastrnn, name, 3, 4), torch.randn(5, 2, 3), make_hx(name, 1, 2, 4))


def test_projection() -> None:
    layer = build(fastrnn, "LSTM", 3, 4, proj_size=2, **DEEP)
    hx = (torch.randn(4, 2, 2), torch.randn(4, 2, 4))
    check_compiled(layer, torch.randn(5, 2, 3), hx, dynamic=True)


@pytest.mark.parametrize(
    ("sorts", "options"), [(True, {}), (False, DEEP)], ids=["sorted", "unsorted-deep"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str, options: dict[str, Any], sorts: bool) -> None:
    layer = build(fastrnn, name, 3, 4, **options)
    input = packed((5, 4, 2) if sorts else (4, 5, 2), sorts)
    check_compiled(layer, input, make_hx(name, 4 if options else 1, 3, 4))
    with torch.no_grad():
        check_identical(named(in_one_graph(layer)(input)), named(layer(input)))


@pytest.mark.parametrize(
    ("shape", "dynamic"), [((2, 3), True), ((3,), None)], ids=["batch-dynamic", "unbatched"]
)
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, shape: tuple[int, ...], dynamic: Any) -> None:
    cell, hx = build(fastrnn, name, 3, 4), make_hx(name, *shape[:-1], 4)
    given = (torch.randn(shape), hx) if dynamic else (torch.randn(shape),)
    check_compiled(cell, *given, dynamic=dynamic)


@pytest.mark.parametrize("name", LAYERS)
def test_functions(name: str) -> None:
    layer, x = build(fastrnn, name, 3, 4), torch.randn(5, 2, 3)
    weights = [w.detach() for w in layer.parameters()]
    whole = getattr(fastrnn.functional, name.lower())
    step = getattr(fastrnn.functional, f"{name.lower()}_cell")
    check_identical(named(in_one_graph(whole)(x, weights)), named(whole(x, weights)))
    got, expected = in_one_graph(step)(x[0], None, *weights), step(x[0], None, *weights)
    check_identical(named(got), named(expected))


@pytest.mark.parametrize(
    ("name", "batch_first"), [("RNN", False), ("LSTM", True), ("GRU", False)]
)
def test_step(name: str, batch_first: bool) -> None:
    layer = build(fastrnn, name, 3, 4, 2, batch_first=batch_first)
    compiled, x = in_one_graph(layer.step), torch.randn(3, 2, 3)
    with torch.no_grad():
        ours, theirs = layer.step(x[0]), compiled(x[0])
        check_identical(named(theirs), named(ours))
        for input in x[1:]:
            ours, theirs = layer.step(input, ours[1]), compiled(input, theirs[1])
            check_identical(named(theirs), named(ours))
        state = tree_map(torch.clone, ours[1])
        output, new = compiled(x[0], state, state)  # writes the state it was given
        check_identical(named((output, state)), named(layer.step(x[0], ours[1])))
        check_identical(named(new), named(state))
    check_identical(named(compiled(x[0])), named(layer.step(x[0])))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_model(name: str) -> None:
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3))
    check_compiled(Model(fastrnn, name), x)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_graph_breaks(lib: Any, name: str) -> None:
    """None here; torch.nn's layers are left to eager."""
    model, x = Model(lib, name), torch.randn(5, 2, 3)
    breaks = torch._dynamo.explain(model)(x).graph_break_count
    assert (breaks == 0) == (lib is fastrnn)
    if lib is nn:
        with pytest.raises(Unsupported):
            in_one_graph(model)(x)


@DYNAMIC
@pytest.mark.parametrize(("name", "options"), [("LSTM", {}), ("GRU", DEEP)])
def test_other_sizes_do_not_compile_again(name: str, options: dict[str, Any], dynamic: Any) -> None:
    layer = build(fastrnn, name, 3, 4, **options)
    count = CompileCounterWithBackend("aot_eager")
    compiled, frames = in_one_graph(layer, count, dynamic=dynamic), []
    with torch.no_grad():
        for steps, batch in ((7, 5), (6, 9), (8, 8), (9, 4), (2, 2), (30, 2)):
            x = torch.randn(steps, batch, 3)
            check_identical(named(compiled(x)), named(layer(x)))
            frames.append(count.frame_count)
    assert frames == ([frames[0]] * 6 if dynamic else [1] + [2] * 5)


def test_other_lengths_do_not_compile_again() -> None:
    layer, count = build(fastrnn, "LSTM", 3, 4), CompileCounterWithBackend("aot_eager")
    compiled, frames = in_one_graph(layer, count, dynamic=True), set()
    for lengths in ((7, 4, 5, 2, 1), (3, 6, 2, 2), (9, 8, 7, 3, 3, 4)):
        input = packed(lengths)
        with torch.no_grad():
            check_identical(named(compiled(input)), named(layer(input)))
        frames.add(count.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize(("name", "dynamic"), [("LSTM", True), ("GRU", None)])
def test_inductor(name: str, dynamic: Any) -> None:
    """What Inductor computes itself, the model's other parts, may differ from eager in rounding."""
    model, x = Model(fastrnn, name), torch.randn(5, 2, 3)
    compiled = in_one_graph(model, "inductor", dynamic=dynamic)
    got, expected = results(compiled, model, x), results(model, model, x)
    assert list(got) == list(expected)
    for key in got:
        torch.testing.assert_close(got[key], expected[key])
    check_identical({"h_n": got["1"]}, {"h_n": expected["1"]})


def test_reduce_overhead_is_harmless_on_the_cpu() -> None:
    layer, x = build(fastrnn, "GRU", 3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        check_identical(results(compiled, layer, x), results(layer, layer, x))


def test_dropout_comes_from_the_generator() -> None:
    layer, x = build(fastrnn, "LSTM", 3, 4, 3, dropout=0.5), torch.randn(5, 2, 3)
    compiled = in_one_graph(layer)

    def seeded(seed: int, function: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return results(function, layer, x)

    first = seeded(1, compiled)
    check_identical(seeded(1, compiled), first)
    check_identical(seeded(1, layer), first)
    assert not torch.equal(seeded(2, compiled)["0"], first["0"])
    layer.eval()
    check_identical(seeded(1, compiled), seeded(2, layer))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_autocast(name: str, inside: bool) -> None:
    module = build(fastrnn, name, 3, 4)
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3))

    def cast(function: Any) -> Callable[[Tensor], Any]:
        def run(input: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return function(input)

        return run

    compiled = in_one_graph(cast(module)) if inside else cast(in_one_graph(module))
    got, expected = results(compiled, module, x), results(cast(module), module, x)
    check_identical(got, expected)
    assert [t.dtype for t in got.values()] == [t.dtype for t in expected.values()]
    has_bfloat16 = any(t.dtype == torch.bfloat16 for t in got.values())
    assert has_bfloat16 == (name == "LSTM")  # the others keep the dtype of their state


def test_reference_backend_breaks_the_graph() -> None:
    layer, x = build(fastrnn, "GRU", 3, 4), torch.randn(5, 2, 3)
    with fastrnn.use_backend("reference"):
        compiled = torch.compile(layer, backend="aot_eager")
        assert not calls(compiled, x)
        check_identical(results(compiled, layer, x), results(layer, layer, x))
        torch._dynamo.reset()
        with pytest.raises(Unsupported, match="_on_reference"):
            in_one_graph(layer)(x)


WRONG: list[Callable[[], tuple[Any, ...]]] = [
    lambda: (torch.randn(5, 2, 4),),
    lambda: (torch.randn(5),),
    lambda: (torch.randn(0, 2, 3),),
    lambda: (torch.randn(5, 2, 3).double(),),
    lambda: (torch.randn(5, 2, 3), torch.randn(1, 3, 4)),
    lambda: (torch.randn(5, 2, 3), torch.randn(2, 4)),
]


@pytest.mark.parametrize("arguments", WRONG)
def test_errors_are_those_of_eager(arguments: Callable[[], tuple[Any, ...]]) -> None:
    layer, wrong = build(fastrnn, "GRU", 3, 4), arguments()
    with pytest.raises((ValueError, RuntimeError)) as eager:
        layer(*wrong)
    with pytest.raises(type(eager.value)) as found:
        torch.compile(layer, backend="aot_eager")(*wrong)
    assert str(found.value) == str(eager.value)
    torch._dynamo.reset()
    with pytest.raises(Unsupported) as refused:
        in_one_graph(layer)(*wrong)
    assert str(eager.value) in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "indices", "text"),
    [([2, 4], None, "must not increase"), ([4, 2], None, "sum to 6 rows"), ([4, 1], 3, "h0")],
)
def test_packed_sequences_that_contradict_themselves(
    sizes: list[int], indices: int | None, text: str
) -> None:
    """Values are not known before the graph runs: the operator checks them."""
    order = None if indices is None else torch.arange(indices)
    input = PackedSequence(torch.randn(5, 3), torch.tensor(sizes), order, order)
    with pytest.raises(RuntimeError, match=text):
        in_one_graph(build(fastrnn, "GRU", 3, 4))(input)


def test_vmap_inside() -> None:
    layer, xs = build(fastrnn, "GRU", 3, 4), torch.randn(4, 5, 2, 3)
    mapped = vmap(lambda x: layer(x)[0])
    check_identical(results(in_one_graph(mapped), layer, xs), results(mapped, layer, xs))
    members = [fastrnn.GRU(3, 4) for _ in xs]
    stacked, _ = torch.func.stack_module_state(members)
    ensemble = vmap(lambda weights, x: functional_call(layer, weights, (x,)))
    check_identical(named(in_one_graph(ensemble)(stacked, xs)), named(ensemble(stacked, xs)))


def test_grad_inside_is_refused() -> None:
    layer = build(fastrnn, "GRU", 3, 4)
    slope = grad(lambda x: layer(x)[0].square().sum())
    for options in ({}, {"fullgraph": True}):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="layer"):
            torch.compile(slope, backend="aot_eager", **options)(torch.randn(5, 2, 3))


@pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference:UserWarning")
def test_forward_mode_runs_on_the_reference() -> None:
    layer, x, t = build(fastrnn, "GRU", 3, 4), torch.randn(5, 2, 3), torch.randn(5, 2, 3)

    def tangent(x: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(lambda y: layer(y)[0], (x,), (t,))

    expected = named(tangent(x))
    assert expected["1"].abs().max() > 0.01
    check_identical(named(torch.compile(tangent, backend="aot_eager")(x)), expected)
    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="_on_reference"):
        in_one_graph(tangent)(x)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_transforms_outside() -> None:
    """torch.compile leaves grad of a compiled function to eager, and refuses vmap of one."""
    layer, x = build(fastrnn, "GRU", 3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, backend="aot_eager")
    expected = grad(lambda x: layer(x)[0].square().sum())(x)
    assert torch.equal(grad(lambda x: compiled(x)[0].square().sum())(x), expected)
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(compiled(leaf)[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()
    with pytest.raises(Unsupported, match="vmap"):
        vmap(lambda x: in_one_graph(layer)(x)[0])(x[None])
