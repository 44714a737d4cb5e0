"""What bench.gpu times: the cells of the study's grid, who takes part in them, and how."""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from bench.gpu_rivals import RIVALS
from bench.rows import Row
from fastrnn.parity import Comparison, compare

DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "tf32": torch.float32,  # as torch's flags allow it
}  # fmt: skip
T = 256
ROUNDS, SECONDS = 9, 0.15  # of a contender in a cell
GRAPH = "captured"  # by us, in the names of contenders
GRID = {"FASTRNN_CUDA_KERNEL": "persistent-grid"}
BACKEND = "backend"  # no variable
TRITON = {BACKEND: "triton"}
# Names of fastrnn, and what is asked for by variables: the first one runs every cell.
OURS = {
    "fastrnn": {"FASTRNN_CUDA_KERNEL": "step"},
    "fastrnn step-graph": {"FASTRNN_CUDA_KERNEL": "step-graph"},
    "fastrnn persistent-block": {"FASTRNN_CUDA_KERNEL": "persistent-block"},
    "fastrnn persistent-grid": GRID | {"FASTRNN_GRID_EXCHANGE": "words"},
    "fastrnn persistent-grid flags": GRID | {"FASTRNN_GRID_EXCHANGE": "flags"},
    "fastrnn triton": TRITON,
    "fastrnn triton step": TRITON | {"FASTRNN_TRITON_KERNEL": "step"},
    "fastrnn triton streamed": TRITON | {"FASTRNN_TRITON_KERNEL": "streamed"},
    "fastrnn triton resident": TRITON | {"FASTRNN_TRITON_KERNEL": "resident"},
}
CAPTURED = (
    "torch.nn", "fastrnn", "fastrnn persistent-block", "fastrnn persistent-grid", "fastrnn triton",
)  # fmt: skip
# The same of a grid, on more and fewer multiprocessors.
TUNED = {
    f"{exchange}, {most or 'all'} SMs": GRID | {
        "FASTRNN_GRID_EXCHANGE": exchange, "FASTRNN_MAX_SMS": most,
    }
    for most in ("", "96", "64", "32")
    for exchange in ("words", "flags")
}  # fmt: skip


def cells(rehearse: bool) -> list[dict[str, Any]]:
    """The cells of the study's grid, the most important ones first."""

    def cell(kind: str, dtype: str, B: int, H: int, mode: str, **options: Any) -> dict[str, Any]:
        sizes = {"T": 7, "B": min(B, 3), "H": 8} if rehearse else {"T": T, "B": B, "H": H}
        options = {"layers": 1, "bidirectional": False, "packed": False} | options
        return {"cell": kind, "dtype": dtype, "mode": mode} | sizes | options

    modes = ("training", "inference")
    first = [
        cell(kind, "bfloat16", B, H, mode)
        for H in (512, 1024, 256)
        for B in (32, 8, 1, 128)
        for kind in ("LSTM", "GRU")
        for mode in modes
    ]
    options: list[dict[str, Any]] = [
        {"bidirectional": True}, {"packed": True}, {"layers": 2, "bidirectional": True},
    ]  # fmt: skip
    second = [
        cell(kind, "bfloat16", 32, 512, mode, **extra)
        for extra in options
        for kind in ("LSTM", "GRU", "RNN")
        for mode in modes
    ]
    third = [
        cell(kind, dtype, B, H, mode)
        for dtype in ("float16", "tf32", "float32", "bfloat16")
        for H in (512, 128, 64, 1024, 2048, 256)
        for B in (32, 8, 1, 128)
        for kind in ("LSTM", "GRU", "RNN")
        for mode in modes
    ]
    chosen: list[dict[str, Any]] = []
    for one in first + second + third:
        if one not in chosen:
            chosen.append(one)
    return chosen[:6] if rehearse else chosen


def tuning_cells(rehearse: bool) -> list[dict[str, Any]]:
    """Where the number of blocks, and the way in which they tell each other, may matter most."""
    chosen = [
        cell for cell in cells(rehearse)
        if cell["dtype"] == "bfloat16" and cell["cell"] != "RNN" and cell["layers"] == 1
        and not cell["bidirectional"] and not cell["packed"]
        and (rehearse or (cell["H"] in (256, 512, 1024) and cell["B"] > 1))
    ]  # fmt: skip
    return chosen[:2] if rehearse else chosen


