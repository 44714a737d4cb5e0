"""The sweep of bench.sweep over single steps: one row of input and a state, output and a new state.

Beside every time stands its overhead over the floor: reading W_ih and W_hh once, at the bandwidth
measured for a working set of their size.  Weights of fewer bytes have a lower floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from bench.cases import CELLS, Case, Workload, bind, build_workload, weight_bytes
from bench.check import in_float64, named
from bench.measure import Call, Timing, bandwidth, time_paired
from bench.onnx_rivals import make_onnxruntime
from bench.rivals import FASTRNN, RIVALS, TORCH_NN, make_torch_nn
from bench.rows import Row
from fastrnn import parity

SIZES = (64, 128, 256, 512)
# Weights -> part of the bytes of float32; and the error that is allowed against float64.
QUANTIZED = {"bf16": 1 / 2, "int8": 1 / 4}
ALLOWED = {"bf16": 0.02, "int8": 0.1}
OTHERS_ALLOWED = 1e-3


@dataclass(frozen=True)
class Contender:
    name: str
    call: Call
    bytes: float = 1.0  # of its weights, as a part of float32's
    allowed: float = OTHERS_ALLOWED


def plan(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    sizes = SIZES[:2] if quick else SIZES
    return [partial(measure, cell, H, quick) for cell in cells for H in sizes]


def layer_of(workload: Workload) -> nn.Module:
    case = workload.case
    layer: nn.Module = getattr(fastrnn, CELLS[workload.cell])(case.I, case.H)
    layer.load_state_dict(workload.module.state_dict())
    return layer.eval()


def without_gradients(call: Callable[[], Any]) -> Call:
    """Make one sequence of what a layer or a cell returns."""

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            output, state = call()
        return (output, *state) if isinstance(state, tuple) else (output, state)

    return step


def step_of(layer: Any, workload: Workload) -> Call:
    """Bind `layer.step`, or a sequence of one step to a layer that has no such method."""
    assert isinstance(workload.input, Tensor)
    row, state = workload.input[0], workload.state  # [B, I]
    if hasattr(layer, "step"):
        return without_gradients(lambda: layer.step(row, state))
    return without_gradients(lambda: layer(row[None], state))


def cell_of(workload: Workload) -> Call:
    """Bind torch.nn's cell with the layer's weights."""
    case = workload.case
    cell: Any = getattr(nn, CELLS[workload.cell] + "Cell")(case.I, case.H)
    cell.load_state_dict(
        {key.removesuffix("_l0"): value for key, value in workload.module.state_dict().items()}
    )
    assert isinstance(workload.input, Tensor)
    row = workload.input[0]
    if isinstance(workload.state, tuple):
        pair = tuple(state[0] for state in workload.state)

        def step() -> tuple[Tensor, tuple[Tensor, ...]]:
            h, c = cell(row, pair)
            return h, (h, c)

        return without_gradients(step)
    assert workload.state is not None
    state = workload.state[0]

    def step_of_one() -> tuple[Tensor, Tensor]:
        h = cell(row, state)
        return h, h

    return without_gradients(step_of_one)


def contenders(workload: Workload) -> list[Contender]:
    """Return all that can run the step here; fastrnn's layers also quantized."""
    found = [
        Contender(FASTRNN, step_of(layer_of(workload), workload)),
        Contender(f"{TORCH_NN} cell", cell_of(workload)),
        Contender(TORCH_NN, make_torch_nn(workload)),
    ]
    if not next(rival for rival in RIVALS if rival.name == "onnxruntime").absent():
        found.append(Contender("onnxruntime", make_onnxruntime(workload)))
    for weights, part in QUANTIZED.items():
        layer = layer_of(workload)
        fastrnn.quantize(layer, weights=weights)
        call = step_of(layer, workload)
        found.append(Contender(f"{FASTRNN} {weights}", call, part, ALLOWED[weights]))
    return found


