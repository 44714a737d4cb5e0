"""Other tools that look into a model: the checks of torch.library, torch.jit, torch.fx,
quantization. For torch.compile see test_compile.py, for torch.export test_export.py.

What works gives eager's results; what does not is refused, and works after `to_torch`.
"""

from __future__ import annotations

import io
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries, build, states
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from compare import check_identical
from fastrnn import reference

needs_operators = pytest.mark.skipif(
    fastrnn._ops.native_error is not None, reason="pure-Python install: there are no operators"
)


class Model(nn.Module):
    """A layer, or a cell, and what comes after it."""

    def __init__(self, lib: ModuleType, name: str) -> None:
        super().__init__()
        deep: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
        self.body = build(lib, name, 3, 4, **({} if name in CELLS else deep))
        self.head = nn.Linear(4 if name in CELLS else 8, 2)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        first, *rest = states(self.body(input))
        return self.head(first), *(s for state in rest for s in states(state))


def named(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, in their order."""
    found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return {str(i): t.detach() for i, t in enumerate(found)}


def results(function: Any, module: nn.Module, *arguments: Any) -> dict[str, Tensor]:
    """What `function`, made of `module`, returns, and all gradients, of the arguments too."""
    module.zero_grad()

    def leaf(t: Any) -> Any:
        data = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().clone().requires_grad_() if data else t

    arguments = tuple(tree_map(leaf, a) for a in arguments)
    outputs = function(*arguments)
    floating = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    sum(y.float().square().sum() for y in floating).backward()  # type: ignore[union-attr]
    gradients = {f"grad of {k}": p.grad for k, p in module.named_parameters()}
    for i, t in enumerate(tree_leaves(arguments)):
        if isinstance(t, Tensor) and t.is_floating_point():
            gradients[f"grad of argument {i}"] = t.grad
    missing = [k for k, g in gradients.items() if g is None]
    assert not missing, missing
    return {**named(outputs), **{k: g.clone() for k, g in gradients.items() if g is not None}}


def calls(function: Any, *arguments: Any) -> list[torch.fx.Node]:
    """The calls of the operator in the graphs that torch.compile makes of `function`."""
    graphs = torch._dynamo.explain(function)(*arguments).graphs
    return [n for g in graphs for n in g.graph.nodes if "fastrnn" in str(n.target)]


def problem(cell: str, packed: bool, members: int) -> dict[str, Any]:
    """Arguments of the operator `layer` in two directions, for members with inputs of their own:
    groups 0 to members - 1 run forward, the others back."""
    info, groups, hidden = reference.CELLS[cell], 2 * members, 5
    sizes = torch.tensor([3, 2, 1]) if packed else None
    rows, batch = ((6,), 3) if packed else ((3, 2), 2)
    weights = [
        torch.randn(*shape) / 2
        for _ in range(groups)
        for shape in ((info.gates * hidden, 3), (info.gates * hidden, hidden))
    ]
    return {
        "cell": cell, "input": torch.randn(*rows, 3 * members), "weights": weights,
        "h0": torch.randn(groups, batch, hidden),
        "c0": torch.randn(groups, batch, hidden) if info.has_c else None,
        "batch_sizes": sizes, "groups": groups, "direction": 2,
    }  # fmt: skip


@needs_operators
@pytest.mark.parametrize(("packed", "members", "parts"), [(False, 2, 2), (True, 2, 1)])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_opcheck(cell: str, packed: bool, members: int, parts: int) -> None:
    """parts: of the batch, whose weight gradients are asked for one by one. test_ops.py has the
    plain ones."""
    call, has_c = problem(cell, packed, members), reference.CELLS[cell].has_c
    layer = torch.ops.fastrnn.layer
    for t in (call["input"], call["h0"], *call["weights"]):
        t.requires_grad_()
    torch.library.opcheck(layer.default, (), {**call, "save": True})
    for t in (call["input"], call["h0"], *call["weights"]):
        t.requires_grad_(False)
    output, h_n, c_n, cells, saved = layer(**call, save=True)
    rest = [call[k] for k in ("weights", "h0", "c0", "batch_sizes", "groups", "direction")]
    backward = (
        cell, torch.randn_like(output), torch.randn_like(h_n),
        torch.randn_like(c_n) if has_c else None, call["input"], output, cells, saved, *rest,
        [1, 1, int(has_c), *[parts] * len(call["weights"])],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastrnn.layer_backward.default, backward)


@needs_operators
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_operator_differentiated_twice(cell: str, save: bool) -> None:
    """As the reference's; where no gradients were expected, forward runs again for them."""
    call = problem(cell, False, 1)
    leaves = [t.double().requires_grad_() for t in (call["input"], *call["weights"])]
    call |= {k: call[k].double() for k in ("h0", "c0") if call[k] is not None}
    call |= {"input": leaves[0], "weights": leaves[1:]}

    def derivatives(output: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        loss = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(loss, leaves)]

    got = derivatives(torch.ops.fastrnn.layer(**call, save=save)[0])
    expected = derivatives(reference.layer(**call)[0])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@needs_operators
@pytest.mark.parametrize("how", ["func.jvp", "dual numbers", "compiled before"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_tangents_are_not_lost_in_graphs(how: str, grad: bool) -> None:
    """The operators have no forward-mode derivative: it is refused, never zero or absent."""
    layer, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        compiled(x)
        run = compiled if how == "compiled before" else torch.export.export(layer, (x,)).module()

        def differentiate() -> None:
            if how == "func.jvp":
                torch.func.jvp(lambda v: run(v)[0], (x,), (x,))
                return
            with forward_ad.dual_level():
                run(forward_ad.make_dual(x, x))

        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            differentiate()


@needs_operators
@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_equals_eager(name: str) -> None:
    model, shape = Model(fastrnn, name), (2, 3) if name in CELLS else (5, 2, 3)
    other = torch.randn((7, 3) if name in CELLS else (9, 4, 3))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            traced = torch.jit.trace(model, torch.randn(shape))
        assert "fastrnn::layer" in str(traced.inlined_graph)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        check_identical(named(torch.jit.load(file)(other)), named(model(other)))
        check_identical(results(traced, model, other), results(model, model, other))


@needs_operators
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_packed_keeps_its_batch() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = fastrnn.GRU(3, 4)

        def forward(self, data: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
            output, h_n = self.body(PackedSequence(data, sizes))
            return output.data, h_n

    def arguments(*lengths: int) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(torch.randn(5, len(lengths), 3), torch.tensor(lengths))
        return packed.data, packed.batch_sizes

    model = Packed()
    traced = torch.jit.trace(model, arguments(5, 4, 2))
    other = arguments(3, 3, 1)
    check_identical(named(traced(*other)), named(model(*other)))
    with pytest.raises(RuntimeError, match="h0 must have shape"):
        traced(*arguments(4, 2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tools_that_need_the_layers_of_torch(name: str) -> None:
    model, x = Model(fastrnn, name), torch.randn(5, 2, 3)
    # Proxies stand for all arguments, of options too, which say that they must be tensors.
    with pytest.raises((torch.fx.proxy.TraceError, TypeError)):
        torch.fx.symbolic_trace(model.body)
    with pytest.raises((RuntimeError, OSError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(model.body)
    restored = nn.Sequential(model.body.to_torch())
    expected = restored(x)[0]
    assert torch.equal(torch.fx.symbolic_trace(restored)(x)[0], expected)
    assert torch.equal(torch.jit.script(restored)(x)[0], expected)


@both_libraries
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_dynamic_quantization_needs_the_layers_of_torch(lib: ModuleType) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine here")
    quantize, quantized = torch.ao.quantization.quantize_dynamic, torch.ao.nn.quantized.dynamic.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = Model(lib, "LSTM")
        done = type(quantize(model, {nn.LSTM}).body)
        assert done is (fastrnn.LSTM if lib is fastrnn else quantized)
        fastrnn.restore(model)
        assert type(quantize(model, {nn.LSTM}).body) is quantized