class Workload:
    """A cell's layer of a library, its input and what a call computes; asked: of fastrnn, by
    variables."""

    def __init__(
        self, cell: dict[str, Any], layer: nn.Module, dtype: torch.dtype, device: str,
        asked: dict[str, str] | None = None,
    ) -> None:
        B, steps, H = cell["B"], cell["T"], cell["H"]
        torch.manual_seed(1)
        low = DTYPES[cell["dtype"]]
        self.asked = dict(asked or {})
        self.backend = self.asked.pop(BACKEND, None)
        self.training = cell["mode"] == "training"
        self.layer = layer.to(low).to(device, dtype).train(self.training)
        self.x = torch.randn(steps, B, H).to(low).to(device, dtype).requires_grad_(self.training)
        self.lengths = None
        if cell["packed"]:
            self.lengths = torch.linspace(steps, max(1, steps // 20), B).long()
        self.cotangent: Tensor | None = None

    def __call__(self) -> dict[str, Tensor]:
        before = {name: os.environ.get(name, "") for name in self.asked}
        os.environ.update(self.asked)
        chosen = fastrnn.use_backend(self.backend) if self.backend else contextlib.nullcontext()
        try:
            with chosen:
                return self.results()
        finally:
            os.environ.update(before)

    def results(self) -> dict[str, Tensor]:
        x: Any = self.x
        if self.lengths is not None:
            x = pack_padded_sequence(x, self.lengths)
        with torch.set_grad_enabled(self.training):
            output, state = self.layer(x)
        y = output if self.lengths is None else output.data
        h_n = state if isinstance(state, Tensor) else state[0]
        found = {"output": y.detach(), "h_n": h_n.detach()}
        if not self.training:
            return found
        if self.cotangent is None:
            pattern = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
            self.cotangent = pattern.reshape(y.shape).to(y.dtype)
        leaves = {"input": self.x, **dict(self.layer.named_parameters())}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.cotangent)
        return found | {f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def clock(calls: dict[str, Callable[[], Any]], on_gpu: bool) -> dict[str, dict[str, float]]:
    """Seconds of each call, the calls taking turns: median, 20th and 80th percentile of rounds."""

    def turn(call: Callable[[], Any], repeats: int) -> float:
        if not on_gpu:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - begin) / repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    once = {name: (turn(call, 1), turn(call, 1))[1] for name, call in calls.items()}
    repeats = {n: max(1, min(100, int(SECONDS / ROUNDS / max(s, 1e-9)))) for n, s in once.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if on_gpu else 1):
        for name, call in calls.items():
            times[name].append(turn(call, repeats[name]))
    result = {}
    for name, values in times.items():
        values.sort()
        last = len(values) - 1
        result[name] = {
            "p20": values[round(0.2 * last)],
            "median": statistics.median(values),
            "p80": values[round(0.8 * last)],
        }
    return result


def kernel_names(call: Callable[[], Any]) -> dict[str, int]:
    """The kernels of one call on the GPU, and how often each ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {event.key[:120]: event.count for event in profile.key_averages()}


def workloads(
    cell: dict[str, Any], dtype: torch.dtype, device: str, asked: dict[str, dict[str, str]]
) -> dict[str, Workload]:
    """torch.nn and fastrnn with the same weights; fastrnn once for each name."""
    torch.manual_seed(0)
    sizes = {"num_layers": cell["layers"], "bidirectional": cell["bidirectional"]}
    theirs = getattr(nn, cell["cell"])(cell["H"], cell["H"], **sizes)
    ours = getattr(fastrnn, cell["cell"])(cell["H"], cell["H"], **sizes)
    ours.load_state_dict(theirs.state_dict())
    # On a GPU torch.nn's weights are one array, as cuDNN wants them; moving the layer does that.
    found = {"torch.nn": Workload(cell, theirs, dtype, device)}
    for name, variables in asked.items():
        found[name] = Workload(cell, copy.deepcopy(ours), dtype, device, variables)
    return found


def rivals(cell: dict[str, Any], device: str) -> tuple[dict[str, Workload], dict[str, str]]:
    """The other libraries that run the cell; and why the others do not."""
    found, skipped = {}, {}
    for name, make in RIVALS.items():
        try:
            workload = Workload(cell, make(cell), DTYPES[cell["dtype"]], device)
            results = workload()
            shape = (cell["T"], cell["B"], cell["H"])
            if results["output"].shape != shape or not results["output"].isfinite().all():
                raise RuntimeError("its output has another shape, or is not finite")
            found[name] = workload
        except ImportError:
            skipped[name] = "not installed"
        except Exception as error:  # what another library does not like is not an error of ours
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, skipped


def measure(
    cell: dict[str, Any], device: str, asked: dict[str, dict[str, str]] = OURS
) -> Row:
    """Check a cell by the rule, and time it; asked: names of fastrnn that take part."""
    for flags in (torch.backends.cuda.matmul, torch.backends.cudnn):
        flags.allow_tf32 = cell["dtype"] == "tf32"
    on_gpu, low = device == "cuda", DTYPES[cell["dtype"]]
    contenders = workloads(cell, low, device, asked)
    exact = workloads(cell, torch.float64, device, {})["torch.nn"]()
    same = contenders["torch.nn"]()
    worst = None
    row: Row = cell | {"results": {}, "skipped": {}}
    for name in asked:
        try:
            found = contenders[name]()
        except RuntimeError as error:
            excuses = ("cannot be met", "is not available")
            if name == "fastrnn" or not any(excuse in str(error) for excuse in excuses):
                raise
            row["skipped"][name] = str(error).splitlines()[0]
            del contenders[name]
            continue
        own = max(compare(found, same, exact), key=severity)
        if worst is None or severity(own) > severity(worst):
            worst = own
        if not own.ok:  # is not timed
            row["skipped"][name] = f"RED: {own}"
            del contenders[name]
    if worst is None:  # nothing of ours can run it
        row["parity"] = {"ok": None, "worst": "not run"}
        return row
    row["parity"] = {"ok": worst.ok, "worst": str(worst)}
    del exact
    if len(contenders) == 1:
        return row
    if asked is OURS:
        others, skipped = rivals(cell, device)
        contenders |= others
        row["skipped"] |= skipped
    calls: dict[str, Callable[[], Any]] = dict(contenders)
    if on_gpu and asked is OURS:
        row["gpu_kernels"] = {name: kernel_names(call) for name, call in contenders.items()}
        for name in CAPTURED:
            if name not in contenders:
                continue
            try:
                calls[f"{name} {GRAPH}"] = captured(contenders[name])
            except RuntimeError as error:
                row["skipped"][f"{name} {GRAPH}"] = str(error).splitlines()[0]
    row["results"] = clock(calls, on_gpu)
    return row


def severity(verdict: Comparison) -> tuple[bool, float]:
    return not verdict.ok, verdict.error / max(verdict.allowed, 1e-30)