def judge(
    found: list[Contender], workload: Workload
) -> tuple[dict[str, float], str | None, list[str]]:
    """Return every contender's error against float64, why fastrnn is red, and who else is wrong."""
    precise = in_float64(workload)
    exact = bind(precise.module, precise)()
    expected = {key: y.flatten() for key, y in named(exact, workload).items()}
    got = {
        contender.name: {key: y.flatten() for key, y in named(contender.call(), workload).items()}
        for contender in found
    }
    errors = {
        name: max(parity.error(tensors[key], y) for key, y in expected.items())
        for name, tensors in got.items()
    }
    worst = parity.worst(parity.compare(got[FASTRNN], got[TORCH_NN], expected))
    red = None if worst.ok else f"{workload.cell} step {workload.case.shape()}: {worst}"
    wrong = [c.name for c in found if c.name != FASTRNN and not errors[c.name] <= c.allowed]
    return errors, red, wrong


def measure(cell: str, H: int, quick: bool) -> Row:
    case = Case("step", "step", T=1, B=1, H=H, carried=True)
    workload = build_workload(case, cell, "inference")
    found = contenders(workload)
    errors, red, wrong = judge(found, workload)
    row: Row = {"cell": cell, "H": H, "B": 1, "red": red, "wrong": wrong, "results": {}}
    row["method"] = "step" if hasattr(getattr(fastrnn, CELLS[cell]), "step") else "forward"
    if red:
        return row
    found = [contender for contender in found if contender.name not in wrong]
    calls = {contender.name: contender.call for contender in found}
    samples = time_paired(calls, 0.05 if quick else 1.0, 3 if quick else 20)
    size = sum(weight_bytes(case, cell))
    for contender in found:
        timing = Timing.of(samples[contender.name].seconds)
        moved = size * contender.bytes
        floor = moved / bandwidth(int(moved), 0.02 if quick else 0.2)
        row["results"][contender.name] = {
            "p20": timing.p20,
            "median": timing.median,
            "p80": timing.p80,
            "floor": floor,
            "overhead": timing.median - floor,
            "error": errors[contender.name],
        }
    return row


def line(row: Row) -> str:
    """Lay out a size: floor and overhead of every contender, and how much faster fastrnn is."""
    head = f"{row['cell']:<4} H={row['H']:<4}"
    if row["red"]:
        return f"{head} RED"
    text = []
    ours = row["results"][FASTRNN]["median"]
    for name, result in row["results"].items():
        text.append(
            f"{head} {name:<14} {1e6 * result['median']:8.1f} µs = floor "
            f"{1e6 * result['floor']:7.2f} + {1e6 * result['overhead']:8.1f}   "
            f"fastrnn {result['median'] / ours:6.2f} times as fast"
        )
        head = " " * len(head)
    text += [f"{head} {name:<14} wrong numbers, not timed" for name in row["wrong"]]
    return "\n".join(text)


def conclude(rows: list[Row]) -> list[str]:
    """Say the lowest speed-up over each contender, and fastrnn's overhead."""
    timed = [row for row in rows if row["results"]]
    if not timed:
        return ["no point was timed"]
    text = [f"fastrnn runs `{timed[0]['method']}`"]
    for name in dict.fromkeys(name for row in timed for name in row["results"]):
        points = [row for row in timed if name in row["results"]]
        if name == FASTRNN:
            overheads = [1e6 * row["results"][name]["overhead"] for row in points]
            text.append(f"fastrnn's overhead: {min(overheads):.1f} to {max(overheads):.1f} µs")
            continue
        gains = {
            f"{row['cell']} H={row['H']}": row["results"][name]["median"]
            / row["results"][FASTRNN]["median"]
            for row in points
        }
        worst = min(gains, key=lambda where: gains[where])
        text.append(f"fastrnn against {name}: at least {gains[worst]:.2f} times as fast ({worst})")
    return text
