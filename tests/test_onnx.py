"""Export to ONNX: the nodes in the graph, and their results in ONNX Runtime, at other sizes too.

Where a runtime has no kernel for a dtype, the reference evaluator of ONNX computes the graph.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drop_in import both_libraries, build
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree

import fastrnn
from compare import check
from fastrnn import reference
from fastrnn.onnx import NotInOnnxError, export, translation_table

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights:UserWarning"),
]

SIZE, H = 3, 4
# Cell -> class, arguments.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN tanh": ("RNN", {}),
    "RNN relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
}
STACK = {"num_layers": 2, "bidirectional": True}
# Case -> arguments of the layer, whether a state is given, dimensions T and B of the input (a cell
# has no T).
CASES: dict[str, tuple[dict[str, Any], bool, tuple[int | None, int | None]]] = {
    "one layer": ({}, False, (0, 1)),
    "no bias": ({"bias": False}, False, (0, 1)),
    "stack": (STACK, True, (0, 1)),
    "batch first": ({"batch_first": True}, True, (1, 0)),
    "unbatched": ({"bidirectional": True}, True, (0, None)),
    "cells": ({}, True, (None, 0)),
    "cells, no bias": ({"bias": False}, False, (None, 0)),
}


class Model(nn.Module):
    """Every cell, each over the same input from the same states."""

    def __init__(self, lib: ModuleType, suffix: str = "", **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                cell: build(lib, name + suffix, SIZE, H, **options, **extra)
                for cell, (name, extra) in CELLS.items()
            }
        )

    def forward(self, input: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> list[Any]:
        return [
            layer(input, None if h is None else (h, c) if cell == "LSTM" else h)
            for cell, layer in self.layers.items()
        ]


class Layer(nn.Module):
    """One call of the operator itself."""

    def __init__(self, cell: str, weights: Sequence[Tensor], *options: Any) -> None:
        super().__init__()
        self.cell, self.options = cell, options
        self.weights = nn.ParameterList(weights)

    def forward(self, input: Tensor, batch_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        call = (self.cell, input, list(self.weights), None, None, batch_sizes, *self.options)
        return torch.ops.fastrnn.layer(*call)[:2]


def weights(groups: int, width: int = SIZE) -> list[Tensor]:
    return [torch.randn(s) for s in [(3 * H, width), (3 * H, H), (3 * H,), (3 * H,)] * groups]


def quiet(model: Any, args: Any, **options: Any) -> Any:
    return export(model, args, verbose=False, **options)


def with_table(model: nn.Module, args: Any, **options: Any) -> Any:
    """What a user writes who calls torch.onnx."""
    with torch.no_grad():
        return torch.onnx.export(
            model, args, dynamo=True, verbose=False,
            custom_translation_table=translation_table(), **options,
        )  # fmt: skip


def nodes(program: Any) -> Counter[str]:
    """The nodes of a graph, none of which may be a loop or another library's."""
    graph, functions = program.model.graph, program.model.functions
    assert not functions
    assert {n.domain for n in graph} == {""}
    found = Counter(n.op_type for n in graph)
    assert not {"Loop", "Scan", "If"} & set(found)
    return found


def recurrent(program: Any) -> list[Any]:
    """Its recurrent nodes, whose weights must be constants."""
    nodes(program)
    found = [n for n in program.model.graph if n.op_type in ("RNN", "LSTM", "GRU")]
    constants = program.model.graph.initializers.values()
    assert all(v is None or v in constants for n in found for v in n.inputs[1:4])
    return found


def run(program: Any, *tensors: Tensor) -> list[Tensor]:
    """The outputs in ONNX Runtime."""
    return results(onnxruntime.InferenceSession(program.model_proto.SerializeToString()), *tensors)


def results(session: Any, *tensors: Tensor) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if leaf is not None]


