"""The sweep of bench.sweep over what sequences need, in training: resets against none and against
rows that are split at the boundaries and padded, as it is done with torch.nn; rows of different
lengths against padded ones, per step that exists; recomputation against keeping everything.

Resets and lengths: T = B = 128, H = 256; a reset with a probability of 3 %, lengths even between 1
and T. Recomputation: T = 10,000, B = 8, H = 64; the memory is the growth of the process at its
peak, beside input, output and their gradients.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from bench.cases import CELLS
from bench.measure import Call, Timing, time_paired
from bench.rivals import FASTRNN, TORCH_NN
from bench.rows import Row
from bench.sweep_transforms import conclude as conclude_ratios
from bench.sweep_transforms import line as line_of_ratios
from bench.sweep_transforms import of_all
from fastrnn import parity

PADDED, KEPT = "fastrnn, no options", "fastrnn, kept"
SPLIT, PACKED = "torch.nn, split and padded", "torch.nn, packed"
MIB = 2**20


@dataclass(frozen=True)
class Problem:
    """A layer of both libraries, and sequences [T, B, H]."""

    fast: nn.Module
    plain: nn.Module
    input: Tensor
    resets: Tensor
    lengths: Tensor

    @staticmethod
    def make(cell: str, steps: int, rows: int, width: int) -> Problem:
        torch.manual_seed(0)
        plain = getattr(nn, CELLS[cell])(width, width)
        fast = getattr(fastrnn, CELLS[cell])(width, width)
        fast.load_state_dict(plain.state_dict())
        return Problem(
            fast, plain, torch.randn(steps, rows, width, requires_grad=True),
            torch.rand(steps, rows) < 0.03, torch.randint(1, steps + 1, (rows,)),
        )  # fmt: skip

    def double(self) -> Problem:
        plain = copy.deepcopy(self.plain).double()
        input = self.input.detach().double().requires_grad_()
        return Problem(self.fast, plain, input, self.resets, self.lengths)


Calls = dict[str, Call]


def trained(problem: Problem, layer: nn.Module, run: Callable[[], Tensor]) -> Call:
    """Forward and backward: the output and all gradients."""

    def call() -> list[Tensor]:
        output = run()
        leaves = [problem.input, *layer.parameters()]
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    return call


def by_split(problem: Problem) -> Tensor:
    """Each piece becomes a row of its own, all padded to the longest."""
    data, steps = problem.input, len(problem.input)
    begins = problem.resets.clone()
    begins[0] = True
    by_row = begins.T.reshape(-1)  # row after row
    piece = by_row.long().cumsum(0) - 1
    first = by_row.nonzero()[:, 0]
    within = torch.arange(by_row.numel()) - first[piece]
    padded = data.new_zeros(int(within.max()) + 1, len(first), data.shape[-1])
    padded = padded.index_put((within, piece), data.transpose(0, 1).flatten(0, 1))
    output = problem.plain(padded)[0]
    return output[within, piece].unflatten(0, (-1, steps)).transpose(0, 1)


def by_packing(problem: Problem) -> Tensor:
    packed = pack_padded_sequence(problem.input, problem.lengths, enforce_sorted=False)
    return pad_packed_sequence(problem.plain(packed)[0], total_length=len(problem.input))[0]


def resets(p: Problem) -> Calls:
    return {
        FASTRNN: trained(p, p.fast, lambda: p.fast(p.input, resets=p.resets)[0]),
        PADDED: trained(p, p.fast, lambda: p.fast(p.input)[0]),
        SPLIT: trained(p, p.plain, lambda: by_split(p)),
    }


def lengths(p: Problem) -> Calls:
    return {
        FASTRNN: trained(p, p.fast, lambda: p.fast(p.input, lengths=p.lengths)[0]),
        PADDED: trained(p, p.fast, lambda: p.fast(p.input)[0]),
        PACKED: trained(p, p.plain, lambda: by_packing(p)),
    }


def recompute(p: Problem) -> Calls:
    return {
        FASTRNN: trained(p, p.fast, lambda: p.fast(p.input, recompute=True)[0]),
        KEPT: trained(p, p.fast, lambda: p.fast(p.input)[0]),
        TORCH_NN: trained(p, p.plain, lambda: p.plain(p.input)[0]),
    }


@dataclass(frozen=True)
class Kind:
    calls: Callable[[Problem], Calls]
    oracle: str  # of torch.nn's calls, the one that computes the same
    sizes: tuple[int, int, int]  # T, B, H


KINDS = {
    "resets": Kind(resets, SPLIT, (128, 128, 256)),
    "lengths": Kind(lengths, PACKED, (128, 128, 256)),
    "recompute": Kind(recompute, TORCH_NN, (10000, 8, 64)),
}


def plan(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    return [partial(measure, cell, kind, quick) for cell in cells for kind in KINDS]


def measure(cell: str, name: str, quick: bool) -> Row:
    kind = KINDS[name]
    problem = Problem.make(cell, *kind.sizes)
    calls = kind.calls(problem)
    memory = {}
    if name == "recompute" and sys.platform == "linux":
        memory = {of: growth(cell, name, kind.sizes, of) for of in (FASTRNN, KEPT)}
    right = of_all(kind.calls(problem.double())[kind.oracle]())
    got, same = of_all(calls[FASTRNN]()), of_all(calls[kind.oracle]())
    worst = parity.worst(parity.compare(got, same, right))
    red = None if worst.ok else f"{cell} {name}: {worst}"
    row: Row = {"cell": cell, "kind": name, "red": red, "results": {}, "memory": memory}
    row["share"] = float(problem.lengths.sum()) / (kind.sizes[0] * kind.sizes[1])
    if red:
        return row
    for of, found in time_paired(calls, 0.05 if quick else 8.0, 3 if quick else 7).items():
        timing = Timing.of(found.seconds)
        row["results"][of] = {"p20": timing.p20, "median": timing.median, "p80": timing.p80}
    return row


def growth(cell: str, name: str, sizes: tuple[int, int, int], of: str) -> float:
    """Bytes by which a process grows at the peak of its first call, beside the output, its gradient
    and the input's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_growth, cell, name, sizes, of).result()


def _growth(cell: str, name: str, sizes: tuple[int, int, int], of: str) -> float:
    calls = KINDS[name].calls
    calls(Problem.make(cell, 64, *sizes[1:]))[of]()  # what a first call of any length needs
    problem = Problem.make(cell, *sizes)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    calls(problem)[of]()
    return resident("VmHWM") - before - 3 * problem.input.numel() * problem.input.element_size()


def resident(field: str) -> float:
    with open("/proc/self/status") as file:
        found = next(line for line in file if line.startswith(field))
    return 1024 * float(found.split()[1])


def line(row: Row) -> str:
    text = line_of_ratios(row)
    for name, grown in row["memory"].items():
        text += f"\n{name}: {grown / MIB:.1f} MiB beside its results"
    return text


def conclude(rows: list[Row]) -> list[str]:
    text: list[Any] = conclude_ratios(rows)
    for row in rows:
        if row["kind"] == "lengths" and row["results"]:
            times = {name: found["median"] for name, found in row["results"].items()}
            cost = times[FASTRNN] / times[PADDED] / row["share"]
            row["per_step"] = cost
            text.append(f"{row['cell']} lengths: {cost:.2f} of the padded time for each step")
    return text
