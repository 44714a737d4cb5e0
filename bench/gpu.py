"""Everything that needs a GPU, in one command (`make gpu` builds before it): probe, check, time.

    python -m bench.gpu [--stage probe check time] [--json FILE] [--deadline SECONDS] [--rehearse]

    probe   what decides the protocol of persistent kernels (bench/gpu_probe.cu)
    check   tests/gpu
    time    fastrnn against torch.nn (cuDNN), each eager and captured in a CUDA graph, cells in the
            order of their importance; what breaks the rule of fastrnn.parity is not timed

The file is written after every cell; a cell that it holds already is not measured again.  At the
deadline the run ends with what it has.  --rehearse goes through all of it on a machine without a
GPU: the kernels run on the host, tiny sizes, and the file says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from bench.environment import environment
from bench.rows import Row, save
from fastrnn.parity import compare

try:
    from tqdm import tqdm
except ImportError:  # images for GPUs may not have it, and have no network
    tqdm = None

ROOT = Path(__file__).parent.parent
STAGES = ("probe", "check", "time")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
T = 256
ROUNDS, SECONDS = 9, 0.15  # of a contender in a cell
PROBE_SECONDS, CHECK_SECONDS = 60.0, 200.0  # at most
GRAPH = "captured"  # in the names of contenders


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
        for dtype in ("float16", "float32", "bfloat16")
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


class Workload:
    """One cell's layer of a library, its input and what a call computes."""

    def __init__(self, cell: dict[str, Any], library: Any, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        H, B, steps = cell["H"], cell["B"], cell["T"]
        options = {"num_layers": cell["layers"], "bidirectional": cell["bidirectional"]}
        theirs = getattr(nn, cell["cell"])(H, H, **options)
        layer: nn.Module = getattr(library, cell["cell"])(H, H, **options)
        layer.load_state_dict(theirs.state_dict())
        low = DTYPES[cell["dtype"]]
        self.training = cell["mode"] == "training"
        self.layer = layer.to(low).to(device, dtype).train(self.training)
        self.x = torch.randn(steps, B, H).to(low).to(device, dtype).requires_grad_(self.training)
        self.lengths = None
        if cell["packed"]:
            self.lengths = torch.linspace(steps, max(1, steps // 20), B).long()
        self.cotangent: Tensor | None = None

    def __call__(self) -> dict[str, Tensor]:
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


def measure(cell: dict[str, Any], device: str) -> Row:
    """Check a cell by the rule, and time it."""
    on_gpu, low = device == "cuda", DTYPES[cell["dtype"]]
    libraries = {"torch.nn": nn, "fastrnn": fastrnn}
    workloads = {name: Workload(cell, lib, low, device) for name, lib in libraries.items()}
    exact = Workload(cell, nn, torch.float64, device)()
    verdicts = compare(workloads["fastrnn"](), workloads["torch.nn"](), exact)
    del exact
    worst = max(verdicts, key=lambda v: (not v.ok, v.error / max(v.allowed, 1e-30)))
    parity = {"ok": worst.ok, "worst": str(worst)}
    row: Row = cell | {"parity": parity, "results": {}}
    if not worst.ok:
        return row
    calls: dict[str, Callable[[], Any]] = dict(workloads)
    if on_gpu:
        row["gpu_kernels"] = {name: kernel_names(call) for name, call in workloads.items()}
        for name, call in workloads.items():
            try:
                calls[f"{name} {GRAPH}"] = captured(call)
            except RuntimeError as error:
                row[f"{name} not captured"] = str(error).splitlines()[0]
    row["results"] = clock(calls, on_gpu)
    return row


def line(row: Row) -> str:
    options = [name for name in ("bidirectional", "packed") if row[name]]
    options += [f"L={row['layers']}"] if row["layers"] > 1 else []
    head = f"{row['cell']:<4} {row['dtype']:<8} {row['mode']:<9} "
    head += f"T={row['T']} B={row['B']} H={row['H']}"
    if not row["parity"]["ok"]:
        return f"{head} {' '.join(options)}  RED, not timed: {row['parity']['worst']}"
    per_step = {n: 1e6 * r["median"] / row["T"] for n, r in row["results"].items()}
    text = "  ".join(f"{name} {value:.2f}" for name, value in per_step.items())
    return f"{head} {' '.join(options)}  us a step: {text}"


class Run:
    """The file of a run, and its deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = Path(options.json)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())
        self.end = time.monotonic() + options.deadline
        self.rehearse: bool = options.rehearse
        self.device = "cpu" if options.rehearse else "cuda"
        self.shared = environment() | {"rehearsal": options.rehearse}
        if not options.rehearse:
            facts = torch.cuda.get_device_properties(0)
            self.shared |= {"gpu": facts.name, "multiprocessors": facts.multi_processor_count}
            self.shared |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, row: Row) -> None:
        self.rows.append(row | self.shared)
        save(self.path, self.rows)

    def has(self, stage: str, key: dict[str, Any]) -> bool:
        """Whether a good row of this commit and GPU is there."""
        wanted = {"stage": stage, "commit": self.shared["commit"]} | key
        wanted |= {"gpu": self.shared["gpu"]} if "gpu" in self.shared else {}
        return any(
            row.get("results") and all(row.get(k) == v for k, v in wanted.items())
            for row in self.rows
        )


def probe(run: Run) -> bool:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        print("probe: nvcc is not installed")
        return run.rehearse
    architecture = "sm_90a"
    if not run.rehearse:
        major, minor = torch.cuda.get_device_capability()
        architecture = f"sm_{major}{minor}"
    program = ROOT / "build" / "gpu_probe"
    program.parent.mkdir(exist_ok=True)
    source = str(ROOT / "bench/gpu_probe.cu")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", source, "-o", str(program)]
    if subprocess.run(command, check=False).returncode:
        return False
    if run.rehearse:
        return True
    try:
        done = subprocess.run(
            [str(program)], check=False, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as stopped:
        print(f"probe: stopped after {PROBE_SECONDS:.0f} s: {stopped.stdout}")
        return False
    print(done.stdout + done.stderr, end="")
    for text in done.stdout.splitlines():
        run.add({"stage": "probe", **json.loads(text)})
    return done.returncode == 0


def check(run: Run) -> bool:
    extra = ["-k", "test_long or behaviour"] if run.rehearse else []
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", *extra]
    seconds = max(10.0, min(CHECK_SECONDS, run.left()))
    log = run.path.with_suffix(".check.log")
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, check=False, timeout=seconds, stdout=file, stderr=file
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text().strip().splitlines()
    print("\n".join(text[-25:]))
    summary = text[-1] if text else ""
    if code is None:
        summary = f"stopped after {seconds:.0f} s: {summary}"
    run.add({"stage": "check", "ok": code == 0, "summary": summary})
    return code == 0


def progress(items: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return items if tqdm is None else tqdm(items, unit="cell", file=sys.stderr)


def say(text: str) -> None:
    print(text, flush=True) if tqdm is None else tqdm.write(text, file=sys.stdout)


def time_cells(run: Run) -> bool:
    good = True
    for cell in progress(cells(run.rehearse)):
        if run.has("time", cell):
            continue
        if run.left() < 5:
            say("time: the deadline; run again with the same file to go on")
            break
        try:
            row = measure(cell, run.device)
        except RuntimeError as error:  # out of memory, or what a library cannot do
            text = str(error).strip().splitlines()[0]
            row = cell | {"parity": {"ok": False, "worst": text}, "results": {}}
        good = good and row["parity"]["ok"]
        run.add({"stage": "time", **row})
        say(line(row))
    return good


@contextlib.contextmanager
def machine(rehearse: bool) -> Iterator[None]:
    """A GPU, float32 exact for both libraries; or its kernels on the host."""
    if not rehearse:
        flags = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [flag.allow_tf32 for flag in flags]
        for flag in flags:
            flag.allow_tf32 = False
        try:
            with fastrnn.use_backend("native"):
                yield
        finally:
            for flag, value in zip(flags, before, strict=True):
                flag.allow_tf32 = value
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_on_host

    with cuda_on_host.on_host_kernels():
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--json", metavar="FILE", default="build/gpu.json",
        help="write the rows to FILE, or go on with it (build/gpu.json)",
    )  # fmt: skip
    parser.add_argument("--deadline", type=float, default=420.0, metavar="S", help="seconds (420)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse goes through it without one")
    run = Run(options)
    stages = {"probe": probe, "check": check, "time": time_cells}
    failed = []
    with machine(options.rehearse):
        for name in options.stage:
            print(f"{name}: {run.left():.0f} s left", flush=True)
            if not stages[name](run):
                failed.append(name)
                print(f"{name}: FAILED", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
