"""Times fastrnn against torch.nn and the other libraries that are installed, case by case.

    python -m bench.run [--case ID ...] [--cell ...] [--mode ...] [--dtype ...] [--threads N ...]
                        [--base REV] [--json FILE] [--seconds S] [--quick] [--list]

All libraries run in one process and take turns.  Before a case is timed, fastrnn's results on it
are compared with a float64 run of torch.nn; if they break the rule of fastrnn.parity, the case is
printed as red, not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import base, rows
from bench.cases import (
    CASES,
    CELLS,
    DTYPES,
    MODES,
    Case,
    Unsupported,
    Workload,
    build_workload,
    flops,
    traffic,
    twin,
    working_set,
)
from bench.check import check
from bench.environment import announce, environment
from bench.measure import (
    Call,
    Samples,
    Timing,
    bandwidth,
    gemm_peak,
    peak_memory,
    percentile,
    pinned,
    time_paired,
)
from bench.rivals import BASE, FASTRNN, RIVALS, TORCH_NN, Rival
from bench.rows import Row


def measure(
    case: Case, cell: str, mode: str, quick: bool = False, rivals: Iterable[Rival] | None = None,
    seconds: float = 1.0,
) -> Row:
    """Check and time one case on the current threads."""
    workload = build_workload(case, cell, mode)
    calls, skipped = bind_all(RIVALS if rivals is None else rivals, workload)
    verdicts = check(workload, calls)
    row: Row = {
        "case": case.id,
        "reason": case.reason,
        "shape": case.shape(),
        "sizes": {"T": case.T, "B": case.B, "I": case.I, "H": case.H, "L": case.layers}
        | {"D": case.D, "rows": case.rows},
        "cell": cell,
        "mode": mode,
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "parity": verdicts,
        "skipped": skipped,
        "results": {},
        "ratios": {},
        "speedup": None,  # over torch.nn: ratio of the medians
        "speedup_p20": None,  # of the ratios of single rounds
        "speedup_p80": None,
    }
    if not verdicts[FASTRNN]["ok"]:
        return row
    calls = {name: c for name, c in calls.items() if name == TORCH_NN or verdicts[name]["ok"]}
    # Before the clock: profiling a call also warms it up.
    memory = {name: peak_memory(calls[name]) for name in (TORCH_NN, FASTRNN, BASE) if name in calls}
    with pinned(row["threads"]):
        before = limits(case, cell, mode, quick)
        samples = time_paired(calls, 0.05 if quick else seconds, min_rounds=3 if quick else 7)
        after = limits(case, cell, mode, quick)
    row |= {key: max(before[key], after[key]) for key in before}
    work, moved = flops(case, cell, mode), traffic(case, cell, mode)
    arithmetic, memory_floor = work / row["gemm_peak"], moved / row["bandwidth"]
    row["floor"] = max(arithmetic, memory_floor)
    row["bound"] = "GEMM" if arithmetic >= memory_floor else "memory"
    for name, sample in samples.items():
        timing = Timing.of(sample.seconds)
        row["results"][name] = {
            **asdict(timing),
            "cpus": sample.cpus,
            "peak_bytes": memory.get(name),
            "gemm_share": work / timing.median / row["gemm_peak"],
            "floor_share": row["floor"] / timing.median,
        }
    row["ratios"] = {
        name: compare(sample, samples[FASTRNN])
        for name, sample in samples.items()
        if name != FASTRNN
    }
    theirs = row["ratios"][TORCH_NN]
    row |= {"speedup": theirs["median"], "speedup_p20": theirs["p20"], "speedup_p80": theirs["p80"]}
    return row


def bind_all(rivals: Iterable[Rival], workload: Workload) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls of the libraries that are there, and why each of the others has none."""
    calls, skipped = {}, {}
    for rival in rivals:
        if rival.absent():
            continue
        try:
            calls[rival.name] = rival.make(workload)
        except Unsupported as reason:
            skipped[rival.name] = str(reason)
    return calls, skipped


