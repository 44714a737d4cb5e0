"""Everything that needs a GPU, in one command (`make gpu` builds before it): probe, check, time.

    python -m bench.gpu [--stage probe check time triton tune] [--json FILE] [--deadline S]
                        [--rehearse]

    probe   what decides the protocol of persistent kernels (bench/gpu_probe.cu)
    check   tests/gpu
    time    fastrnn's CUDA and Triton kernels against torch.nn (cuDNN), each eager and captured in
            a CUDA graph, and the libraries of bench/gpu_rivals.py that are installed; cells in the
            order of their importance; what breaks the rule of fastrnn.parity is not timed
    triton  tests/triton_backend, and tests/gpu with FASTRNN_BACKEND=triton
    tune    persistent-grid on more and fewer multiprocessors, with either exchange

The file is written after every cell; a cell that it holds already is not measured again.  At the
deadline the run ends with what it has.  --rehearse goes through all of it on a machine without a
GPU: the kernels run on the host, tiny sizes, and the file says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastrnn
from bench.environment import environment
from bench.gpu_cells import OURS, TUNED, cells, measure, tuning_cells
from bench.rows import Row, save

try:
    from tqdm import tqdm
except ImportError:  # images for GPUs may not have it, and have no network
    tqdm = None

ROOT = Path(__file__).parent.parent
STAGES = ("probe", "check", "time", "triton", "tune")
COMPILE = "tests/triton_backend/test_triton_compile.py"
PROBE_SECONDS, CHECK_SECONDS = 60.0, 200.0  # at most


def line(row: Row) -> str:
    options = [name for name in ("bidirectional", "packed") if row[name]]
    options += [f"L={row['layers']}"] if row["layers"] > 1 else []
    head = f"{row['cell']:<4} {row['dtype']:<8} {row['mode']:<9} "
    head += f"T={row['T']} B={row['B']} H={row['H']}"
    if row["parity"]["ok"] is None:
        return f"{head} {' '.join(options)}  not run"
    if not row["results"]:
        return f"{head} {' '.join(options)}  RED, not timed: {row['parity']['worst']}"
    per_step = {n: 1e6 * r["median"] / row["T"] for n, r in row["results"].items()}
    text = "  ".join(f"{name} {value:.2f}" for name, value in per_step.items())
    red = "" if row["parity"]["ok"] else f"  RED, not timed: {row['parity']['worst']}"
    return f"{head} {' '.join(options)}  us a step: {text}{red}"


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
    return run_tests(run, "check", ["tests/gpu"], "test_long or behaviour", "native")


def check_triton(run: Run) -> bool:
    files = ["tests/triton_backend", "tests/gpu", "--ignore", COMPILE]  # that needs no GPU
    return run_tests(run, "triton", files, "test_choice or test_cells", "triton")


def run_tests(run: Run, stage: str, files: list[str], rehearsed: str, backend: str) -> bool:
    extra = ["-k", rehearsed] if run.rehearse else []
    command = [sys.executable, "-m", "pytest", "-q", *files, *extra]
    seconds = max(10.0, min(CHECK_SECONDS, run.left()))
    log = run.path.with_suffix(f".{stage}.log")
    variables = os.environ | {"FASTRNN_BACKEND": backend}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, check=False, timeout=seconds, stdout=file, stderr=file,
                env=variables,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text().strip().splitlines()
    print("\n".join(text[-25:]))
    summary = text[-1] if text else ""
    if code is None:
        summary = f"stopped after {seconds:.0f} s: {summary}"
    run.add({"stage": stage, "ok": code == 0, "summary": summary})
    return code == 0


def progress(items: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return items if tqdm is None else tqdm(items, unit="cell", file=sys.stderr)


def say(text: str) -> None:
    print(text, flush=True) if tqdm is None else tqdm.write(text, file=sys.stdout)


def time_cells(run: Run) -> bool:
    return measure_all(run, "time", cells(run.rehearse), OURS)


def tune(run: Run) -> bool:
    return measure_all(run, "tune", tuning_cells(run.rehearse), TUNED)


def measure_all(
    run: Run, stage: str, chosen: list[dict[str, Any]], asked: dict[str, dict[str, str]]
) -> bool:
    good = True
    for cell in progress(chosen):
        if run.has(stage, cell):
            continue
        if run.left() < 5:
            say(f"{stage}: the deadline; run again with the same file to go on")
            break
        try:
            row = measure(cell, run.device, asked)
        except RuntimeError as error:  # out of memory, or what a library cannot do
            text = str(error).strip().splitlines()[0]
            row = cell | {"parity": {"ok": False, "worst": text}, "results": {}}
        good = good and row["parity"]["ok"] is not False
        run.add({"stage": stage, **row})
        say(line(row))
    return good


@contextlib.contextmanager
def machine(rehearse: bool) -> Iterator[None]:
    """A GPU, float32 exact for both libraries where a cell does not say tf32; or its kernels on the
    host."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    variables = dict(os.environ)
    try:
        if not rehearse:
            with fastrnn.use_backend("native"):
                yield
            return
        sys.path.insert(0, str(ROOT / "tests"))
        import cuda_on_host

        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        with cuda_on_host.on_host_kernels():
            yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


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
    stages = {
        "probe": probe, "check": check, "time": time_cells, "triton": check_triton, "tune": tune,
    }  # fmt: skip
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
