"""The sweep of bench.sweep over what surrounds the kernels: a whole call of a tiny module,
ensembles under ``torch.func.vmap``, and gradients of each sample of a batch.

An ensemble is 16 layers of H = 64 over one sequence (B = 1, T = 100), under vmap in one call,
against Python loops over the layers of torch.nn and of fastrnn. Gradients of samples are those of a
batch of 64 such sequences, of the weights of one layer; the loops run forward and backward for
each. A whole call is that of a module with T = B = 1 and H = 8; with gradients recorded, forward
alone. A turn of each is a burst of calls, so that they find caches as calls in a row do: a call of
1 ms between others of torch.nn spends a third of its time on memory that those took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fastrnn
from bench.cases import CELLS
from bench.measure import Call, Timing, time_paired
from bench.rivals import FASTRNN, TORCH_NN
from bench.rows import Row
from fastrnn import parity

LOOP = f"{FASTRNN} loop"
MEMBERS, SAMPLES = 16, 64
T, H, TINY = 100, 64, 8
BURST = 50e-3  # seconds of a turn


@dataclass(frozen=True)
class Layers:
    """Layers with the same weights from both libraries, and the input [T, B, H] of all of them."""

    fast: list[nn.Module]
    plain: list[nn.Module]
    input: Tensor

    @staticmethod
    def make(cell: str, count: int, steps: int, rows: int, width: int) -> Layers:
        torch.manual_seed(0)
        plain = [getattr(nn, CELLS[cell])(width, width) for _ in range(count)]
        fast = [getattr(fastrnn, CELLS[cell])(width, width) for _ in range(count)]
        for one, other in zip(fast, plain, strict=True):
            one.load_state_dict(other.state_dict())
        return Layers(fast, plain, torch.randn(steps, rows, width))

    def double(self) -> Layers:
        plain = [type(m)(m.input_size, m.hidden_size).double() for m in self.plain]
        for one, other in zip(plain, self.plain, strict=True):
            one.load_state_dict(other.state_dict())
        return Layers([], plain, self.input.double())


Calls = dict[str, Call]


def whole_call(layers: Layers) -> Calls:
    def call(layer: nn.Module) -> Call:
        return lambda: [layer(layers.input)[0]]

    return {name: call(found[0]) for name, found in of_libraries(layers)}


def without_gradients(make: Callable[[Layers], Calls]) -> Callable[[Layers], Calls]:
    def made(layers: Layers) -> Calls:
        return {name: torch.no_grad()(call) for name, call in make(layers).items()}

    return made


def of_libraries(layers: Layers) -> list[tuple[str, list[nn.Module]]]:
    pairs = [(FASTRNN, layers.fast), (TORCH_NN, layers.plain)]
    return [(name, found) for name, found in pairs if found]


def ensemble(layers: Layers) -> Calls:
    def loop(found: list[nn.Module]) -> Call:
        return lambda: [m(layers.input)[0] for m in found]

    calls: Calls = {TORCH_NN: loop(layers.plain)}
    if layers.fast:
        base, (stacked, _) = layers.fast[0], stack_module_state(layers.fast)
        mapped = vmap(lambda p: functional_call(base, p, (layers.input,))[0])
        calls |= {FASTRNN: lambda: [mapped(stacked)], LOOP: loop(layers.fast)}
    return calls


def ensemble_training(layers: Layers) -> Calls:
    def loop(found: list[nn.Module]) -> Call:
        # of all members one kind after the other, as they lie when they are stacked
        by_kind = zip(*(m.parameters() for m in found), strict=True)
        weights = [p for own in by_kind for p in own]

        def run() -> list[Tensor]:
            loss = sum(m(layers.input)[0].square().sum() for m in found)
            return list(torch.autograd.grad(loss, weights))

        return run

    calls: Calls = {TORCH_NN: loop(layers.plain)}
    if layers.fast:
        base, (stacked, _) = layers.fast[0], stack_module_state(layers.fast)
        mapped = vmap(lambda p: functional_call(base, p, (layers.input,))[0])

        def run() -> list[Tensor]:
            loss = mapped(stacked).square().sum()
            return list(torch.autograd.grad(loss, list(stacked.values())))

        calls |= {FASTRNN: run, LOOP: loop(layers.fast)}
    return calls


def per_sample(layers: Layers) -> Calls:
    samples = layers.input.transpose(0, 1).unsqueeze(2).contiguous()  # [B, T, 1, H]

    def loop(layer: nn.Module) -> Call:
        weights = list(layer.parameters())

        def run() -> list[Tensor]:
            losses = (layer(x)[0].square().sum() for x in samples)
            found = [torch.autograd.grad(loss, weights) for loss in losses]
            return [torch.stack(g) for g in zip(*found, strict=True)]

        return run

    calls: Calls = {TORCH_NN: loop(layers.plain[0])}
    if layers.fast:
        layer = layers.fast[0]
        weights = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            result: Tensor = functional_call(layer, p, (x,))[0].square().sum()
            return result

        of_each = vmap(grad(loss), in_dims=(None, 0))
        calls |= {FASTRNN: lambda: list(of_each(weights, samples).values()), LOOP: loop(layer)}
    return calls


@dataclass(frozen=True)
class Kind:
    calls: Callable[[Layers], Calls]
    sizes: tuple[int, int, int, int]  # layers, steps, rows, width


KINDS = {
    "call": Kind(without_gradients(whole_call), (1, 1, 1, TINY)),
    "call, gradients recorded": Kind(whole_call, (1, 1, 1, TINY)),
    "ensemble, inference": Kind(without_gradients(ensemble), (MEMBERS, T, 1, H)),
    "ensemble, training": Kind(ensemble_training, (MEMBERS, T, 1, H)),
    "gradients of samples": Kind(per_sample, (1, T, SAMPLES, H)),
}


def plan(cells: Iterable[str], quick: bool) -> list[partial[Row]]:
    return [partial(measure, cell, kind, quick) for cell in cells for kind in KINDS]


def measure(cell: str, kind: str, quick: bool) -> Row:
    layers = Layers.make(cell, *KINDS[kind].sizes)
    calls = KINDS[kind].calls(layers)
    right = of_all(KINDS[kind].calls(layers.double())[TORCH_NN]())
    got = {name: of_all(call()) for name, call in calls.items()}
    worst = parity.worst(parity.compare(got[FASTRNN], got[TORCH_NN], right))
    red = None if worst.ok else f"{cell} {kind}: {worst}"
    row: Row = {"cell": cell, "kind": kind, "red": red, "results": {}}
    if red:
        return row
    samples = time_paired(
        calls, 0.05 if quick else 3.0, 3 if quick else 30, 1e-3 if quick else BURST
    )
    for name, found in samples.items():
        timing = Timing.of(found.seconds)
        row["results"][name] = {"p20": timing.p20, "median": timing.median, "p80": timing.p80}
    return row


def of_all(results: Any) -> dict[str, Tensor]:
    """The tensors of a call as one vector."""
    parts = [t.detach() for t in results]
    return {"results": torch.cat([t.flatten() for t in parts])}


def gain(row: Row, name: str) -> float:
    ratio: float = row["results"][name]["median"] / row["results"][FASTRNN]["median"]
    return ratio


def line(row: Row) -> str:
    head = f"{row['cell']:<4} {row['kind']:<25}"
    if row["red"]:
        return f"{head} RED"
    text = []
    for name, result in row["results"].items():
        text.append(f"{head} {name:<13} {1e6 * result['median']:10.1f} µs   {gain(row, name):6.2f}")
        head = " " * len(head)
    return "\n".join(text)


def conclude(rows: list[Row]) -> list[str]:
    """How many times the time of fastrnn every other way takes."""
    text = []
    for row in rows:
        if row["results"]:
            others = [n for n in row["results"] if n != FASTRNN]
            found = ", ".join(f"{gain(row, name):.2f} over {name}" for name in others)
            text.append(f"{row['cell']} {row['kind']}: {found}")
    return text or ["no point was timed"]
