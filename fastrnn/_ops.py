"""Loads the native extension and describes its operators to PyTorch. Which backend runs a layer:
_backend.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_graphs, reference


def _load() -> str | None:
    """Import the extension, which registers the operators. Returns why it is not loaded."""
    if importlib.util.find_spec("fastrnn._C") is None:
        return _why_not_built()
    try:
        importlib.import_module("fastrnn._C")
    except ImportError as error:
        return f"the native extension does not load: {error}"
    return None


def _why_not_built() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.isfile(os.path.join(root, "setup.py")):
        return (
            f"fastrnn was imported from the source tree at {root}, which is not built: "
            "run `make build` there, or leave that directory"
        )
    try:  # written by setup.py
        reason = f": {importlib.import_module('fastrnn._build').PURE_PYTHON}"
    except ImportError:
        reason = ""
    return f"fastrnn was installed without its native extension (pure-Python install{reason})"


native_error: str | None = _load()

# Whether the extension was built with CUDA kernels, whatever torch it runs on.
has_cuda: bool = native_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fastrnn::layer", "CUDA"
)
if has_cuda:
    importlib.import_module("fastrnn._C").record_programs(
        is_ready=cuda_graphs.is_ready, record=cuda_graphs.record,
        product_settings=cuda_graphs.product_settings, allows_tf32=cuda_graphs.allows_tf32,
    )  # fmt: skip


def layer_fake(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None,
    batch_sizes: Tensor | None, groups: int, direction: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer``, for tensors without data."""
    info = reference.CELLS[cell]
    hidden, size = weights[1].shape[0] // info.gates, weights[1].shape[1]
    batch = input.shape[1] if h0 is None else h0.shape[1]
    rows = input.shape[:-1].numel()
    compute = reference.compute_dtype(input.dtype)
    keeps = save and info.has_c
    return (
        input.new_empty([*input.shape[:-1], groups * size]),
        input.new_empty([groups, batch, size]),
        input.new_empty([groups, batch, hidden] if info.has_c else [0]),
        input.new_empty([groups, rows, hidden] if keeps else [0], dtype=compute),
        input.new_empty([groups, rows, info.saved * hidden] if save else [0]),
    )


def layer_backward_fake(
    cell: str, doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor,
    output: Tensor, cells: Tensor, saved: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    wanted: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer_backward``, for tensors without data."""
    info = reference.CELLS[cell]
    hidden, size = weights[1].shape[0] // info.gates, weights[1].shape[1]
    batch = input.shape[1] if h0 is None else h0.shape[1]
    shapes = [input.shape, [groups, batch, size], [groups, batch, hidden]]
    shapes += [w.shape for w in weights]
    made = [
        input.new_empty(shape if want else [0])
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    return made[0], made[3:], made[1], made[2]


if native_error is None:
    python_tensors = importlib.import_module("fastrnn._C").PythonTensors(Tensor, torch.nn.Parameter)
    layer = torch.ops.fastrnn.layer.default
    layer_backward = torch.ops.fastrnn.layer_backward.default
    torch.library.register_fake("fastrnn::layer", layer_fake)
    torch.library.register_fake("fastrnn::layer_backward", layer_backward_fake)


class Operators(NamedTuple):
    """Those of a backend, of one contract: csrc/ops.cpp."""

    layer: Callable[..., Any]
    layer_backward: Callable[..., Any]


def operators(backend: str) -> Operators:
    """Of ``"native"`` or ``"triton"``, which must be available."""
    if backend == "native":
        return Operators(layer, layer_backward)
    found: Operators = importlib.import_module("fastrnn.triton").operators
    return found