def compare_all(got: Sequence[Tensor], model: Callable[..., nn.Module], args: Any) -> None:
    """By the rule of compare.py, and close to fastrnn's; `model` makes one of a library, dtype."""
    dtype = got[0].dtype

    def named(lib: ModuleType, to: torch.dtype) -> dict[str, Tensor]:
        inputs = _pytree.tree_map(lambda t: None if t is None else t.to(to), args)
        with torch.no_grad():
            return {str(i): y for i, y in enumerate(leaves(model(lib).to(to)(*inputs)))}

    mine = {str(i): y for i, y in enumerate(got)}
    check(mine, named(nn, dtype), named(nn, torch.float64))
    check(mine, named(fastrnn, dtype), named(fastrnn, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_every_cell(case: str) -> None:
    """With dynamic T and B, at the sizes of the example and at others."""
    options, has_state, (t, b) = CASES[case]
    suffix = "Cell" if t is None else ""
    D, L = 1 + options.get("bidirectional", False), options.get("num_layers", 1)

    def model(lib: ModuleType) -> nn.Module:
        return Model(lib, suffix, **options).eval()

    def example(T: int, B: int) -> tuple[Tensor, ...]:
        sizes = {d: n for d, n in ((t, T), (b, B)) if d is not None}
        state = [*([] if suffix else [D * L]), *([] if b is None else [B]), H]
        x = torch.randn(*(sizes[d] for d in sorted(sizes)), SIZE)
        return (x, torch.randn(state), torch.randn(state)) if has_state else (x,)

    of_input = {d: Dim.DYNAMIC for d in (t, b) if d is not None}
    of_state = {} if b is None else {0 if suffix else 1: Dim.DYNAMIC}
    shapes = (of_input, of_state, of_state) if has_state else (of_input,)
    program = quiet(model(fastrnn), example(5, 2), dynamic_shapes=shapes)
    found = recurrent(program)
    assert [n.op_type for n in found] == [name for name, _ in CELLS.values() for _ in range(L)]
    direction = "bidirectional" if D == 2 else "forward"
    assert {n.attributes["direction"].as_string() for n in found} == {direction}
    onnx.checker.check_model(program.model_proto, full_check=True)
    for sizes in ((5, 2), (9, 3), (1, 1)):
        args = example(*sizes)
        compare_all(run(program, *args), model, args)


def test_weights_of_any_size_are_constants() -> None:
    """Beyond what torch.onnx folds. Without `export` the nodes that reorder them stay."""
    model = build(fastrnn, "LSTM", 150, 200).eval()
    x = torch.randn(5, 2, 150)
    program, plain = quiet(model, (x,)), with_table(model, (x,))
    assert nodes(program) == {"LSTM": 1, "Squeeze": 1}
    assert len(recurrent(program)) == 1
    assert nodes(plain)["Gather"] > 0
    for each in (program, plain):
        compare_all(run(each, x), lambda lib: build(lib, "LSTM", 150, 200), (x,))


def test_saved_file(tmp_path: Path) -> None:
    model, x = build(fastrnn, "GRU", SIZE, H).eval(), torch.randn(5, 2, SIZE)
    export(model, (x,), tmp_path / "m.onnx", verbose=False, input_names=["x"], external_data=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].name == "x"
    compare_all(results(session, x), lambda lib: build(lib, "GRU", SIZE, H), (x,))


def test_reverse_direction() -> None:
    model, x = Layer("gru", weights(1), 1, 1, False).eval(), torch.randn(5, 2, SIZE)
    program = quiet(model, (x,))
    (node,) = recurrent(program)
    assert node.attributes["direction"].as_string() == "reverse"
    expected = reference.layer("gru", x, list(model.weights), None, None, None, 1, 1)
    for got, y in zip(run(program, x), expected[:2], strict=True):
        torch.testing.assert_close(got, y.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, SIZE, dtype=dtype)

    def model(lib: ModuleType) -> nn.Module:
        made = Model(lib, bidirectional=True)
        if dtype == torch.float64:
            del made.layers["RNN relu"]  # which the reference evaluator does not know
        return made.eval()

    program = quiet(model(fastrnn).to(dtype), (x,))
    assert {n.outputs[0].dtype.numpy() for n in recurrent(program)} == {x.numpy().dtype}
    if dtype == torch.float16:
        got = run(program, x)
    else:  # ONNX Runtime has no kernels
        found = ReferenceEvaluator(program.model_proto).run(
            None, {program.model.graph.inputs[0].name: x.numpy()}
        )
        got = [torch.from_numpy(np.asarray(y)) for y in found]
    compare_all(got, model, (x,))


def test_bfloat16_needs_a_late_opset() -> None:
    model, x = fastrnn.LSTM(SIZE, H).eval().bfloat16(), torch.randn(5, 2, SIZE).bfloat16()
    with pytest.raises(NotInOnnxError, match="bfloat16 from opset 22 on, and this export is to"):
        quiet(model, (x,))
    program = quiet(model, (x,), opset_version=22)
    onnx.checker.check_model(program.model_proto, full_check=True)


def test_quantized_layers_are_exported_with_their_values() -> None:
    model = nn.ModuleList([build(fastrnn, "LSTM", SIZE, H), build(fastrnn, "LSTM", H, H)])
    stack, x = nn.Sequential(model[0], First(), model[1]).eval(), torch.randn(5, 8, SIZE)
    fastrnn.quantize(model[0], "int8", keep_originals=False)
    fastrnn.quantize(model[1], "bf16", keep_originals=False)
    program = quiet(stack, (x,))
    assert len(recurrent(program)) == 2
    fastrnn.dequantize(stack)
    with torch.no_grad():
        expected = leaves(stack(x))
    for got, y in zip(run(program, x), expected, strict=True):
        torch.testing.assert_close(got, y, rtol=0, atol=1e-6)


class First(nn.Module):
    def forward(self, results: tuple[Tensor, Any]) -> Tensor:
        return results[0]


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = fastrnn.GRU(SIZE, H)

    def forward(self, input: Tensor) -> Tensor:
        return self.body(pack_padded_sequence(input, torch.tensor([5, 3])))[1]


class WithOptions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body, self.options = fastrnn.GRU(SIZE, H), options

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input, **self.options)[0]


@pytest.mark.filterwarnings("ignore:.*torch.utils._pytree")
def test_what_onnx_cannot_say_is_refused() -> None:
    x = torch.randn(5, 2, SIZE)
    for model, args, reason in (
        (nn.Sequential(fastrnn.LSTM(SIZE, H, proj_size=2)), (x,), "0: the LSTM .* no projection"),
        (fastrnn.LSTM(SIZE, H), (pack_padded_sequence(x, torch.tensor([5, 3])),), "PackedSequence"),
        (Packing(), (x,), "PackedSequence"),
        (WithOptions(resets=torch.zeros(5, 2).bool()), (x,), "nothing for resets"),
        (WithOptions(lengths=torch.tensor([5, 3])), (x,), "nothing for lengths"),
        (WithOptions(return_states=True), (x,), "nothing for return_states"),
        (Layer("gru", weights(2), 2, 0, False), (x,), "ensemble"),
        (Layer("gru", [w[None] for w in weights(1)], 1, 0, False), (x,), "ensemble"),
        (Layer("gru", [torch.stack([w] * 3) for w in weights(1)], 3, 0, False), (x,), "ensemble"),
    ):
        with pytest.raises(NotInOnnxError, match=reason):
            quiet(model.eval(), args)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_table_refuses_with_the_reason() -> None:
    x = torch.randn(5, 2, SIZE)
    sizes = torch.tensor([2, 2, 1])
    for model, args, reason in (
        (fastrnn.LSTM(SIZE, H, proj_size=2), (x,), "no projection"),
        (Layer("gru", weights(1), 1, 0, False), (torch.randn(5, SIZE), sizes), "PackedSequence"),
        (Layer("gru", weights(1), 1, 0, True), (x,), "training.*no_grad"),
        (WithOptions(resets=torch.zeros(5, 2).bool()), (x,), "nothing for resets"),
    ):
        with pytest.raises(torch.onnx.OnnxExporterError, match=f"NotInOnnxError.*{reason}"):
            with_table(model.eval(), args)


def test_without_the_table_torch_names_the_operator() -> None:
    with (
        torch.no_grad(),
        pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function.*fastrnn\.layer"),
    ):
        torch.onnx.export(fastrnn.LSTM(SIZE, H).eval(), (torch.randn(5, 2, SIZE),), verbose=False)


def test_the_mode_of_a_model_is_kept() -> None:
    model, x = fastrnn.LSTM(SIZE, H, 2, dropout=0.5), torch.randn(5, 2, SIZE)
    with pytest.warns(UserWarning, match="in training mode"):
        program = quiet(model, (x,))
    assert model.training
    assert nodes(program)["Dropout"] == 1


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")
def test_torch_does_not_export_a_dynamic_length(name: str) -> None:
    """It refuses, or, the first time in a process, writes a model with the length in it."""
    model, x, longer = build(nn, name, SIZE, H).eval(), *torch.randn(2, 8, 2, SIZE).unbind()
    with pytest.raises(Exception, match=r"static shape of 5|INVALID_ARGUMENT|cannot be reshaped"):
        run(with_table(model, (x[:5],), dynamic_shapes=({0: Dim.DYNAMIC},)), longer)


@both_libraries
def test_an_rnn_is_a_node(lib: ModuleType) -> None:
    """torch.nn's RNN is exported step by step."""
    model, x = build(lib, "RNN", SIZE, H).eval(), torch.randn(5, 2, SIZE)
    found = nodes(with_table(model, (x,)))
    assert (found["RNN"], found["Tanh"]) == ((0, 5) if lib is nn else (1, 0))


def test_fastrnn_is_imported_without_onnx() -> None:
    code = "import sys, fastrnn; assert not {'onnxscript', 'fastrnn.onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
