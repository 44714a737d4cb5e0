"""Random configurations against torch.nn, every output and every gradient by the rule.

    python tests/fuzz.py --n 10000 --seed 0 [--isa avx2] [--jobs 2]
    python tests/fuzz.py --only 1234 --isa avx2        # one configuration, every tensor printed

Configuration number i of seed s is configuration s + i, whatever n and jobs are. Exits with 1 if
any tensor is outside the rule of fastrnn.parity.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

import fastrnn
from cases import CELLS, DTYPES, Case, build, rows, steps
from compare import compare, engines, poisoned_memory, use_engine
from fastrnn.parity import NO_PROJECTIONS, Comparison


def random_case(seed: int) -> tuple[str, Case, torch.dtype]:
    """The configuration of `seed`: cell, case and dtype."""
    r = random.Random(seed)

    def size(small: int = 40, large: int = 150) -> int:
        kind = r.random()
        if kind < 0.15:
            return 1
        return r.randint(1, small) if kind < 0.95 else r.randint(small, large)

    cell, dtype = r.choice(list(CELLS)), r.choice(list(DTYPES.values()))
    H = size()
    if cell == "lstm_proj":
        H = max(H, 2)
    T, B = size(12, 60), size(12, 70)
    layout = r.choice(("dense", "dense", "packed", "packed-sorted", "unbatched"))
    lengths = None
    if layout.startswith("packed"):
        lengths = tuple(r.randint(1, T) for _ in range(B))
        if layout == "packed-sorted":
            lengths = tuple(sorted(lengths, reverse=True))
    layers = r.choice((1, 1, 2, 3))
    states = ("h_0", "c_0") if cell.startswith("lstm") else ("h_0",)
    names = ("input", *states, "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    frozen: tuple[str, ...] = ()
    if r.random() < 0.3:
        frozen = tuple(name for name in (*names, "weights") if r.random() < 0.4)
    return (
        cell,
        Case(
            f"seed{seed}", "random", T=T, B=B, I=size(), H=H,
            P=r.randint(1, H - 1) if cell == "lstm_proj" else 0,
            layers=layers, bidirectional=r.random() < 0.4, bias=r.random() < 0.8,
            batch_first=r.random() < 0.4,
            dropout=r.choice((0.0, 0.5, 0.75)) if layers > 1 else 0.0,
            training=r.random() < 0.8, lengths=lengths, unbatched=layout == "unbatched",
            hx=r.choice(("given", "given", "none", "expanded", "strided")),
            strided=r.random() < 0.2, frozen=frozen, grad=r.random() < 0.9,
            bias_scale=r.choice((1.0, 1.0, 1.0, 10.0)),
        ),
        dtype,
    )  # fmt: skip


def threads_of(seed: int) -> int:
    """Mostly one: threads cost more than they give at these sizes, and are slow to start."""
    return 2 if seed % 16 == 0 else 1


def run_seed(seed: int, names: Iterable[str]) -> dict[str, list[Comparison]]:
    """Compare every tensor of configuration `seed`, on each engine of `names`."""
    cell, case, dtype = random_case(seed)
    problem = build(cell, case, dtype, seed)
    torch.set_num_threads(1)
    torch_same, ref64 = problem.run(torch.nn), problem.run(torch.nn, torch.float64)
    torch.set_num_threads(threads_of(seed))
    result = {}
    for name in names:
        with use_engine(name):
            result[name] = compare(problem.run(fastrnn), torch_same, ref64)
    return result


def axes(seed: int) -> dict[str, str]:
    """What configuration `seed` exercises, for the counts at the end."""
    cell, case, dtype = random_case(seed)

    def bucket(size: int) -> str:
        return next(f"<= {top}" for top in (1, 8, 16, 40, 150) if size <= top)

    packed = case.lengths is not None
    decreasing = packed and list(case.lengths) == sorted(case.lengths, reverse=True)
    return {
        "cell": cell,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": str(case.layers),
        "directions": "2" if case.bidirectional else "1",
        "layout": "unbatched" if case.unbatched else "dense" if not packed
        else "packed sorted" if decreasing else "packed unsorted",
        "batch_first": str(case.batch_first),
        "bias": str(case.bias),
        "hx": case.hx,
        "dropout": str(case.dropout if case.training else 0.0),
        "mode": "no_grad" if not case.grad else "train" if case.training else "eval",
        "frozen": "some" if case.frozen else "none",
        "input": "strided" if case.strided else "contiguous",
        "T": bucket(steps(case)),
        "B": bucket(rows(case)),
        "I": bucket(case.I),
        "H": bucket(case.H),
        "threads": str(threads_of(seed)),
    }  # fmt: skip


def describe(seed: int) -> str:
    cell, case, dtype = random_case(seed)
    default = Case("", "")
    options = [
        f"{f.name}={getattr(case, f.name)!r}"
        for f in dataclasses.fields(case)
        if f.name not in ("id", "reason") and getattr(case, f.name) != getattr(default, f.name)
    ]
    return f"{cell} {str(dtype).removeprefix('torch.')} " + " ".join(options)


def worker(task: tuple[Sequence[int], Sequence[str]]) -> list[tuple[int, str, list[str]]]:
    """Run a range of seeds; what is returned are the mismatches: seed, engine, tensors."""
    seeds, names = task
    mismatches = []
    with poisoned_memory(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_PROJECTIONS, UserWarning)
        for seed in seeds:
            for name, comparisons in run_seed(seed, names).items():
                bad = [str(c) for c in comparisons if not c.ok]
                if bad:
                    mismatches.append((seed, name, bad))
    return mismatches


def show_progress(done: int, total: int, failed: int, start: float) -> None:
    width = 40
    filled = width * done // total
    left = (time.monotonic() - start) / done * (total - done)
    bar = "#" * filled + "." * (width - filled)
    print(
        f"\r[{bar}] {done}/{total}, {failed} mismatches, {left:.0f} s left ",
        end="\n" if done == total else "", file=sys.stderr, flush=True,
    )  # fmt: skip


def run_many(seeds: Sequence[int], names: Sequence[str], jobs: int) -> int:
    """Run all seeds and print the report; returns the number of mismatching configurations."""
    size = 25
    tasks = [(seeds[i : i + size], names) for i in range(0, len(seeds), size)]
    done, start, failed = 0, time.monotonic(), set()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for mismatches in pool.imap(worker, tasks):
            for seed, name, tensors in mismatches:
                failed.add(seed)
                isa = name.removeprefix("native-")
                print(f"\nMISMATCH  python tests/fuzz.py --only {seed} --isa {isa}")
                print(f"  {describe(seed)}")
                print("\n".join(f"  {tensor}" for tensor in tensors))
            done = min(done + size, len(seeds))
            show_progress(done, len(seeds), len(failed), start)
    counts: dict[str, Counter[str]] = {}
    for seed in seeds:
        for axis, value in axes(seed).items():
            counts.setdefault(axis, Counter())[value] += 1
    for axis, counter in counts.items():
        print(f"{axis:<12}" + ", ".join(f"{v}: {n}" for v, n in sorted(counter.items())))
    print(f"engines     {', '.join(names)}")
    print(f"{len(seeds)} configurations, {len(failed)} mismatches")
    return len(failed)


def run_one(seed: int, names: Sequence[str]) -> int:
    """Print every tensor of one configuration; returns how many are outside the rule."""
    print(f"{seed}: {describe(seed)}")
    failed = 0
    with poisoned_memory(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_PROJECTIONS, UserWarning)
        for name, comparisons in run_seed(seed, names).items():
            print(name)
            for c in comparisons:
                failed += not c.ok
                print(f"  {'ok      ' if c.ok else 'MISMATCH'} {c}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    isas = {name.removeprefix("native-"): name for name in engines()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10000, help="number of configurations")
    parser.add_argument("--seed", type=int, default=0, help="the first configuration")
    parser.add_argument("--only", type=int, metavar="SEED", help="this configuration alone")
    parser.add_argument(
        "--isa", choices=[*isas, "all"], default="all",
        help="instruction set of the native kernels, or the reference; default: each of them",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    names = list(isas.values()) if options.isa == "all" else [isas[options.isa]]
    if options.only is not None:
        return 1 if run_one(options.only, names) else 0
    seeds = range(options.seed, options.seed + options.n)
    return 1 if run_many(seeds, names, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
