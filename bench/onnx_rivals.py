"""Inference libraries that read an ONNX model: ONNX Runtime and OpenVINO.

Both are given the same model: one node per layer, weights as constants, the initial state as an
input if the case carries one, and output and final states as outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import CELLS, Unsupported, Workload
from bench.measure import Call

# ONNX's gate order, as indices into torch.nn's.
ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def make_onnxruntime(workload: Workload) -> Call:
    """Bind a session to fixed inputs and outputs, which takes it less time than `run` does."""
    feed, model = onnx_feed(workload), onnx_model(workload)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads must not go on spinning in the turns of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, tensor in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()))
    outputs = []
    for output in session.get_outputs():
        outputs.append(torch.empty(output.shape).numpy())
        value = onnxruntime.OrtValue.ortvalue_from_numpy(outputs[-1])
        binding.bind_ortvalue_output(output.name, value)

    def infer() -> list[Any]:
        session.run_with_iobinding(binding)
        return outputs

    return infer


def make_openvino(workload: Workload) -> Call:
    """Bind a request to fixed inputs and outputs, which takes it less time than `infer(inputs)`."""
    feed, model = onnx_feed(workload), onnx_model(workload)
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the CPU has it
        "ENABLE_CPU_PINNING": False,  # it would pin the threads of the others too
    }
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    request = compiled.create_infer_request()
    for name, tensor in feed.items():
        request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
    outputs = [request.get_output_tensor(index).data for index in range(len(compiled.outputs))]

    def infer() -> list[Any]:
        request.infer()
        return outputs

    return infer


def onnx_feed(workload: Workload) -> dict[str, Tensor]:
    """Return the model's inputs by name; Unsupported if no such model computes the workload."""
    case = workload.case
    if workload.mode != "inference":
        raise Unsupported("inference only")
    if case.dtype != "float32":
        raise Unsupported("float32 only here")
    if not isinstance(workload.input, Tensor):
        raise Unsupported("no packed sequences")
    if workload.state is None:
        return {"layer0": workload.input}
    if case.layers > 1:
        raise Unsupported("a state of several layers is not built here")
    states = workload.state if isinstance(workload.state, tuple) else (workload.state,)
    return {"layer0": workload.input, **dict(zip(("h_0", "c_0"), states, strict=False))}


def onnx_model(workload: Workload) -> Any:
    """Build an onnx.ModelProto with input [T, B, I], and outputs [T, B, D*H] and [L*D, B, H]."""
    from onnx import TensorProto, helper, numpy_helper

    case, cell, module = workload.case, workload.cell, workload.module
    order = list(ONNX_GATES[cell])
    states = ("h", "c") if cell == "lstm" else ("h",)

    def reordered(name: str) -> Tensor:  # [G*H, ...] of every direction: [D, G*H, ...]
        suffixes = ("", "_reverse")[: case.D]
        gates = [getattr(module, name + suffix).detach() for suffix in suffixes]
        return torch.stack(
            [g.unflatten(0, (len(order), case.H))[order].flatten(0, 1) for g in gates]
        )

    def constant(name: str, values: Tensor) -> str:
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
        if case.carried:
            inputs += ["", *(f"{state}_0" for state in states)]  # no sequence lengths
        options: dict[str, Any] = {"hidden_size": case.H}
        if case.bidirectional:
            options["direction"] = "bidirectional"
        if cell == "gru":
            options["linear_before_reset"] = 1
        if cell == "rnn":
            options["activations"] = ["Tanh"] * case.D
        outputs = [f"Y{layer}", *(f"{state}_n{layer}" for state in states)]  # [T, D, B, H], [D, ..
        nodes += [
            helper.make_node(CELLS[cell], inputs, outputs, **options),
            helper.make_node("Transpose", [f"Y{layer}"], [f"YT{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"YT{layer}", shape], [f"layer{layer + 1}"]),
        ]
    for state in states:
        of_layers = [f"{state}_n{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", of_layers, [f"{state}_n"], axis=0))

    def value(name: str, *sizes: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    state_sizes = (case.layers * case.D, case.B, case.H)
    given = [value(f"{state}_0", *state_sizes) for state in states] if case.carried else []
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("layer0", case.T, case.B, case.I), *given],
        [
            value(f"layer{case.layers}", case.T, case.B, case.D * case.H),
            *(value(f"{state}_n", *state_sizes) for state in states),
        ],
        constants,
    )
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)
