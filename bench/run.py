"""Times fastrnn against torch.nn and the other libraries that are installed, case by case.

    python -m bench.run [--case ID ...] [--cell ...] [--mode ...] [--dtype ...] [--threads N ...]
                        [--json FILE] [--quick] [--list]

All libraries run in one process and take turns, call by call.  Before a case is timed, fastrnn's
results on it are compared with a float64 run of torch.nn; if they break the rule of
fastrnn.parity, the case is printed as red, not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastrnn
from bench.cases import (
    CASES,
    CELLS,
    DTYPES,
    MODES,
    Case,
    Workload,
    bind,
    build_workload,
    flops,
    twin,
)
from bench.measure import Call, Timing, gemm_peak, peak_memory, percentile, time_paired
from bench.rivals import FASTRNN, RIVALS, TORCH_NN
from fastrnn import _ops, parity

Row = dict[str, Any]

# Libraries other than fastrnn are only checked to compute the same thing at all.
OTHERS_ALLOWED = 1e-3


def in_float64(workload: Workload) -> Workload:
    return replace(
        workload,
        module=copy.deepcopy(workload.module).double(),
        input=workload.input.to(torch.float64),
        cotangent=workload.cotangent.double(),
    )


def check(workload: Workload, calls: dict[str, Call]) -> dict[str, dict[str, Any]]:
    """Compare each call's results with those of torch.nn in float64.

    fastrnn has to satisfy the rule of fastrnn.parity for the output, every final state and, in
    training, every gradient; other libraries have to be within OTHERS_ALLOWED for what they
    return.  Gives per library whether it passed, and its worst tensor.
    """
    precise = in_float64(workload)
    expected = named(bind(precise.module, precise)(), workload)
    same_dtype = named(calls[TORCH_NN](), workload)
    verdicts = {}
    for name, call in calls.items():
        if name == TORCH_NN:
            continue
        got = named(call(), workload)
        if name == FASTRNN:
            worst = parity.worst(parity.compare(got, same_dtype, expected))
            verdicts[name] = {"ok": worst.ok, "worst": str(worst)}
        else:
            error = max(parity.error(got[key], expected[key]) for key in got)
            verdicts[name] = {
                "ok": error <= OTHERS_ALLOWED,
                "worst": f"error {error:.3g}, allowed {OTHERS_ALLOWED:.3g}",
            }
    return verdicts


def named(results: Sequence[Any], workload: Workload) -> dict[str, torch.Tensor]:
    """Name the results of a call, which may end early."""
    states = ["h_n", "c_n"] if workload.cell == "lstm" else ["h_n"]
    parameters = [name for name, _ in workload.module.named_parameters()]
    names = ["output", *states, *(f"d {name}" for name in ["input", *parameters])]
    return {name: torch.as_tensor(result) for name, result in zip(names, results, strict=False)}


def measure(case: Case, cell: str, mode: str, peak: float, quick: bool = False) -> Row:
    """Check and time one case on the current threads; `peak` is the flop/s of a GEMM."""
    workload = build_workload(case, cell, mode)
    calls = {}
    for rival in RIVALS:
        call = None if rival.absent() else rival.make(workload)
        if call is not None:
            calls[rival.name] = call
    verdicts = check(workload, calls)
    row: Row = {
        "case": case.id,
        "reason": case.reason,
        "shape": case.shape(),
        "cell": cell,
        "mode": mode,
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "gemm_peak": peak,
        "parity": verdicts,
        "results": {},
        "speedup": None,  # ratio of the medians
        "speedup_p20": None,  # of the ratios of single rounds
        "speedup_p80": None,
    }
    if not verdicts[FASTRNN]["ok"]:
        return row
    calls = {name: c for name, c in calls.items() if name == TORCH_NN or verdicts[name]["ok"]}
    # Before the clock: profiling a call also warms it up.
    memory = {name: peak_memory(calls[name]) for name in (TORCH_NN, FASTRNN)}
    samples = time_paired(calls, 0.05 if quick else 1.0, min_rounds=3 if quick else 7)
    work = flops(case, cell, mode)
    for name, seconds in samples.items():
        timing = Timing.of(seconds)
        row["results"][name] = {
            **asdict(timing),
            "peak_bytes": memory.get(name),
            "gemm_share": work / timing.median / peak,
        }
    row["speedup"] = row["results"][TORCH_NN]["median"] / row["results"][FASTRNN]["median"]
    ratios = [
        theirs / ours for theirs, ours in zip(samples[TORCH_NN], samples[FASTRNN], strict=True)
    ]
    row["speedup_p20"], row["speedup_p80"] = percentile(ratios, 20), percentile(ratios, 80)
    return row


def environment() -> Row:
    """Say what the numbers were measured on; part of every row."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["fastrnn"] = fastrnn.__version__
    for rival in RIVALS:
        if rival.name not in (TORCH_NN, FASTRNN) and not rival.absent():
            versions[rival.name] = version(rival.name)
    return {
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute, before the first row
        "kernels": kernels(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def kernels() -> str:
    """Say what fastrnn runs: "native, avx512", or "reference" with the reason."""
    backend = fastrnn.get_backend()
    if backend in ("auto", "native") and _ops.native_error is None:
        build = importlib.import_module("fastrnn._C")
        return f"native, {build.cpu_isa()}"
    return f"reference ({_ops.native_error or 'chosen'})"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the checked-out commit, with "+changes" if files differ from it; None without git."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if git("status", "--porcelain") else "")


HEADER = (
    f"{'case':<12} {'cell':<4} {'mode':<9} {'dtype':<8} {'thr':>3}  {'library':<11} "
    f"{'p20':>9} {'median':>9} {'p80':>9}  {'memory':>10} {'GEMM':>5}  speed-up"
)


def lines(row: Row) -> list[str]:
    """Lay out one row as text: one line per library, under HEADER."""
    head = (
        f"{row['case']:<12} {row['cell']:<4} {row['mode']:<9} {row['dtype']:<8} {row['threads']:>3}"
    )
    red = [name for name, verdict in row["parity"].items() if not verdict["ok"]]
    text = []
    for name in red:
        text.append(f"{head}  {name:<11} RED, not timed: {row['parity'][name]['worst']}")
    for name, result in row["results"].items():
        times = " ".join(f"{milliseconds(result[key]):>9}" for key in ("p20", "median", "p80"))
        held = result["peak_bytes"]
        memory = "" if held is None else f"{held / 2**10:.0f} KiB"
        ratio = row["results"][TORCH_NN]["median"] / result["median"]
        text.append(
            f"{head}  {name:<11} {times}  {memory:>10} {result['gemm_share']:>5.0%}  {ratio:.2f}"
        )
        head = " " * len(head)
    return text


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{3 if seconds < 0.1 else 1}f} ms"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description="Time fastrnn against torch.nn and other libraries."
    )
    parser.add_argument("--case", nargs="+", default=["*"], help="ids; * and ? match (all)")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="few rounds: for a first look")
    parser.add_argument("--list", action="store_true", help="print the cases and leave")
    options = parser.parse_args(arguments)
    if min(options.threads) < 1:
        parser.error("--threads: must be at least 1")
    options.cases = [c for c in CASES if any(fnmatch.fnmatch(c.id, p) for p in options.case)]
    unknown = [p for p in options.case if not any(fnmatch.fnmatch(c.id, p) for c in CASES)]
    if unknown:
        parser.error(f"--case: no case is called {', '.join(unknown)}; see --list")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json: no such folder: {Path(options.json).parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for case in options.cases:
            print(f"{case.id:<12} {case.shape():<30} {case.reason}")
        return 0
    for rival in RIVALS:
        reason = rival.absent()
        if reason is not None:
            print(f"{rival.name}: absent ({reason})")
    shared = environment()
    print(f"{shared['device']}, fastrnn {shared['versions']['fastrnn']}: {shared['kernels']}")
    if shared["load"] + max(options.threads) > shared["cores"] + 0.5:
        print(
            f"the machine is busy (load {shared['load']:.1f} on {shared['cores']} cores): "
            "times will be wrong, with several threads by orders of magnitude",
            file=sys.stderr,
        )
    print(HEADER)
    plan = [
        (threads, twin(case, dtype), cell, mode)
        for threads in options.threads
        for dtype in options.dtype
        for case in options.cases
        for cell in options.cell
        for mode in options.mode
    ]
    rows: list[Row] = []
    peaks: dict[tuple[int, str], float] = {}
    before = torch.get_num_threads()
    try:
        for threads, case, cell, mode in tqdm(plan, unit="case", file=sys.stderr):
            torch.set_num_threads(threads)
            if (threads, case.dtype) not in peaks:
                peaks[threads, case.dtype] = gemm_peak(DTYPES[case.dtype])
            row = measure(case, cell, mode, peaks[threads, case.dtype], options.quick)
            rows.append(row | shared)
            tqdm.write("\n".join(lines(row)), file=sys.stdout)
            if options.json:  # after every row: an interrupted run keeps what it has
                Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        torch.set_num_threads(before)
    red = [row for row in rows if not row["parity"][FASTRNN]["ok"]]
    if red:
        print(f"{len(red)} of {len(rows)} rows are red", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
