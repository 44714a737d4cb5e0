"""The GPU backend that needs no compiler at install (when it runs, Triton needs a C compiler): the
operators of csrc/ops.cpp on Triton kernels, as ``torch.ops.fastrnn_triton``.

cells.py holds the cells, resident.py, streamed.py and steps.py the kernels, plan.py chooses between
them, scan.py runs a pass. Importing this imports Triton. With TRITON_INTERPRET=1, set before that,
the kernels run in Python, on CPU tensors too: to test them, at milliseconds a step.
"""

from __future__ import annotations

import torch

from .. import _ops, traced
from . import scan
from .launch import interpreted

_library = torch.library.Library("fastrnn_triton", "DEF")
for _schema, _run in ((traced.LAYER, scan.layer), (traced.LAYER_BACKWARD, scan.layer_backward)):
    _name = _library.define(_schema)
    for _key in ("CUDA", "CPU") if interpreted else ("CUDA",):
        _library.impl(_name, _run, _key)
traced.describe("fastrnn_triton")

operators = _ops.Operators(
    torch.ops.fastrnn_triton.layer.default, torch.ops.fastrnn_triton.layer_backward.default
)

__all__ = ["interpreted", "operators"]
