"""The sweeps of bench.sweep over whole layers: packed, hidden, lengths.

A point is a row with the field `red`: None, or why its numbers are wrong and it was not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from bench.cases import MODES, Case, build_workload, flops, spread_lengths
from bench.check import check
from bench.measure import Call, Timing, time_paired
from bench.rivals import FASTRNN, TORCH_NN, make_fastrnn, make_torch_nn
from bench.rows import Row
from bench.run import duration

PACKED_T = (100, 400, 1000)
PACKED_LIMIT = 1.15  # of the time per valid step, packed over padded
HIDDEN = range(1, 301)
HIDDEN_B, HIDDEN_T = (1, 16), 16
HIDDEN_LIMIT = 1.5  # of the excess over the neighbours
NEIGHBOURS = 5  # sizes before a size that make its trend
RETRIES = 3  # of a point above the limit: a disturbance of the machine does not come three times
LENGTHS_T = (1, 10, 30, 100, 300, 1000, 3000, 10000)
LENGTHS_B = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS_AT = {"T": 100, "B": 4}  # the size that is not swept
SECONDS, ROUNDS = 1.0, 7  # of a comparison of layers
POINT_SECONDS, POINT_ROUNDS = 0.05, 5  # of one of many points

Calls = dict[str, Call]


def bind(case: Case, cell: str, mode: str) -> tuple[Calls, str | None]:
    """Return the calls of torch.nn and fastrnn, and why fastrnn's numbers are wrong if they are."""
    workload = build_workload(case, cell, mode)
    calls = {TORCH_NN: make_torch_nn(workload), FASTRNN: make_fastrnn(workload)}
    verdict = check(workload, calls)[FASTRNN]
    reason = f"{cell} {mode} {case.shape()}: {verdict['worst']}"
    return calls, None if verdict["ok"] else reason


def clock(calls: Mapping[str, Call], quick: bool, point: bool = False) -> dict[str, Timing]:
    seconds, rounds = (POINT_SECONDS, POINT_ROUNDS) if point else (SECONDS, ROUNDS)
    samples = time_paired(calls, seconds / 20 if quick else seconds, 3 if quick else rounds)
    return {name: Timing.of(sample.seconds) for name, sample in samples.items()}


# packed


