"""Draws what bench.sweep measured; every point appears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import CELLS, MODES
from bench.rivals import FASTRNN, TORCH_NN
from bench.rows import Row, plural
from bench.sweep_layers import HIDDEN_LIMIT, PACKED_LIMIT

COLOURS = {"lstm": "#1f4e8c", "gru": "#2a9d6f", "rnn": "#d9822b"}
LOSS = "#c0392b"


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw the points of one sweep into a file."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    timed = [row for row in rows if row["red"] is None]
    DRAW[rows[0]["sweep"]](figure, timed)
    first = rows[0]
    figure.supxlabel(
        f"{first['device']}, {plural(first['threads'], 'thread')}, torch "
        f"{first['versions']['torch']}, fastrnn {first['versions']['fastrnn']} "
        f"({first['kernels']}), commit {first['commit'] or 'unknown'}, {first['date'][:10]}"
        + ("" if len(timed) == len(rows) else f"; {len(rows) - len(timed)} points red, not timed"),
        fontsize=6,
        color="#555555",
    )
    figure.savefig(path, dpi=150)


def present(rows: Sequence[Row], key: str, order: Sequence[Any]) -> list[Any]:
    return [value for value in order if any(row[key] == value for row in rows)]


def draw_packed(figure: Any, rows: list[Row]) -> None:
    figure.set_size_inches(6, 4)
    panel = figure.subplots()
    for cell in present(rows, "cell", list(CELLS)):
        points = [row for row in rows if row["cell"] == cell]
        for name, style in ((FASTRNN, "o-"), (TORCH_NN, "x:")):
            panel.plot(
                [row["T"] for row in points],
                [row["ratio"][name] for row in points],
                style,
                color=COLOURS[cell],
                label=f"{cell.upper()}, {name}",
            )
    panel.axhline(PACKED_LIMIT, color=LOSS, linewidth=1, label=f"limit {PACKED_LIMIT}")
    panel.set(xscale="log", yscale="log", xlabel="T", ylabel="packed over padded")
    panel.set_title("Training: time per valid step, packed over padded", fontsize=10)
    panel.legend(fontsize=7)


def draw_hidden(figure: Any, rows: list[Row]) -> None:
    sizes = sorted({row["B"] for row in rows})
    columns = [(mode, unit) for mode in present(rows, "mode", MODES) for unit in UNITS]
    figure.set_size_inches(4.5 * len(columns), 3.2 * len(sizes) + 0.4)
    figure.suptitle(f"Ringed: above {HIDDEN_LIMIT} of the neighbours", fontsize=11)
    panels = figure.subplots(len(sizes) or 1, len(columns) or 1, squeeze=False)
    for B, line in zip(sizes, panels, strict=False):
        for (mode, unit), panel in zip(columns, line, strict=False):
            panel.set_title(f"{mode}, B={B}", fontsize=9)
            panel.set(yscale="log", xlabel="H", ylabel=unit)
            for cell in present(rows, "cell", list(CELLS)):
                points = [r for r in rows if (r["cell"], r["mode"], r["B"]) == (cell, mode, B)]
                high = [row for row in points if row["excess"] > HIDDEN_LIMIT]
                for found, style in (
                    (points, {"marker": ".", "ms": 2, "lw": 0.6, "label": cell}),
                    (high, {"marker": "o", "ms": 7, "mfc": "none", "lw": 0}),
                ):
                    values = [UNITS[unit](row) for row in found]
                    panel.plot([r["H"] for r in found], values, color=COLOURS[cell], **style)
    panels[0][-1].legend(fontsize=7)


UNITS: dict[str, Callable[[Row], float]] = {
    "µs per step": lambda row: 1e6 * row["median"] / row["T"],
    "ps per flop": lambda row: 1e12 * row["median"] / row["flops"],
}


def draw_lengths(figure: Any, rows: list[Row]) -> None:
    modes = present(rows, "mode", MODES)
    axes = present(rows, "axis", ("T", "B"))
    figure.set_size_inches(4.5 * len(modes), 3.4 * len(axes) + 0.4)
    figure.suptitle("Time of fastrnn, and the line through it", fontsize=11)
    panels = figure.subplots(len(axes) or 1, len(modes) or 1, squeeze=False)
    for axis, line in zip(axes, panels, strict=False):
        for mode, panel in zip(modes, line, strict=False):
            panel.set_title(f"{mode}, against {axis}", fontsize=9)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
            for cell in present(rows, "cell", list(CELLS)):
                points = [
                    r for r in rows if (r["cell"], r["mode"], r["axis"]) == (cell, mode, axis)
                ]
                sizes = [row[axis] for row in points]
                for key, style, label in (("median", "o", cell), ("linear", "-", None)):
                    values = [1e3 * row[key] for row in points]
                    panel.plot(sizes, values, style, ms=4, lw=1, color=COLOURS[cell], label=label)
    panels[0][0].legend(fontsize=7)


def draw_stream(figure: Any, rows: list[Row]) -> None:
    cells = present(rows, "cell", list(CELLS))
    figure.set_size_inches(4 * len(cells), 4.2)
    figure.suptitle("One step, B=1; dashed: reading the weights once", fontsize=11)
    for cell, panel in zip(
        cells, figure.subplots(1, len(cells) or 1, squeeze=False)[0], strict=False
    ):
        points = [row for row in rows if row["cell"] == cell]
        panel.set_title(cell.upper(), fontsize=9)
        panel.set(xscale="log", yscale="log", xlabel="H", ylabel="µs")
        panel.set_xticks([row["H"] for row in points], [str(row["H"]) for row in points])
        panel.minorticks_off()
        for name in dict.fromkeys(name for row in points for name in row["results"]):
            found = [row for row in points if name in row["results"]]
            sizes = [row["H"] for row in found]
            times, floors = (
                [1e6 * row["results"][name][key] for row in found] for key in ("median", "floor")
            )
            (curve,) = panel.plot(sizes, times, "o-", ms=4, lw=1, label=name)
            if name.startswith(FASTRNN):
                panel.plot(sizes, floors, "--", lw=1, color=curve.get_color())
        panel.legend(fontsize=6)


def draw_transforms(figure: Any, rows: list[Row]) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells = present(rows, "cell", list(CELLS))
    figure.set_size_inches(3 * len(kinds), 3.4)
    figure.suptitle("Times of fastrnn that others take", fontsize=11)
    for kind, panel in zip(
        kinds, figure.subplots(1, len(kinds) or 1, squeeze=False)[0], strict=False
    ):
        points = [row for row in rows if row["kind"] == kind]
        others = [name for name in points[0]["results"] if name != FASTRNN]
        for place, name in enumerate(others):
            found = [
                row["results"][name]["median"] / row["results"][FASTRNN]["median"] for row in points
            ]
            at = [i + 0.4 * place for i in range(len(points))]
            panel.bar(at, found, width=0.36, label=name)
        panel.axhline(1, color=LOSS, linewidth=1)
        panel.set_title(kind, fontsize=9)
        panel.set(yscale="log")
        panel.set_xticks(range(len(cells)), [cell.upper() for cell in cells])
        panel.legend(fontsize=6)


DRAW: dict[str, Callable[[Any, list[Row]], None]] = {
    "packed": draw_packed,
    "hidden": draw_hidden,
    "lengths": draw_lengths,
    "stream": draw_stream,
    "transforms": draw_transforms,
    "sequences": draw_transforms,
}