def limits(case: Case, cell: str, mode: str, quick: bool) -> dict[str, float]:
    """Measure what the machine can do for the case just now."""
    seconds = 0.02 if quick else 0.2
    return {
        "gemm_peak": gemm_peak(DTYPES[case.dtype], seconds),
        "bandwidth": bandwidth(working_set(case, cell), seconds / 2),
    }


def compare(theirs: Samples, ours: Samples) -> dict[str, float]:
    """Relate two calls: the ratio of their medians, and percentiles of the ratios of the rounds."""
    ratios = [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]
    return {
        "median": Timing.of(theirs.seconds).median / Timing.of(ours.seconds).median,
        "p20": percentile(ratios, 20),
        "p80": percentile(ratios, 80),
    }


HEADER = (
    f"{'case':<12} {'cell':<4} {'mode':<9} {'dtype':<8} {'thr':>3}  {'library':<11} "
    f"{'p20':>9} {'median':>9} {'p80':>9}  {'memory':>10}  {'of floor':<12} fastrnn's gain"
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
        times = " ".join(f"{duration(result[key]):>9}" for key in ("p20", "median", "p80"))
        held = result["peak_bytes"]
        memory = "" if held is None else f"{held / 2**10:.0f} KiB"
        floor = f"{result['floor_share']:.0%} {row['bound']}"
        ratio = f"{row['ratios'][name]['median']:.2f}" if name in row["ratios"] else ""
        text.append(f"{head}  {name:<11} {times}  {memory:>10}  {floor:<12} {ratio}".rstrip())
        head = " " * len(head)
    if row["skipped"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in row["skipped"].items())
        text.append(f"{head}  skipped: {reasons}")
    return text


def duration(seconds: float) -> str:
    """Write a duration with three significant digits."""
    value, unit = (1e6 * seconds, "µs") if seconds < 1e-3 else (1e3 * seconds, "ms")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description="Time fastrnn against torch.nn and other libraries."
    )
    parser.add_argument("--case", nargs="+", default=["*"], help="ids; * and ? match (all)")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--base", metavar="REV", help="also time this git revision of fastrnn")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of each library in a row (1)"
    )
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
    if options.base:
        try:
            options.base = base.resolve(options.base)
        except ValueError as error:
            parser.error(f"--base: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for case in options.cases:
            print(f"{case.id:<12} {case.shape():<36} {case.reason}")
        return 0
    shared = environment()
    announce(shared, options.threads)
    with contextlib.ExitStack() as stack:
        rivals = list(RIVALS)
        if options.base:
            shared["base"] = options.base[:12]
            print(f"{BASE}: building {shared['base']}", flush=True)
            rivals.append(stack.enter_context(base.base_rival(options.base)))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        results = run(options, rivals, shared)
    red = [row for row in results if not row["parity"][FASTRNN]["ok"]]
    if red:
        print(f"{len(red)} of {len(results)} rows are red", file=sys.stderr)
    return 1 if red else 0


def run(options: argparse.Namespace, rivals: list[Rival], shared: dict[str, Any]) -> list[Row]:
    """Measure every row that was asked for, printing and writing each as soon as it is there."""
    print(HEADER)
    plan = [
        (threads, twin(case, dtype), cell, mode)
        for threads in options.threads
        for dtype in options.dtype
        for case in options.cases
        for cell in options.cell
        for mode in options.mode
    ]
    results: list[Row] = []
    for threads, case, cell, mode in tqdm(plan, unit="case", file=sys.stderr):
        torch.set_num_threads(threads)
        row = measure(case, cell, mode, options.quick, rivals, options.seconds)
        results.append(row | shared)
        tqdm.write("\n".join(lines(row)), file=sys.stdout)
        if options.json:  # after every row: an interrupted run keeps what it has
            rows.save(options.json, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
