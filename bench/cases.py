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


class Unsupported(Exception):
    """A library has no way to run a workload; says why."""


@dataclass(frozen=True)
class Case:
    """One shape.  I = H unless given; with lengths, the input is packed and T is the longest.

    A carried case is given its initial state, as the step of a stream is; the others start at zero.
    """

    id: str
    reason: str
    T: int
    B: int
    H: int
    input_size: int | None = None
    layers: int = 1
    bidirectional: bool = False
    lengths: tuple[int, ...] | None = None
    carried: bool = False
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
        if self.carried:
            parts.append("state given")
        return " ".join(parts)


def spread_lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Return evenly spread lengths, longest first."""
    return tuple(longest - (longest - shortest) * i // (count - 1) for i in range(count))


CASES = (
    Case("stream-64", "a step of a stream, small: cost of a call", T=1, B=1, H=64, carried=True),
    Case("stream-128", "a step of a stream", T=1, B=1, H=128, carried=True),
    Case("stream-256", "a step of a stream", T=1, B=1, H=256, carried=True),
    Case("stream-512", "a step of a stream, weights outside L2", T=1, B=1, H=512, carried=True),
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
    """What every library is given: the same weights, input, initial state and cotangent."""

    case: Case
    cell: str
    mode: str
    module: nn.RNNBase  # torch.nn's
    input: Tensor | PackedSequence  # [T, B, I], or packed [rows, I]
    state: Tensor | tuple[Tensor, ...] | None  # [L*D, B, H], of a carried case; an LSTM's has two
    cotangent: Tensor  # of the output: [T, B, D*H], or packed [rows, D*H]


def build_workload(case: Case, cell: str, mode: str, seed: int = 0) -> Workload:
    """Draw weights, input, cotangent and state from the seed, on the CPU."""
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
    state: Tensor | tuple[Tensor, ...] | None = None
    if case.carried:
        sizes = (case.layers * case.D, case.B, case.H)
        h0, c0 = (torch.rand(sizes, generator=generator).sub(0.5).to(dtype) for _ in range(2))
        state = (h0, c0) if cell == "lstm" else h0
    return Workload(case, cell, mode, module, input, state, cotangent)


def flops(case: Case, cell: str, mode: str) -> int:
    """Count the flops of the matrix products; training takes three times as many."""
    inputs = case.I + (case.layers - 1) * case.D * case.H  # of all layers together
    per_row = 2 * GATES[cell] * case.H * (inputs + case.layers * case.H) * case.D
    return per_row * case.rows * (3 if mode == "training" else 1)


def weight_bytes(case: Case, cell: str) -> tuple[int, int]:
    """Count the bytes of the input and of the recurrent weights, all layers and directions."""
    inputs = case.I + (case.layers - 1) * case.D * case.H  # of all layers together
    per_unit = GATES[cell] * case.H * case.D * DTYPES[case.dtype].itemsize
    return per_unit * inputs, per_unit * case.layers * case.H


def traffic(case: Case, cell: str, mode: str) -> int:
    """Count the bytes of weights that have to be moved, however little the batch computes on them.

    Forward: W_ih once, W_hh once per step, except a first step whose state is zero.  Training,
    besides: W_ih once for the gradient of the input, W_hh once per step except the last, and the
    gradients of both, written once.
    """
    input, recurrent = weight_bytes(case, cell)
    total = input + recurrent * (case.T if case.carried else case.T - 1)
    if mode == "training":
        total += input + recurrent * (case.T - 1) + input + recurrent
    return total


def working_set(case: Case, cell: str) -> int:
    """Count the bytes read over and over: W_hh of one layer and direction; all of one step."""
    input, recurrent = weight_bytes(case, cell)
    return input + recurrent if case.T == 1 else recurrent // (case.layers * case.D)


def bind(module: nn.Module, workload: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call that is timed: a module of torch.nn's interface on the workload.

    Inference: forward without gradients; returns output and final states.
    Training: forward, then the gradients of the input and of all parameters; returns these too.
    The optimizer is not part of it, nor is the gradient of a state that was carried here.
    """
    if workload.mode == "inference":
        source = workload.input

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _flat(*module(source, workload.state))

        return infer

    source, leaf = _with_gradient(workload.input)
    leaves = [leaf, *module.parameters()]

    def train() -> tuple[Tensor, ...]:
        output, *states = _flat(*module(source, workload.state))
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
