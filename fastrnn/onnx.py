"""Export to ONNX: fastrnn's layers as the nodes ``LSTM``, ``GRU`` and ``RNN``, one per layer.

Needs onnx and onnxscript (``pip install fastrnn[onnx]``); nothing else imports this module.

Dimension key: T time, B batch, I input, H hidden, G gates, D directions. The nodes and their
formulas: https://onnx.ai/onnx/operators/, opset 14 and later. ONNX's weights hold the gates in
another order than torch.nn's: ``LSTM`` i, o, f, c and ``GRU`` z, r, h.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

try:
    from onnxscript import evaluator, ir, opset18, optimizer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fastrnn.onnx needs onnx and onnxscript: pip install 'fastrnn[onnx]' ({error})"
    ) from error
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import _backend, _ops, modules
from .sequences import Options

# torch.onnx writes in this opset and converts. Any: its types do not know Python's lists.
op: Any = opset18

# Cell -> node, and where in torch.nn's order the gates of ONNX's stand.
_NODES: dict[str, tuple[str, tuple[int, ...]]] = {
    "rnn_tanh": ("RNN", (0,)),
    "rnn_relu": ("RNN", (0,)),
    "lstm": ("LSTM", (0, 3, 1, 2)),
    "gru": ("GRU", (1, 0, 2)),
}
_BFLOAT16_OPSET = 22  # the first whose recurrent nodes take it


class NotInOnnxError(ValueError):
    """What a layer does cannot be said in ONNX; the message gives the reason."""


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> torch.onnx.ONNXProgram:
    """``torch.onnx.export(model, args, path, dynamo=True)``, for inference, with fastrnn's layers.

    Each layer becomes one node (both directions of it too), whose weights are constants. The model
    is exported in the mode it is in: call ``model.eval()`` before. Quantized layers are exported
    with float32 weights, the values of their low-precision ones. float32, float16 and float64;
    ONNX Runtime has no float64 kernels for these nodes on the CPU (as of 1.32).

    Args:
        args: example inputs, as in ``torch.onnx.export``.
        path: file to write, or None.
        dynamic_shapes: the sizes that may vary, as in ``torch.export.export``; T and B may.
        kwargs: the other arguments of ``torch.onnx.export``. ``optimize=False`` also leaves the
            nodes that bring weights into ONNX's order in the graph.

    Raises:
        NotInOnnxError (a ValueError): a projection, a PackedSequence, an ensemble; bfloat16, before
            opset 22.
        RuntimeError: there is no native extension; torch.onnx.OnnxExporterError, what
            ``torch.onnx.export`` raises.

    Example::

        >>> from fastrnn import onnx
        >>> shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        >>> onnx.export(model.eval(), (torch.randn(5, 2, 40),), "m.onnx", dynamic_shapes=shapes)
    """
    save = {
        "include_initializers": kwargs.pop("export_params", True),
        "keep_initializers_as_inputs": kwargs.pop("keep_initializers_as_inputs", False),
        "external_data": kwargs.pop("external_data", True),
    }
    table = translation_table() | (kwargs.pop("custom_translation_table", None) or {})
    try:
        with torch.no_grad(), _refusing(model), _backend.use_backend("native"):
            program = torch.onnx.export(
                model, args, dynamo=True, dynamic_shapes=dynamic_shapes,
                custom_translation_table=table, **kwargs,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise NotInOnnxError(str(reason)) from error
    assert program is not None
    if kwargs.get("optimize", True):
        _fold_weights(program.model)
    if path is not None:
        program.save(path, **save)
    return program


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())``.

    What :func:`export` refuses, torch.onnx then refuses with a ConversionError that ends with the
    reason. Nodes that reorder large weights stay in the graph; ONNX Runtime folds them when it
    loads it. Export under ``torch.no_grad()``, on the native backend.

    Raises:
        RuntimeError: there is no native extension.
    """
    if _ops.native_error is not None:
        raise RuntimeError(f"fastrnn.onnx needs the native extension: {_ops.native_error}")
    return {_ops.layer: _layer}


_PACKED = (
    "a PackedSequence has no ONNX form: the recurrent nodes of ONNX take padded sequences. "
    "Export the model on a padded tensor"
)
_PROJECTION = "the LSTM of ONNX has no projection (proj_size)"


