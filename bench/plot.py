"""Draws the speed-ups in a result file of bench.run, or prints them as a Markdown table.

    python -m bench.plot RESULTS.json --out PICTURE.png
    python -m bench.plot RESULTS.json --table

Every row of the file appears, the lost ones (below 1) and the red ones too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import CELLS, MODES
from bench.rivals import FASTRNN

Row = dict[str, Any]
Setting = tuple[str, int]  # dtype, threads

COLOURS = {"lstm": "#1f4e8c", "gru": "#2a9d6f", "rnn": "#d9822b"}
MARKERS = {"lstm": "o", "gru": "s", "rnn": "^"}
REQUIRED = (
    *("case", "shape", "cell", "mode", "dtype", "threads"),
    *("results", "speedup", "speedup_p20", "speedup_p80"),
    *("device", "versions", "kernels", "commit", "date", "load", "cores"),
)


def load(path: str | Path) -> list[Row]:
    """Read a result file; ValueError, naming the file, if it is not one."""
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of rows")
    for number, row in enumerate(rows):
        missing = [key for key in REQUIRED if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
    return rows


def settings(rows: list[Row]) -> list[Setting]:
    """Return the (dtype, threads) of the rows, in order of appearance."""
    return list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))


def source(rows: list[Row]) -> str:
    """Say in one line what the rows were measured on."""
    distinct = dict.fromkeys(
        f"{row['device']}, torch {row['versions']['torch']}, fastrnn {row['versions']['fastrnn']} "
        f"({row['kernels']}), commit {row['commit'] or 'unknown'}, {row['date'][:10]}, "
        f"load before {row['load']:.1f} on {row['cores']} cores"
        for row in rows
    )
    return "; ".join(distinct)


def name_of(setting: Setting) -> str:
    dtype, threads = setting
    return f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"


def table(rows: list[Row]) -> str:
    """Lay out fastrnn's time and its speed-up over torch.nn: a Markdown table per setting."""
    parts = []
    for setting in settings(rows):
        chosen = {
            (row["case"], row["cell"], row["mode"]): row
            for row in rows
            if (row["dtype"], row["threads"]) == setting
        }
        shapes = {row["case"]: row["shape"] for row in chosen.values()}
        columns = [
            (cell, mode)
            for cell in CELLS
            for mode in MODES
            if any(key[1:] == (cell, mode) for key in chosen)
        ]
        header = ["case", "shape", *(f"{cell.upper()} {mode}" for cell, mode in columns)]
        text = [header, ["---", "---", *["---:"] * len(columns)]]
        for case, shape in shapes.items():
            entries = [entry(chosen.get((case, *column))) for column in columns]
            text.append([case, shape, *entries])
        parts.append(
            f"**{name_of(setting)}**: time of fastrnn, and how many times faster than torch.nn\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in text)
        )
    return "\n\n".join([*parts, source(rows)])


def entry(row: Row | None) -> str:
    if row is None:
        return ""
    if row["speedup"] is None:
        return "red"
    return f"{duration(row['results'][FASTRNN]['median'])}, {row['speedup']:.2f}×"


def duration(seconds: float) -> str:
    """Write a duration with three significant digits."""
    value, unit = (1e6 * seconds, "µs") if seconds < 1e-3 else (1e3 * seconds, "ms")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw one panel per setting and mode: a line per case, a mark per cell, 1.0 marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups = settings(rows)
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    shapes = {row["case"]: row["shape"] for row in rows}
    figure = Figure(
        figsize=(2.6 + 4.4 * len(modes), len(groups) * (1.1 + 0.42 * len(cases)) + 0.7),
        layout="constrained",
    )
    figure.suptitle("Speed-up of fastrnn over torch.nn (log scale; right of 1 is faster)")
    figure.supxlabel(source(rows), fontsize=7, color="#555555")
    panels = figure.subplots(len(groups), len(modes), squeeze=False, sharex=True, sharey=True)
    keys = ("speedup", "speedup_p20", "speedup_p80")
    ratios = [row[key] for row in rows if row["speedup"] is not None for key in keys]
    low, high = min([0.8, *ratios]), max([1.25, *ratios])
    margin = 1.1 * (high / low) ** 0.15  # for the numbers
    steps = (1, 2, 5) if high / low < 100 else (1,)
    for setting, line in zip(groups, panels, strict=True):
        for mode, panel in zip(modes, line, strict=True):
            panel.set_title(f"{mode}, {name_of(setting)}", fontsize=10)
            panel.set_xscale("log")
            panel.set_xlim(low / margin, high * margin)
            panel.axvspan(low / margin, 1, color="#c0392b", alpha=0.08, linewidth=0)
            panel.axvline(1, color="#333333", linewidth=1)
            for row in rows:
                if (row["dtype"], row["threads"], row["mode"]) == (*setting, mode):
                    mark(panel, row, cases.index(row["case"]))
            panel.set_ylim(len(cases) - 0.5, -0.5)
            panel.set_yticks(range(len(cases)), [f"{c}\n{shapes[c]}" for c in cases], fontsize=7)
            panel.set_yticks([i + 0.5 for i in range(len(cases) - 1)], minor=True)
            panel.tick_params(axis="y", which="both", length=0)
            panel.grid(axis="y", which="minor", color="#dddddd", linewidth=0.6)
            panel.xaxis.set_major_locator(LogLocator(base=10, subs=steps))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.spines[["top", "right", "left"]].set_visible(False)
    for cell in (c for c in CELLS if any(row["cell"] == c for row in rows)):
        panels[0][-1].plot([], [], MARKERS[cell], color=COLOURS[cell], label=cell.upper())
    figure.legend(loc="outside upper right", ncols=len(CELLS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def mark(panel: Any, row: Row, position: int) -> None:
    """Draw one row of the file: its ratio, in red if it is a loss, or that it is red.

    The bar spans the 20th to the 80th percentile of the ratios of single rounds.
    """
    cell = row["cell"]
    y = position + 0.27 * (list(CELLS).index(cell) - 1)
    ratio = row["speedup"]
    if ratio is None:
        panel.text(1, y, f" {cell.upper()}: parity red, not timed", fontsize=6, va="center",
                   color="#c0392b")  # fmt: skip
        return
    panel.plot(ratio, y, MARKERS[cell], color=COLOURS[cell], markersize=4)
    spread = [row["speedup_p20"], row["speedup_p80"]]
    panel.plot(spread, [y, y], color=COLOURS[cell], linewidth=1, solid_capstyle="butt")
    lost = round(ratio, 2) < 1  # as printed
    panel.annotate(f"{ratio:.2f}", (min(ratio, *spread) if lost else max(ratio, *spread), y),
                   xytext=(-5 if lost else 5, 0), textcoords="offset points", fontsize=6,
                   va="center", ha="right" if lost else "left",
                   color="#c0392b" if lost else "#333333")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", help="a file written by bench.run --json")
    parser.add_argument("--out", metavar="FILE", help="draw into FILE (.png, .svg, .pdf)")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    if not options.out and not options.table:
        parser.error("nothing to do: give --out FILE, --table, or both")
    try:
        rows = load(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.table:
        print(table(rows))
    if options.out:
        draw(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
