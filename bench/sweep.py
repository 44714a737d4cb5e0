"""Follows one size at a time, where bench.run measures named cases.

    python -m bench.sweep packed    training of packed sequences per valid step, against padded
    python -m bench.sweep hidden    every H from 1 to 300: sizes that cost more than those around
    python -m bench.sweep lengths   T up to 10,000 and B up to 256: whether time grows in proportion
    python -m bench.sweep stream    one step at a time, against the floor and cells of other kinds
    python -m bench.sweep transforms   whole calls of a tiny module, ensembles, gradients of samples
    python -m bench.sweep sequences    resets, lengths and recomputation, in training

Each takes [--cell ...] [--threads N] [--json FILE] [--out PICTURE] [--quick].  As in bench.run,
fastrnn's results are checked before they are timed (a point that breaks the rule is red, and the
exit code 1), the calls that are compared take turns, and the file is written after every point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import sweep_layers, sweep_plot, sweep_sequences, sweep_stream, sweep_transforms
from bench.cases import CELLS
from bench.environment import announce, environment
from bench.measure import pinned
from bench.rows import Row, save


@dataclass(frozen=True)
class Sweep:
    plan: Callable[[Iterable[str], bool], list[partial[Row]]]  # of the cells; whether quickly
    line: Callable[[Row], str]  # a point as text
    conclude: Callable[[list[Row]], list[str]]  # after the last point: sets figures, says them


SWEEPS = {
    "packed": Sweep(
        sweep_layers.plan_packed, sweep_layers.line_packed, sweep_layers.conclude_packed
    ),
    "hidden": Sweep(
        sweep_layers.plan_hidden, sweep_layers.line_hidden, sweep_layers.conclude_hidden
    ),
    "lengths": Sweep(
        sweep_layers.plan_lengths, sweep_layers.line_lengths, sweep_layers.conclude_lengths
    ),
    "stream": Sweep(sweep_stream.plan, sweep_stream.line, sweep_stream.conclude),
    "transforms": Sweep(
        sweep_transforms.plan, sweep_transforms.line, sweep_transforms.conclude
    ),
    "sequences": Sweep(
        sweep_sequences.plan, sweep_sequences.line, sweep_sequences.conclude
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the points to FILE")
    parser.add_argument("--out", metavar="FILE", help="draw into FILE (.png, .svg, .pdf)")
    parser.add_argument("--quick", action="store_true", help="few points, few rounds")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads: must be at least 1")
    for file in (options.json, options.out):
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"no such folder: {Path(file).parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sweep = SWEEPS[options.sweep]
    shared = environment() | {"sweep": options.sweep, "threads": options.threads}
    announce(shared, [options.threads])
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    try:
        for point in tqdm(sweep.plan(options.cell, options.quick), unit="point", file=sys.stderr):
            with pinned(options.threads):
                row = point()
            rows.append(row | shared)
            tqdm.write(sweep.line(rows[-1]), file=sys.stdout)
            if options.json:  # after every point: an interrupted run keeps what it has
                save(options.json, rows)
        with pinned(options.threads):
            print("\n".join(["", *sweep.conclude(rows)]))
    finally:
        torch.set_num_threads(before)
    if options.json:
        save(options.json, rows)
    if options.out:
        sweep_plot.draw(rows, options.out)
    red = [row for row in rows if row["red"]]
    for row in red:
        print(f"red, not timed: {row['red']}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
