"""Says whether the rows of a result file of bench.run meet what fastrnn is meant to reach.

    python -m bench.criteria RESULTS.json

Every criterion is judged on all rows it is about, on each number of threads by itself, and printed
with the figure, the worst rows and how many rows there were.  Exit code 1 if one fails.  A rival
that was absent when the file was written takes no part, which is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.rivals import FASTRNN, RIVALS, TORCH_NN
from bench.rows import Row, best_rival, geometric_mean, load, name_of, plural, ratio, share

TRAINING_MEANS = {"lstm": 1.3, "gru": 3.0, "rnn": 2.5}  # float32, over torch.nn
BFLOAT16_MEANS = {"training": 2.0, "inference": 1.5}  # over torch.nn, every cell
NO_LOSS = 0.97  # a tie, with the noise of a measurement
BIG_BATCH, BIG_BATCH_SHARE = 32, 0.85  # from this B on, this share of the GEMM peak
SHOWN = 5  # of the rows that fail a criterion

Figure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Verdict:
    """One criterion on the rows it is about; ok is None if there are none."""

    text: str
    ok: bool | None
    figure: str
    failing: tuple[str, ...] = ()  # rows below the limit, with their figure, the worst first


def over_torch(row: Row) -> float | None:
    return ratio(row, TORCH_NN)


def over_best(row: Row) -> float | None:
    return ratio(row)


def memory(row: Row) -> float | None:
    """Return torch.nn's peak memory over fastrnn's; at least 1 is wanted."""
    if not row["results"]:
        return None
    ours, theirs = (row["results"][name]["peak_bytes"] for name in (FASTRNN, TORCH_NN))
    return theirs / ours if ours else float("inf")


def every(text: str, rows: Iterable[Row], figure: Figure, limit: float) -> Verdict:
    """Judge that the figure of every row is at least the limit; a row without one fails."""
    # A row that is red has no figure: it counts as the worst.
    figures = [(0.0 if (value := figure(row)) is None else value, row) for row in rows]
    if not figures:
        return Verdict(text, None, "no rows")
    figures.sort(key=lambda pair: pair[0])
    failing = [(value, row) for value, row in figures if value < limit]
    worst, row = figures[0]
    return Verdict(
        text,
        not failing,
        f"lowest {worst:.2f} ({describe(row)}), {len(failing)} of {len(figures)} rows fail",
        tuple(f"{value:.2f}  {describe(row)}" for value, row in failing),
    )


def fraction(text: str, rows: Iterable[Row], figure: Figure, limit: float, least: float) -> Verdict:
    """Judge that the figure is above the limit in at least this fraction of the rows."""
    values = [figure(row) for row in rows]
    if not values:
        return Verdict(text, None, "no rows")
    above = sum(value is not None and value > limit for value in values)
    reached = f"{above} of {len(values)} rows ({above / len(values):.0%})"
    return Verdict(text, above >= least * len(values), reached)


def mean(text: str, rows: Iterable[Row], figure: Figure, limit: float) -> Verdict:
    """Judge the geometric mean; it fails if a row has no figure."""
    values = [figure(row) for row in rows]
    result = geometric_mean(values)
    if result is None:
        return Verdict(text, False if values else None, "no figures" if values else "no rows")
    missing = sum(value is None for value in values)
    without = f", {missing} without a figure" if missing else ""
    return Verdict(
        text,
        result >= limit and not missing,
        f"{result:.2f} over {plural(len(values), 'row')}{without}",
    )


def describe(row: Row) -> str:
    return f"{name_of(row)}, best rival {best_rival(row) or 'none: red'}"


def judge(rows: list[Row]) -> list[Verdict]:
    """Judge every criterion on rows of one number of threads."""
    floats = [row for row in rows if row["dtype"] == "float32"]
    inference, training = ([r for r in floats if r["mode"] == m] for m in ("inference", "training"))
    verdicts = [
        every("fp32 inference: best rival, every case >= 0.97", inference, over_best, NO_LOSS),
        fraction("fp32 inference: best rival, > 1 in 3 of 4", inference, over_best, 1.0, 0.75),
        mean("fp32 inference: torch.nn, mean >= 2.5", inference, over_torch, 2.5),
        mean("fp32 inference: best rival, mean >= 1.15", inference, over_best, 1.15),
        every("fp32 training: best rival, every case >= 0.97", training, over_best, NO_LOSS),
    ]
    for cell, limit in TRAINING_MEANS.items():
        of_cell = [row for row in training if row["cell"] == cell]
        text = f"fp32 training: {cell.upper()} over torch.nn, mean >= {limit}"
        verdicts.append(mean(text, of_cell, over_torch, limit))
    big = [r for r in training if r["cell"] != "lstm" and r["sizes"]["B"] >= BIG_BATCH]
    text = f"fp32 training: GRU, RNN from B={BIG_BATCH}, share of the GEMM peak >= 0.85"
    verdicts.append(every(text, big, share, BIG_BATCH_SHARE))
    halves = [row for row in rows if row["dtype"] == "bfloat16"]
    for mode, limit in BFLOAT16_MEANS.items():
        for cell in TRAINING_MEANS:
            chosen = [row for row in halves if (row["cell"], row["mode"]) == (cell, mode)]
            text = f"bf16 {mode}: {cell.upper()} over torch.nn, mean >= {limit}"
            verdicts.append(mean(text, chosen, over_torch, limit))
    verdicts.append(every("bf16: torch.nn, every case >= 1", halves, over_torch, 1.0))
    verdicts.append(every("peak memory at most torch.nn's, every row", rows, memory, 1.0))
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.criteria", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", help="a file written by bench.run --json")
    parser.add_argument("--all", action="store_true", help="print every failing row, not the worst")
    options = parser.parse_args(arguments)
    try:
        rows = load(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    timed = {name for row in rows for name in row["results"]}
    print(f"libraries in this file: {', '.join(sorted(timed)) or 'none'}")
    for rival in RIVALS:
        if rival.name not in timed:
            print(f"{rival.name}: absent, not compared with")
    failed = 0
    for threads in sorted({row["threads"] for row in rows}):
        print(f"\n{plural(threads, 'thread')}")
        for verdict in judge([row for row in rows if row["threads"] == threads]):
            word = {True: "holds", False: "FAILS", None: "?"}[verdict.ok]
            failed += verdict.ok is False
            print(f"  {word:<6} {verdict.text}: {verdict.figure}")
            for line in verdict.failing[: None if options.all else SHOWN]:
                print(f"           {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
