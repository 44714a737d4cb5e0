"""Draws the speed-ups in a result file of bench.run, or prints them as Markdown tables.

    python -m bench.plot RESULTS.json --out PICTURE.png
    python -m bench.plot RESULTS.json --table

Both show how many times faster fastrnn is than torch.nn and than the best rival of each row, and
the geometric means.  Every row of the file appears, the lost ones (below 1) and the red ones too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import CELLS, MODES
from bench.rivals import FASTRNN, TORCH_NN
from bench.rows import Row, Setting, best_rival, geometric_mean, load, plural, ratio, settings
from bench.run import duration

Column = tuple[str, str]  # cell, mode

LOSS, RED = "#8e1b0e", "#d9d9d9"
SHORT = {TORCH_NN: "torch", "onnxruntime": "ORT", "openvino": "OV", "jax": "JAX"}
FULL_COLOUR = 4.0  # the ratio, or its inverse, from which on the colour no longer changes


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
    return f"{dtype}, {plural(threads, 'thread')}"


def columns_of(rows: list[Row]) -> list[Column]:
    present = {(row["cell"], row["mode"]) for row in rows}
    return [(cell, mode) for cell in CELLS for mode in MODES if (cell, mode) in present]


def select(rows: list[Row], setting: Setting) -> dict[tuple[str, str, str], Row]:
    """Return the rows of a setting by case, cell and mode."""
    return {
        (row["case"], row["cell"], row["mode"]): row
        for row in rows
        if (row["dtype"], row["threads"]) == setting
    }


def table(rows: list[Row]) -> str:
    """Lay out times and speed-ups: a Markdown table per dtype and number of threads."""
    parts = []
    for setting in settings(rows):
        chosen = select(rows, setting)
        shapes = {row["case"]: row["shape"] for row in chosen.values()}
        columns = columns_of(list(chosen.values()))
        header = ["case", "shape", *(f"{cell.upper()} {mode}" for cell, mode in columns)]
        text = [header, ["---", "---", *["---:"] * len(columns)]]
        for case, shape in shapes.items():
            entries = [entry(chosen.get((case, *column))) for column in columns]
            text.append([case, shape, *entries])
        text.append(["**geometric mean**", "", *(means(chosen, column) for column in columns)])
        parts.append(
            f"**{name_of(setting)}**: time of fastrnn; how many times faster than torch.nn / than "
            "the best rival, where that is another\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in text)
        )
    return "\n\n".join([*parts, source(rows)])


def entry(row: Row | None) -> str:
    if row is None:
        return ""
    if row["speedup"] is None:
        return "red"
    text = f"{duration(row['results'][FASTRNN]['median'])}, {row['speedup']:.2f}×"
    best = best_rival(row)
    if best in (None, TORCH_NN):
        return text
    return f"{text} / {ratio(row):.2f}× {SHORT.get(best or '', best)}"


def means(chosen: dict[tuple[str, str, str], Row], column: Column) -> str:
    """Write the geometric means over the cases: over torch.nn and over the best rival."""
    rows = [row for key, row in chosen.items() if key[1:] == column]
    pair = [geometric_mean(ratio(row, name) for row in rows) for name in (TORCH_NN, None)]
    return " / ".join("" if value is None else f"{value:.2f}×" for value in pair)


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw a panel per setting and mode: a line per case, per cell a column for each comparison."""
    from matplotlib.figure import Figure

    groups = settings(rows)
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in rows)]
    figure = Figure(
        figsize=(
            2.6 + (0.4 + 1.35 * len(cells)) * len(modes),
            len(groups) * (len(cases) + 4.5) / 3.4,
        ),
        layout="constrained",
    )
    figure.suptitle(
        "How many times faster fastrnn is than torch.nn, and than the best rival\n"
        "blue: faster; red: slower; grey: wrong numbers, not timed",
        fontsize=11,
    )
    figure.supxlabel(source(rows), fontsize=6, color="#555555", wrap=True)
    panels = figure.subplots(len(groups), len(modes), squeeze=False, sharex=True, sharey=True)
    shapes = {row["case"]: row["shape"] for row in rows}
    for setting, line in zip(groups, panels, strict=True):
        chosen = select(rows, setting)
        for mode, panel in zip(modes, line, strict=True):
            panel.set_title(f"{mode}, {name_of(setting)}", fontsize=10)
            draw_panel(panel, chosen, mode, cases, cells)
            panel.set_yticks(
                range(len(cases) + 1),
                [*(f"{case}\n{shapes[case]}" for case in cases), "geometric mean"],
                fontsize=5,
            )
    figure.savefig(path, dpi=150)


def draw_panel(
    panel: Any,
    chosen: dict[tuple[str, str, str], Row],
    mode: str,
    cases: list[str],
    cells: list[str],
) -> None:
    """Fill a panel: two columns per cell, a line per case, and one for the geometric means."""
    comparisons = [(cell, name) for cell in cells for name in (TORCH_NN, None)]
    panel.set_xlim(-0.5, len(comparisons) - 0.5)
    panel.set_ylim(len(cases) + 0.5, -0.5)
    for x, (cell, name) in enumerate(comparisons):
        column = [chosen.get((case, cell, mode)) for case in cases]
        for y, row in enumerate(column):
            if row is None:
                continue
            if row["speedup"] is None:
                tile(panel, x, y, RED, "red", LOSS)
                continue
            value, best = ratio(row, name), best_rival(row)
            under = "" if name else f"\n{SHORT.get(best or '', best)}"
            show(panel, x, y, value, under)
        mean = geometric_mean(ratio(row, name) for row in column if row is not None)
        show(panel, x, len(cases), mean, bold=True)
    panel.set_xticks(
        range(len(comparisons)),
        [f"{cell.upper()}\n{'torch.nn' if name else 'best rival'}" for cell, name in comparisons],
        fontsize=6,
    )
    for x in range(2, len(comparisons), 2):
        panel.axvline(x - 0.5, color="white", linewidth=3)
    panel.axhline(len(cases) - 0.5, color="black", linewidth=0.8)
    panel.tick_params(length=0, labelbottom=True)
    panel.spines[:].set_visible(False)


def show(
    panel: Any, x: int, y: int, value: float | None, under: str = "", bold: bool = False
) -> None:
    """Draw one ratio, with what it is a ratio to below it; losses are outlined as well."""
    if value is None:
        return
    lost = round(value, 2) < 1  # as printed
    text = f"{value:.2f}{under}" if value < 100 else f"{value:.0f}{under}"
    tile(panel, x, y, colour(value), text, LOSS if lost else "#222222", bold or lost)


def tile(panel: Any, x: int, y: int, face: Any, text: str, ink: str, bold: bool = False) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=face, linewidth=0))
    weight = "bold" if bold else "normal"
    panel.text(
        x, y, text, ha="center", va="center", fontsize=6, color=ink, weight=weight, linespacing=1.0
    )


def colour(value: float) -> tuple[float, float, float]:
    """Return white at 1, deeper blue above and deeper red below, by the logarithm."""
    depth = 0.15 + 0.6 * min(abs(math.log(value)) / math.log(FULL_COLOUR), 1)
    full = (0.26, 0.52, 0.80) if round(value, 2) >= 1 else (0.91, 0.45, 0.38)
    return tuple(1 - depth * (1 - part) for part in full)  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", help="a file written by bench.run --json")
    parser.add_argument("--out", metavar="FILE", help="draw into FILE (.png, .svg, .pdf)")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
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
