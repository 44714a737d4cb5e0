"""Loads the native extension and describes its operators to PyTorch. Which backend runs a layer:
_backend.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_graphs, traced


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


if native_error is None:
    python_tensors = importlib.import_module("fastrnn._C").PythonTensors(Tensor, torch.nn.Parameter)
    select_rows = importlib.import_module("fastrnn._C").select_rows
    traced.describe("fastrnn")
    layer = torch.ops.fastrnn.layer.default
    layer_backward = torch.ops.fastrnn.layer_backward.default


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