@contextlib.contextmanager
def _refusing(model: object) -> Iterator[None]:
    """Raises for what ``_layer`` does not see, as torch.export fails at it for another reason."""
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    layers = {name: m for name, m in named if isinstance(m, modules.Layer)}
    for name, layer in layers.items():
        if layer.proj_size:
            raise NotInOnnxError(f"{name or type(layer).__name__}: {_PROJECTION}")
    hooks = [
        layer.register_forward_pre_hook(_refuse_calls, with_kwargs=True)
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_calls(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
        raise NotInOnnxError(_PACKED)
    for name in Options._fields:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotInOnnxError(f"the recurrent nodes of ONNX have nothing for {name}")


def _reason(error: BaseException | None) -> NotInOnnxError | None:
    """The refusal of ``_layer`` among the causes of an error."""
    while error is not None and not isinstance(error, NotInOnnxError):
        error = error.__cause__
    return error


def _layer(
    cell: str, input: Any, weights: Any, h0: Any, c0: Any, batch_sizes: Any, groups: int,
    direction: int, save: bool, resets: Any = None,
) -> Any:  # fmt: skip
    """``torch.ops.fastrnn.layer`` as one node; arguments and results as in csrc/ops.cpp, tensors as
    ``ir.Value`` (torch.onnx reads these annotations, and does not understand that one)."""
    _check_layer(input, weights, batch_sizes, groups, direction, save, resets)
    kind, order = _NODES[cell]
    D, hidden = groups, weights[1].shape[1]
    count = len(weights) // D
    W, R = (
        _in_onnx_order(weights[i::count], order, hidden, [D, len(order) * hidden, -1])
        for i in range(2)
    )
    bias = [b for d in range(D) for b in weights[d * count + 2 : (d + 1) * count]]
    B = _in_onnx_order(bias, order, hidden, [D, -1]) if bias else None
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if D == 2 else "reverse" if direction == 1 else "forward",
    }
    states = [h0]
    if kind == "LSTM":
        states.append(c0)
    elif kind == "GRU":
        attributes["linear_before_reset"] = 1
    else:
        attributes["activations"] = ["Relu" if cell == "rnn_relu" else "Tanh"] * D
    # Y [T, D, B, H] -> output [T, B, D * H]; h_n and c_n [D, B, H]
    Y, *final = getattr(op, kind)(input, W, R, B, None, *states, **attributes)
    if D == 1:
        output = op.Squeeze(Y, [1])
    else:
        output = op.Reshape(op.Transpose(Y, perm=[0, 2, 1, 3]), [0, 0, D * hidden])
    absent = 4 - len(final)  # c_n where there is no c, and what is saved for backward: [0]
    return [output, *final, *(op.Constant(value=ir.tensor([], input.dtype)) for _ in range(absent))]


def _in_onnx_order(
    tensors: Sequence[ir.Value], order: Sequence[int], hidden: int, shape: list[int]
) -> Any:
    """Weights [G * H, ...], one or more, with the gates of each in another order, as one tensor."""
    joined = op.Concat(*tensors, axis=0) if len(tensors) > 1 else tensors[0]
    if len(order) > 1:
        gates = op.Reshape(joined, [len(tensors), len(order), hidden, -1])
        joined = op.Gather(gates, list(order), axis=1)
    return op.Reshape(joined, shape)


def _check_layer(
    input: ir.Value, weights: Sequence[ir.Value], batch_sizes: ir.Value | None, groups: int,
    direction: int, save: bool, resets: ir.Value | None,
) -> None:  # fmt: skip
    if resets is not None:
        raise NotInOnnxError("the recurrent nodes of ONNX have nothing for resets")
    if batch_sizes is not None:
        raise NotInOnnxError(_PACKED)
    assert input.shape is not None
    assert weights[0].shape is not None
    stacked = len(weights[0].shape) != 2
    if not stacked and len(weights) // groups % 2:
        raise NotInOnnxError(_PROJECTION)
    features, width = input.shape[-1], weights[0].shape[-1]
    if stacked or features != width or groups > 2 or (groups == 2 and direction != 2):
        raise NotInOnnxError(
            "an ensemble has no ONNX form: the recurrent nodes of ONNX run one layer, forward, in "
            f"reverse or both; got {groups} groups of weights with {width} columns, direction "
            f"{direction}, over {features} features"
        )
    if save:
        raise NotInOnnxError(
            "the graph is one for training, whose layers save activations: export it under "
            "torch.no_grad()"
        )
    opset = getattr(evaluator.default(), "opset", opset18).version  # asked of torch.onnx
    if input.dtype == ir.DataType.BFLOAT16 and opset < _BFLOAT16_OPSET:
        raise NotInOnnxError(
            f"the recurrent nodes of ONNX take bfloat16 from opset {_BFLOAT16_OPSET} on, and this "
            f"export is to opset {opset}: convert the model to float32, or give opset_version"
        )


def _fold_weights(model: ir.Model) -> None:
    """Computes what only reorders weights, of whatever size: torch.onnx folds small tensors."""
    kinds = {kind for kind, _ in _NODES.values()}
    wanted: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in kinds and node.domain == "":
            found = [v.producer() for v in node.inputs[1:4] if v is not None]
            while found:
                producer = found.pop()
                if producer is not None and producer not in wanted:
                    wanted.add(producer)
                    found += [v.producer() for v in producer.inputs if v is not None]
    optimizer.fold_constants(model, should_fold=lambda node: node in wanted)
    optimizer.remove_unused_nodes(model)


__all__ = ["NotInOnnxError", "export", "translation_table"]
