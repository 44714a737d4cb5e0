"""The libraries that are timed.

A rival is a name, a function that turns a workload into a call, and a function that says why the
library is absent.  Adding one is adding an entry to RIVALS.  `--base` of bench.run adds an earlier
fastrnn under the name BASE: see bench.base.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import fastrnn
from bench.cases import CELLS, Workload, bind
from bench.jax_rival import make_jax
from bench.measure import Call
from bench.onnx_rivals import make_onnxruntime, make_openvino

TORCH_NN = "torch.nn"
FASTRNN = "fastrnn"
BASE = "base"


@dataclass(frozen=True)
class Rival:
    """A library. `make` raises cases.Unsupported, with the reason, if it cannot run the workload.

    The call that `make` returns gives a sequence of arrays that begins like `cases.bind`'s: at
    least the output and the final states.
    """

    name: str
    make: Callable[[Workload], Call]
    absent: Callable[[], str | None]  # None if the library is there, else the reason


def make_torch_nn(workload: Workload) -> Call:
    return bind(workload.module, workload)


def make_fastrnn(workload: Workload, namespace: ModuleType = fastrnn) -> Call:
    """Bind the layer of `namespace`: fastrnn, or another revision of it."""
    case, original = workload.case, workload.module
    module = getattr(namespace, CELLS[workload.cell])(
        case.I, case.H, num_layers=case.layers, bidirectional=case.bidirectional
    )
    module.to(original.weight_ih_l0.dtype).train(original.training)
    module.load_state_dict(original.state_dict())
    return bind(module, workload)


def needs(*modules: str) -> Callable[[], str | None]:
    """Return a function that names the first of the modules that is not installed."""

    def absent() -> str | None:
        for module in modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return None

    return absent


RIVALS = (
    Rival(TORCH_NN, make_torch_nn, needs("torch")),
    Rival(FASTRNN, make_fastrnn, needs("fastrnn")),
    Rival("onnxruntime", make_onnxruntime, needs("onnxruntime", "onnx")),
    Rival("openvino", make_openvino, needs("openvino", "onnx")),
    Rival("jax", make_jax, needs("jax")),
)
