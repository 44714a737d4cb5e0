"""The cases the benchmarks run, and the workloads built from them.

A case is a shape with the reason it is measured.  Each is run with every cell, for inference and
for training.  Dimensions: T time, B batch, I input, H hidden, L layers, D directions, G gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}  # name -> class in torch.nn and fastrnn
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One shape.  I = H unless given; with lengths, the input is packed and T is the longest."""

    id: str
    reason: str
    T: int
    B: int
    H: int
    input_size: int | None = None
    layers: int = 1
    bidirectional: bool = False
    lengths: tuple[int, ...] | None = None
    dtype: str = "float32"

    @property
    def I(self) -> int:  # noqa: E743 - the dimension key
        return self.input_size or self.H

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def rows(self) -> int:
        """Time steps of all sequences together."""
        return sum(self.lengths) if self.lengths else self.T * self.B

    def shape(self) -> str:
        """Describe the shape in one line, without the dtype."""
        parts = [f"T={self.T}", f"B={self.B}"]
        if self.I != self.H:
            parts.append(f"I={self.I}")
        parts.append(f"H={self.H}")
        if self.layers > 1:
            parts.append(f"L={self.layers}")
        if self.bidirectional:
            parts.append("D=2")
        if self.lengths:
            parts.append(f"lengths {min(self.lengths)}-{max(self.lengths)}")
        return " ".join(parts)


def spread_lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Return evenly spread lengths, longest first."""
    return tuple(longest - (longest - shortest) * i // (count - 1) for i in range(count))


CASES = (
    Case("stream-64", "one step of a stream, small: the cost of a call", T=1, B=1, H=64),
    Case("stream-128", "one step of a stream", T=1, B=1, H=128),
    Case("stream-256", "one step of a stream", T=1, B=1, H=256),
    Case("stream-512", "one step of a stream, weights outside L2", T=1, B=1, H=512),
    Case("online-64", "one sequence, small: latency of a step", T=128, B=1, H=64),
    Case("online-512", "one sequence, large: bandwidth of the weights", T=64, B=1, H=512),
    Case("small-batch", "few rows: between bandwidth and arithmetic", T=128, B=8, H=128),
    Case("classifier", "28 x 28 images read row by row", T=28, B=64, H=128, input_size=28),
    Case("medium", "a common training shape", T=128, B=32, H=256),
    Case("large", "arithmetic only: a layer of a large model", T=64, B=64, H=512),
    Case("wide", "weights outside the caches", T=32, B=16, H=1024),
    Case("long", "many steps with little work each", T=1000, B=4, H=128),
    Case("odd", "no size is a multiple of a vector", T=37, B=5, H=77, input_size=19),
    Case(
        "packed",
        "sequences of different lengths",
        T=400,
        B=16,
        H=64,
        lengths=spread_lengths(16, 20, 400),
    ),
    Case(
        "stacked", "two layers, both directions", T=100, B=16, H=256, layers=2, bidirectional=True
    ),
)


def twin(case: Case, dtype: str) -> Case:
    """Return the same case in another dtype."""
    return replace(case, dtype=dtype)


@dataclass(frozen=True)
class Workload:
    """What every library is given: the same weights, the same input, the same cotangent."""

    case: Case
    cell: str
    mode: str
    module: nn.RNNBase  # torch.nn's
    input: Tensor | PackedSequence  # [T, B, I], or packed [rows, I]
    cotangent: Tensor  # of the output: [T, B, D*H], or packed [rows, D*H]


def build_workload(case: Case, cell: str, mode: str, seed: int = 0) -> Workload:
    """Draw weights, input and cotangent from the seed, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    module = getattr(nn, CELLS[cell])(
        case.I, case.H, num_layers=case.layers, bidirectional=case.bidirectional
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-(case.H**-0.5), case.H**-0.5, generator=generator)
    module.to(dtype).train(mode == "training")
    padded = torch.randn(case.T, case.B, case.I, generator=generator).to(dtype)
    input: Tensor | PackedSequence = padded
    if case.lengths:
        input = pack_padded_sequence(padded, torch.tensor(case.lengths))
    leading = (case.rows,) if case.lengths else (case.T, case.B)
    cotangent = torch.randn(*leading, case.D * case.H, generator=generator).to(dtype)
    return Workload(case, cell, mode, module, input, cotangent)


def flops(case: Case, cell: str, mode: str) -> int:
    """Count the flops of the matrix products; training takes three times as many."""
    inputs = case.I + (case.layers - 1) * case.D * case.H  # of all layers together
    per_row = 2 * GATES[cell] * case.H * (inputs + case.layers * case.H) * case.D
    return per_row * case.rows * (3 if mode == "training" else 1)


def bind(module: nn.Module, workload: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call that is timed: a module of torch.nn's interface on the workload.

    Inference: forward without gradients; returns output and final states.
    Training: forward, then the gradients of the input and of all parameters; returns these too.
    The optimizer is not part of it.
    """
    if workload.mode == "inference":
        source = workload.input

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _flat(*module(source))

        return infer

    source, leaf = _with_gradient(workload.input)
    leaves = [leaf, *module.parameters()]

    def train() -> tuple[Tensor, ...]:
        output, *states = _flat(*module(source))
        gradients = torch.autograd.grad(output, leaves, workload.cotangent)
        return (output.detach(), *(state.detach() for state in states), *gradients)

    return train


def _flat(
    output: Tensor | PackedSequence, state: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    states = state if isinstance(state, tuple) else (state,)
    return (output.data, *states) if isinstance(output, PackedSequence) else (output, *states)


def _with_gradient(
    input: Tensor | PackedSequence,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Return the input with a fresh leaf as its values, and that leaf."""
    if isinstance(input, PackedSequence):
        leaf = input.data.detach().clone().requires_grad_()
        return input._replace(data=leaf), leaf
    leaf = input.detach().clone().requires_grad_()
    return leaf, leaf
