"""The GPU backend that needs no compiler at install (when it runs, Triton needs a C compiler): the
operators of csrc/ops.cpp on Triton kernels, as ``torch.ops.fastrnn_triton``.

cells.py holds the cells, resident.py, streamed.py and steps.py the kernels, plan.py chooses between
them, scan.py runs a pass. Importing this imports Triton. With TRITON_INTERPRET=1, set before that,
the kernels run in Python, on CPU tensors too: to test them, at milliseconds a step.
"""

from __future__ import annotations

import torch

from .. import _ops
from . import scan
from .launch import interpreted

# csrc/ops.cpp has the same.
LAYER = (
    "layer(str cell, Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, "
    "int groups, int direction, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)"
)
LAYER_BACKWARD = (
    "layer_backward(str cell, Tensor? doutput, Tensor? dh_n, Tensor? dc_n, Tensor input, "
    "Tensor output, Tensor cells, Tensor saved, Tensor[] weights, Tensor? h0, Tensor? c0, "
    "Tensor? batch_sizes, int groups, int direction, int[] wanted) "
    "-> (Tensor dinput, Tensor[] dweights, Tensor dh0, Tensor dc0)"
)

_library = torch.library.Library("fastrnn_triton", "DEF")
for _schema, _run, _fake in (
    (LAYER, scan.layer, _ops.layer_fake),
    (LAYER_BACKWARD, scan.layer_backward, _ops.layer_backward_fake),
):
    _name = _library.define(_schema)
    for _key in ("CUDA", "CPU") if interpreted else ("CUDA",):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"fastrnn_triton::{_name}", _fake, lib=_library)

operators = _ops.Operators(
    torch.ops.fastrnn_triton.layer.default, torch.ops.fastrnn_triton.layer_backward.default
)

__all__ = ["interpreted", "operators"]
