"""Result files of bench.run: reading them, and the figures that are drawn from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.rivals import BASE, FASTRNN

Row = dict[str, Any]
Setting = tuple[str, int]  # dtype, threads

REQUIRED = (
    *("case", "shape", "sizes", "cell", "mode", "dtype", "threads"),
    *("results", "ratios", "speedup", "speedup_p20", "speedup_p80"),
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


def save(path: str | Path, rows: list[Row]) -> None:
    """Write a result file, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(path)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Return the (dtype, threads) of the rows, in order of appearance."""
    return list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))


def rivals_in(row: Row) -> list[str]:
    """Name the libraries timed beside fastrnn; an earlier fastrnn is not one of them."""
    return [name for name in row["ratios"] if name != BASE]


def best_rival(row: Row) -> str | None:
    """Name the fastest of them; None if nothing was timed."""
    names = rivals_in(row)
    return min(names, key=lambda name: row["results"][name]["median"]) if names else None


def ratio(row: Row, name: str | None = None) -> float | None:
    """Return how many times faster than that library fastrnn is; than the best rival without one.

    None if the two were not timed side by side.
    """
    name = name or best_rival(row)
    return row["ratios"][name]["median"] if name in row["ratios"] else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the values there are; None without any."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def name_of(row: Row) -> str:
    """Name a row in few words."""
    return (
        f"{row['case']} {row['cell']} {row['mode']} {row['dtype']} "
        f"{plural(row['threads'], 'thread')}"
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def share(row: Row, key: str = "gemm_share") -> float | None:
    """Return the share of the GEMM peak, or another figure, that fastrnn reached in the row."""
    result = row["results"].get(FASTRNN)
    return None if result is None else result[key]
