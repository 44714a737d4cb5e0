"""The libraries that are timed.

A rival is a name, a function that turns a workload into a call, and a function that says why the
library is absent.  Adding one is adding an entry to RIVALS.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastrnn
from bench.cases import CELLS, Workload, bind
from bench.measure import Call

TORCH_NN = "torch.nn"
FASTRNN = "fastrnn"


@dataclass(frozen=True)
class Rival:
    """A library. `make` returns None for a workload it cannot run.

    The call that `make` returns gives a sequence of arrays that begins like `cases.bind`'s.
    """

    name: str
    make: Callable[[Workload], Call | None]
    absent: Callable[[], str | None]  # None if the library is there, else the reason


def make_torch_nn(workload: Workload) -> Call:
    return bind(workload.module, workload)


def make_fastrnn(workload: Workload) -> Call:
    case, original = workload.case, workload.module
    module = getattr(fastrnn, CELLS[workload.cell])(
        case.I, case.H, num_layers=case.layers, bidirectional=case.bidirectional
    )
    module.to(original.weight_ih_l0.dtype).train(original.training)
    module.load_state_dict(original.state_dict())
    return bind(module, workload)


# ONNX's gate order, as indices into torch.nn's.
ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def make_onnxruntime(workload: Workload) -> Call | None:
    """Inference in float32 on padded input: one ONNX node per layer."""
    case = workload.case
    if workload.mode != "inference" or case.dtype != "float32":
        return None
    if not isinstance(workload.input, torch.Tensor):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads must not go on spinning in the turns of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        onnx_model(workload).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"layer0": workload.input.numpy()}
    return lambda: session.run(None, feed)


def onnx_model(workload: Workload) -> Any:
    """Build an onnx.ModelProto with input [T, B, I] and output [T, B, D*H]."""
    from onnx import TensorProto, helper, numpy_helper

    case, cell, module = workload.case, workload.cell, workload.module
    order = list(ONNX_GATES[cell])

    def reordered(name: str) -> torch.Tensor:  # [G*H, ...] of every direction: [D, G*H, ...]
        suffixes = ("", "_reverse")[: case.D]
        gates = [getattr(module, name + suffix).detach() for suffix in suffixes]
        return torch.stack(
            [g.unflatten(0, (len(order), case.H))[order].flatten(0, 1) for g in gates]
        )

    def constant(name: str, values: torch.Tensor) -> str:
        constants.append(numpy_helper.from_array(values.numpy(), name))
        return name

    nodes: list[Any] = []
    constants: list[Any] = []
    shape = constant("shape", torch.tensor([0, 0, -1]))  # keeps T and B, joins D and H
    for layer in range(case.layers):
        bias = torch.cat([reordered(f"bias_ih_l{layer}"), reordered(f"bias_hh_l{layer}")], dim=1)
        inputs = [
            f"layer{layer}",
            constant(f"W{layer}", reordered(f"weight_ih_l{layer}")),
            constant(f"R{layer}", reordered(f"weight_hh_l{layer}")),
            constant(f"B{layer}", bias),
        ]
        options: dict[str, Any] = {"hidden_size": case.H}
        if case.bidirectional:
            options["direction"] = "bidirectional"
        if cell == "gru":
            options["linear_before_reset"] = 1
        if cell == "rnn":
            options["activations"] = ["Tanh"] * case.D
        nodes += [
            helper.make_node(CELLS[cell], inputs, [f"Y{layer}"], **options),  # [T, D, B, H]
            helper.make_node("Transpose", [f"Y{layer}"], [f"YT{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"YT{layer}", shape], [f"layer{layer + 1}"]),
        ]

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.T, case.B, size])

    graph = helper.make_graph(
        nodes,
        "layers",
        [value("layer0", case.I)],
        [value(f"layer{case.layers}", case.D * case.H)],
        constants,
    )
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


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
)
