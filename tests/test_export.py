"""torch.export: a model becomes a graph in which each layer is one operator, for any number of
steps and rows. torch.nn's layers are exported for one number of steps.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, build, make_hx
from test_compile_tools import Model, named, results
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from compare import check_identical

pytestmark = pytest.mark.skipif(
    fastrnn._ops.native_error is not None, reason="pure-Python install: there are no operators"
)

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
GRADIENTS = pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def steps_and_rows() -> dict[int, Any]:
    return {0: Dim("steps"), 1: Dim("rows")}


def nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """The calls of the operator."""
    return [n for n in program.graph.nodes if n.target is torch.ops.fastrnn.layer.default]


def check_exported(program: torch.export.ExportedProgram, module: nn.Module, *given: Any) -> None:
    """Results and gradients are eager's bits, though the graph was made for inference."""
    assert all(n.args[-1] is False for n in nodes(program))  # save
    exported = program.module()
    with torch.no_grad():
        check_identical(named(exported(*given)), named(module(*given)))
    check_identical(results(exported, exported, *given), results(module, module, *given))


@STRICT
@GRADIENTS
@pytest.mark.parametrize("options", [{}, DEEP], ids=["plain", "deep"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, options: dict[str, Any], enabled: bool, strict: bool) -> None:
    layer = build(fastrnn, name, 3, 4, **options)
    with torch.set_grad_enabled(enabled):
        program = export(
            layer, (torch.randn(5, 2, 3),), dynamic_shapes=(steps_and_rows(),), strict=strict
        )
    assert len(nodes(program)) == (2 if options else 1)
    for shape in ((5, 2, 3), (9, 7, 3), (1, 1, 3)):
        check_exported(program, layer, torch.randn(shape))


@STRICT
@pytest.mark.parametrize("options", [{"batch_first": True}, {"proj_size": 2}])
def test_layer_with_states(options: dict[str, Any], strict: bool) -> None:
    layer, rows = build(fastrnn, "LSTM", 3, 4, **options), Dim("rows")
    place = 0 if options.get("batch_first") else 1

    def arguments(steps: int, batch: int) -> tuple[Any, ...]:
        shape = (batch, steps, 3) if place == 0 else (steps, batch, 3)
        h = torch.randn(1, batch, layer.proj_size or 4)
        return torch.randn(shape), (h, torch.randn(1, batch, 4))

    dynamic = ({1 - place: Dim("steps"), place: rows}, ({1: rows}, {1: rows}))
    program = export(layer, arguments(5, 2), dynamic_shapes=dynamic, strict=strict)
    check_exported(program, layer, *arguments(9, 7))


@STRICT
@GRADIENTS
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, enabled: bool, strict: bool) -> None:
    cell, rows = build(fastrnn, name, 3, 4), {0: Dim("rows")}
    hx = make_hx(name, 2, 4)
    dynamic = (rows, rows if isinstance(hx, Tensor) else (rows, rows))
    with torch.set_grad_enabled(enabled):
        alone = export(cell, (torch.randn(2, 3),), dynamic_shapes=(rows,), strict=strict)
        program = export(cell, (torch.randn(2, 3), hx), dynamic_shapes=dynamic, strict=strict)
    check_exported(alone, cell, torch.randn(7, 3))
    check_exported(program, cell, torch.randn(7, 3), make_hx(name, 7, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_torch_exports_one_number_of_steps(name: str) -> None:
    x, dynamic = torch.randn(5, 2, 3), (steps_and_rows(),)
    with pytest.raises(torch._dynamo.exc.UserError, match=r"specialized it to be a constant \(5\)"):
        export(build(nn, name, 3, 4), (x,), dynamic_shapes=dynamic)
    assert nodes(export(build(fastrnn, name, 3, 4), (x,), dynamic_shapes=dynamic))


@pytest.mark.parametrize("name", LAYERS)
def test_saved_and_unflattened(name: str) -> None:
    model, x = Model(fastrnn, name), torch.randn(9, 7, 3)
    program = export(model, (torch.randn(5, 2, 3),), dynamic_shapes=(steps_and_rows(),))
    assert list(program.state_dict) == list(model.state_dict())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    check_exported(loaded, model, x)
    unflattened = torch.export.unflatten(program)
    assert list(unflattened.state_dict()) == list(model.state_dict())
    other = Model(fastrnn, name)
    for p in other.parameters():
        p.data.mul_(1.5)
    unflattened.load_state_dict(other.state_dict())
    check_identical(named(unflattened(x)), named(other(x)))


def test_decomposed_and_compiled() -> None:
    layer = build(fastrnn, "GRU", 3, 4, batch_first=True, **DEEP)
    shapes = ({0: Dim("rows"), 1: Dim("steps")},)
    program, x = export(layer, (torch.randn(2, 5, 3),), dynamic_shapes=shapes), torch.randn(7, 9, 3)
    decomposed = program.run_decompositions()
    assert len(nodes(decomposed)) == 2
    check_exported(decomposed, layer, x)
    compiled = torch.compile(program.module(), backend="aot_eager", fullgraph=True)
    check_identical(named(compiled(x)), named(layer(x)))


def test_exported_model_is_differentiated_twice() -> None:
    layer, x = build(fastrnn, "LSTM", 3, 4), torch.randn(5, 2, 3)
    exported = export(layer, (x,)).module()

    def second(function: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss = function(leaf)[0].square().sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), leaf)]

    for got, expected in zip(second(exported), second(layer), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected)


class Packed(nn.Module):
    """A layer whose packed input comes as its tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = build(fastrnn, name, 3, 4, **DEEP)

    def forward(self, data: Tensor, sizes: Tensor, order: Any = None, back: Any = None) -> Any:
        output, state = self.body(PackedSequence(data, sizes, order, back))
        return output.data, state


def packed(lengths: tuple[int, ...], sorts: bool) -> tuple[Tensor, ...]:
    padded = torch.randn(max(lengths), len(lengths), 3)
    made = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=sorts)
    return tuple(t for t in made if t is not None)


@STRICT
@pytest.mark.parametrize("sorts", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_packed(name: str, sorts: bool, strict: bool) -> None:
    """Any lengths; torch.nn's layers are not exported with packed input."""
    model, given = Packed(name), packed((5, 4, 2), sorts)
    dynamic = tuple({0: Dim.AUTO} for _ in given)
    program = export(model, given, dynamic_shapes=dynamic, strict=strict)
    for lengths in ((5, 4, 2), (4, 4, 3), (8, 2), (3, 3, 2, 1)):
        check_exported(program, model, *packed(lengths, sorts))
    model.body = build(nn, name, 3, 4, **DEEP)
    with pytest.raises((torch._dynamo.exc.UserError, RuntimeError), match=r"(?i)data-dependent"):
        export(model, given, dynamic_shapes=dynamic, strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_packed_lengths_that_contradict_themselves(strict: bool) -> None:
    model, (data, sizes) = Packed("GRU"), packed((5, 4, 2), True)
    exported = export(model, (data, sizes), strict=strict).module()
    with pytest.raises(RuntimeError, match="must not increase"):
        exported(data, sizes.flip(0))


def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    model = Model(fastrnn, "LSTM").eval()
    with torch.no_grad():
        program = export(model, (torch.randn(5, 2, 3),), dynamic_shapes=(steps_and_rows(),))
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(file)
        for shape in ((5, 2, 3), (9, 7, 3)):
            x = torch.randn(shape)
            got, expected = named(loaded(x)), named(model(x))
            torch.testing.assert_close(got.pop("0"), expected.pop("0"))  # the head is Inductor's
            check_identical(got, expected)