def plan_packed(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    lengths = PACKED_T[:1] if quick else PACKED_T
    return [partial(measure_packed, cell, T, quick) for cell in cells for T in lengths]


def measure_packed(cell: str, T: int, quick: bool) -> Row:
    """Train on sequences of T/20 to T steps, packed, and on as many of T steps, padded."""
    padded = Case("padded", "padded", T=T, B=16, H=64)
    packed = Case("packed", "packed", T=T, B=16, H=64, lengths=spread_lengths(16, T // 20, T))
    calls: Calls = {}
    row: Row = {"cell": cell, "T": T, "B": 16, "H": 64, "red": None, "per_step": {}, "ratio": {}}
    for case in (packed, padded):
        both, red = bind(case, cell, "training")
        calls |= {f"{name} {case.id}": call for name, call in both.items()}
        row["red"] = row["red"] or red
    if row["red"]:
        return row
    timings = clock(calls, quick)
    for case in (packed, padded):
        for name in (TORCH_NN, FASTRNN):
            key = f"{name} {case.id}"
            row["per_step"][key] = timings[key].median / case.rows
    for name in (TORCH_NN, FASTRNN):
        row["ratio"][name] = row["per_step"][f"{name} packed"] / row["per_step"][f"{name} padded"]
    return row


def line_packed(row: Row) -> str:
    if row["red"]:
        return f"{row['cell']:<4} T={row['T']:<5} RED"
    text = []
    for name in (FASTRNN, TORCH_NN):
        packed, padded = (1e9 * row["per_step"][f"{name} {kind}"] for kind in ("packed", "padded"))
        ratio = row["ratio"][name]
        text.append(f"{name}: {packed:.0f} ns packed, {padded:.0f} ns padded, ratio {ratio:.2f}")
    return f"{row['cell']:<4} T={row['T']:<5} " + "   ".join(text)


def conclude_packed(rows: list[Row]) -> list[str]:
    worst = max(
        (row for row in rows if row["ratio"]), key=lambda r: r["ratio"][FASTRNN], default=None
    )
    if worst is None:
        return ["no point was timed"]
    ratio = worst["ratio"][FASTRNN]
    word = "holds" if ratio <= PACKED_LIMIT else "FAILS"
    where = f"{worst['cell']}, T={worst['T']}"
    return [f"{word}  packed at most {PACKED_LIMIT} of padded: highest {ratio:.2f} ({where})"]


# hidden


def plan_hidden(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    sizes = HIDDEN[::23] if quick else HIDDEN
    return [
        partial(measure_hidden, cell, mode, B, H, quick)
        for cell in cells
        for mode in MODES
        for B in HIDDEN_B
        for H in sizes
    ]


def measure_hidden(cell: str, mode: str, B: int, H: int, quick: bool) -> Row:
    case = Case("hidden", "hidden", T=HIDDEN_T, B=B, H=H)
    row: Row = {"cell": cell, "mode": mode, "T": case.T, "B": B, "H": H, "median": None}
    row |= {"flops": flops(case, cell, mode), "quick": quick}
    calls, row["red"] = bind(case, cell, mode)
    if row["red"] is None:
        row["median"] = clock({FASTRNN: calls[FASTRNN]}, quick, point=True)[FASTRNN].median
    return row


def line_hidden(row: Row) -> str:
    head = f"{row['cell']:<4} {row['mode']:<9} B={row['B']:<3} H={row['H']:<4}"
    if row["red"]:
        return f"{head} RED"
    per_step, per_flop = row["median"] / row["T"], row["median"] / row["flops"]
    return f"{head} {duration(per_step):>8} a step, {1e12 * per_flop:8.2f} ps a flop"


def excess(rows: Sequence[Row]) -> list[float]:
    """Say by how much every point is above its neighbours; rows of one curve, by rising H.

    The larger of two ratios: its time per flop over the median of those of the sizes just before
    it (a cliff), and its time over that of the fastest larger size (which would be the better
    choice, zeros added).
    """
    per_flop = [row["median"] / row["flops"] for row in rows]
    result, fastest = [], float("inf")
    for i in range(len(rows) - 1, -1, -1):
        fastest = min(fastest, rows[i]["median"])
        before = per_flop[max(i - NEIGHBOURS, 0) : i]
        cliff = per_flop[i] / statistics.median(before) if before else 1.0
        result.append(max(cliff, rows[i]["median"] / fastest))
    return result[::-1]


def conclude_hidden(rows: list[Row]) -> list[str]:
    """Set the excess of every point, after measuring again those above the limit."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["cell"], row["mode"], row["B"]

    text = []
    for (cell, mode, B), found in groupby((row for row in rows if row["red"] is None), key):
        points = list(found)
        for _ in range(RETRIES):
            for row, value in zip(points, excess(points), strict=True):
                if value > HIDDEN_LIMIT:
                    again = measure_hidden(cell, mode, B, row["H"], row["quick"])["median"]
                    row["median"] = min(row["median"], again)
        for row, value in zip(points, excess(points), strict=True):
            row["excess"] = value
        above = [row for row in points if row["excess"] > HIDDEN_LIMIT]
        worst = max(points, key=lambda row: row["excess"])
        text.append(
            f"{'FAILS' if above else 'holds'}  {cell} {mode} B={B}: no H above {HIDDEN_LIMIT} of "
            f"its neighbours: highest {worst['excess']:.2f} (H={worst['H']})"
            + (f", above: {', '.join(str(row['H']) for row in above)}" if above else "")
        )
    return text


# lengths


def plan_lengths(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    plan = []
    for cell in cells:
        for mode in MODES:
            for axis, sizes in (("T", LENGTHS_T), ("B", LENGTHS_B)):
                chosen = sizes[:5] if quick else sizes
                plan += [partial(measure_length, cell, mode, axis, size, quick) for size in chosen]
    return plan


def measure_length(cell: str, mode: str, axis: str, size: int, quick: bool) -> Row:
    sizes = {**LENGTHS_AT, axis: size}
    case = Case("length", "length", T=sizes["T"], B=sizes["B"], H=64)
    row: Row = {"cell": cell, "mode": mode, "axis": axis, "H": 64, **sizes, "median": None}
    calls, row["red"] = bind(case, cell, mode)
    if row["red"] is None:
        row["median"] = clock({FASTRNN: calls[FASTRNN]}, quick)[FASTRNN].median
    return row


def line_lengths(row: Row) -> str:
    head = f"{row['cell']:<4} {row['mode']:<9} T={row['T']:<6} B={row['B']:<4}"
    return f"{head} " + ("RED" if row["red"] else duration(row["median"]))


def linear_fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit seconds = start + slope * size, least squares of the relative errors, start >= 0."""
    w = [1 / s**2 for s in seconds]
    sw, sx, sy = sum(w), sum(map(_mul, w, sizes)), sum(map(_mul, w, seconds))
    sxx = sum(a * x * x for a, x in zip(w, sizes, strict=True))
    sxy = sum(a * x * y for a, x, y in zip(w, sizes, seconds, strict=True))
    determinant = sw * sxx - sx * sx
    start = (sxx * sy - sx * sxy) / determinant if determinant else 0.0
    if start < 0 or not determinant:
        return 0.0, sxy / sxx
    return start, (sw * sxy - sx * sy) / determinant


def _mul(a: float, b: float) -> float:
    return a * b


def conclude_lengths(rows: list[Row]) -> list[str]:
    """Set the time that the line through each curve has at every point, and say the worst ratio."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["cell"], row["mode"], row["axis"]

    text = []
    for (cell, mode, axis), found in groupby((row for row in rows if row["red"] is None), key):
        points = list(found)
        sizes = [row[axis] for row in points]
        start, slope = linear_fit(sizes, [row["median"] for row in points])
        for row in points:
            row["linear"] = start + slope * row[axis]
        worst = max(points, key=lambda row: row["median"] / row["linear"])
        text.append(
            f"{cell} {mode} against {axis}: {duration(start)} + {duration(slope)} each; "
            f"highest {worst['median'] / worst['linear']:.2f} of the line ({axis}={worst[axis]})"
        )
    return text
