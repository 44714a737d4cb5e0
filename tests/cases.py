"""The shapes and options the numerical tests run on, and the problem each one stands for.

A `Case` is a configuration without cell or dtype; `build` turns it into a `Problem`: parameters,
inputs, initial states and cotangents, drawn from a seed, the same values for every implementation.

Dimensions: T time, B batch, I input, H hidden, P projected, L layers, D directions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastrnn.parity import Sampler, run_layer

# Name -> (class in torch.nn and fastrnn, its extra arguments).
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {}),
    "gru": ("GRU", {}),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """One configuration. `id` names it in test reports, `reason` says why it is there."""

    id: str
    reason: str
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741 - the dimension key
    H: int = 8
    P: int = 0  # for lstm_proj; 0 means half of H
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = True
    lengths: tuple[int, ...] | None = None  # packed input, one length per row, in user order
    unbatched: bool = False
    hx: str = "given"  # or "none", "expanded" (one row for the whole batch), "strided"
    strided: bool = False  # input is every second element of a larger tensor
    frozen: tuple[str, ...] = ()  # tensors that do not require grad; "weights" for all parameters
    grad: bool = True  # False runs under no_grad
    bias_scale: float = 1.0  # large biases saturate the gates

    def supports(self, cell: str) -> bool:
        """A projection must be smaller than the hidden size, so H = 1 has none."""
        return cell != "lstm_proj" or self.H > 1

    def projection(self, cell: str) -> int:
        return (self.P or self.H // 2) if cell == "lstm_proj" else 0


def _varied(*cases: tuple[str, str, dict[str, Any]]) -> list[Case]:
    return [Case(id, reason, **fields) for id, reason, fields in cases]


CASES = _varied(
    ("base", "the smallest ordinary problem", {}),
    ("T1", "one step: no recurrence inside the call", {"T": 1}),
    ("B1", "one row: the matrix-vector path", {"B": 1}),
    ("B1-H64", "one row, whole vectors", {"B": 1, "H": 64}),
    ("T1-B1-I1-H1", "everything one: pure tail", {"T": 1, "B": 1, "I": 1, "H": 1}),
    ("H1", "narrower than every vector", {"H": 1}),
    ("H3", "narrower than every vector, more than one", {"H": 3}),
    ("H5", "one more than the narrowest vector", {"H": 5}),
    ("H17", "one more than an AVX-512 vector", {"H": 17}),
    ("H33", "one more than two vectors", {"H": 33}),
    ("H77", "many vectors and a long tail", {"H": 77}),
    ("H16", "exactly one AVX-512 vector", {"H": 16}),
    ("H64", "whole vectors only", {"H": 64}),
    ("H128-B16", "larger than one tile in both directions", {"T": 4, "B": 16, "H": 128}),
    ("H150-B9", "tail in rows and units of a larger problem", {"T": 4, "B": 9, "I": 31, "H": 150}),
    ("I1", "one input feature", {"I": 1}),
    ("I37", "more input features than hidden units", {"I": 37}),
    ("T300", "rounding carried through a long sequence", {"T": 300, "B": 2}),
    ("B7", "rows not a multiple of a row tile", {"B": 7, "H": 16}),
    ("B65", "one row more than a power of two", {"B": 65, "H": 5}),
    ("B0", "an empty batch", {"B": 0}),
    ("B0-layers", "an empty batch through layers and directions",
     {"B": 0, "layers": 2, "bidirectional": True}),
    ("unbatched", "two-dimensional input", {"unbatched": True}),
    ("unbatched-layers", "two-dimensional input, no states given, every option",
     {"unbatched": True, "layers": 2, "bidirectional": True, "hx": "none"}),
    ("batch-first", "rows first", {"batch_first": True}),
    ("no-bias", "no bias parameters", {"bias": False}),
    ("no-bias-layers", "no bias parameters, layers and directions",
     {"bias": False, "layers": 2, "bidirectional": True}),
    ("no-hx", "initial states left out", {"hx": "none"}),
    ("expanded-hx", "initial states expanded from one row: stride 0", {"hx": "expanded"}),
    ("strided-hx", "initial states not contiguous", {"hx": "strided"}),
    ("strided", "input not contiguous", {"strided": True}),
    ("strided-batch-first", "input not contiguous, rows first",
     {"strided": True, "batch_first": True}),
    ("bidirectional", "the reverse direction", {"bidirectional": True}),
    ("bidirectional-T1", "both directions see the same single step",
     {"bidirectional": True, "T": 1}),
    ("layers", "a stack", {"layers": 3}),
    ("P1", "projection to one feature", {"P": 1}),
    ("P7", "projection that is not a multiple of a vector", {"P": 7, "H": 33}),
    ("all", "layers, directions, rows first, odd sizes",
     {"layers": 2, "bidirectional": True, "batch_first": True, "T": 6, "B": 5, "I": 9, "H": 19}),
    ("saturated", "gates far into saturation", {"bias_scale": 30.0}),
    ("packed-equal", "packed, all lengths equal", {"lengths": (5, 5, 5)}),
    ("packed-sorted", "packed, decreasing lengths", {"lengths": (6, 4, 4, 1)}),
    ("packed-unsorted", "packed, user order differs from packed order",
     {"lengths": (2, 6, 1, 4, 6)}),
    ("packed-wide", "packed, very different lengths", {"lengths": (1, 80, 2, 1), "H": 17}),
    ("packed-one", "packed, a single row", {"lengths": (4,)}),
    ("packed-T1", "packed, a single step", {"lengths": (1, 1, 1)}),
    ("packed-no-hx", "packed, no initial states", {"lengths": (2, 6, 1, 4), "hx": "none"}),
    ("packed-expanded-hx", "packed, initial states expanded and permuted",
     {"lengths": (2, 6, 1, 4), "hx": "expanded"}),
    ("packed-all", "packed with layers, directions, rows first, odd sizes",
     {"lengths": (3, 7, 1, 7, 2), "layers": 2, "bidirectional": True, "batch_first": True,
      "I": 9, "H": 19}),
    ("frozen-weights", "gradients of the input and states only", {"frozen": ("weights",)}),
    ("frozen-input", "gradients of the parameters and states only", {"frozen": ("input",)}),
    ("frozen-states", "gradients of the parameters and input only", {"frozen": ("h_0", "c_0")}),
    ("only-h0", "gradient of one initial state only", {"frozen": ("weights", "input", "c_0")}),
    ("frozen-hh", "one weight frozen, bias of the other kept",
     {"frozen": ("weight_hh_l0", "bias_ih_l0"), "layers": 2}),
    ("frozen-ih", "the other weight frozen",
     {"frozen": ("weight_ih_l0", "bias_hh_l0", "weight_hr_l0"), "layers": 2}),
    ("eval", "evaluation mode still has a backward pass", {"training": False, "layers": 2}),
    ("no-grad", "no graph is recorded", {"grad": False, "layers": 2}),
    ("no-grad-square", "results shaped as an input that is not contiguous",
     {"grad": False, "batch_first": True, "I": 8}),
    ("no-grad-strided", "input and states that are not contiguous",
     {"grad": False, "strided": True, "hx": "strided", "I": 8}),
    ("no-grad-expanded", "states that are one row", {"grad": False, "hx": "expanded", "I": 8}),
)  # fmt: skip


@dataclass
class Problem:
    """The values of one case for one cell, exactly representable in `dtype`, held in float64."""

    cell: str
    case: Case
    dtype: torch.dtype
    seed: int
    values: dict[str, Tensor] = field(repr=False)  # parameters, input, h_0, c_0
    cotangents: dict[str, Tensor] = field(repr=False)

    def make(self, namespace: Any, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The layer of `namespace` (torch.nn or fastrnn) holding this problem's parameters."""
        module = make_layer(namespace, self.cell, self.case, dtype or self.dtype)
        module.load_state_dict({name: self.values[name] for name in module.state_dict()})
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.wants_grad(name))
        return module.train(self.case.training)

    def wants_grad(self, name: str) -> bool:
        if name in self.case.frozen or not self.case.grad:
            return False
        return name in ("input", "h_0", "c_0") or "weights" not in self.case.frozen

    def arguments(
        self, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> tuple[Tensor | PackedSequence, Any, dict[str, Tensor]]:
        """Fresh input and initial states, and the leaf tensors they are made from."""
        case = self.case
        leaves: dict[str, Tensor] = {}
        for name in ("input", "h_0", "c_0"):
            if name in self.values:
                leaf = self.values[name].to(device, dtype or self.dtype, copy=True)
                leaves[name] = leaf.requires_grad_(self.wants_grad(name))
        input: Any = leaves["input"][..., ::2] if case.strided else leaves["input"]
        if case.lengths is not None:
            decreasing = list(case.lengths) == sorted(case.lengths, reverse=True)
            input = pack_padded_sequence(
                input, torch.tensor(case.lengths), case.batch_first, enforce_sorted=decreasing
            )
        states = [leaves[name] for name in ("h_0", "c_0") if name in leaves]
        if case.hx == "expanded" and not case.unbatched:
            states = [state.expand(-1, rows(case), -1) for state in states]
        elif case.hx == "strided":
            states = [state.transpose(-1, -2) for state in states]
        hx = None if not states else tuple(states) if len(states) == 2 else states[0]
        return input, hx, leaves

    def run(
        self, namespace: Any, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Outputs, final states and gradients of `namespace`'s layer, computed in `dtype`."""
        module = self.make(namespace, dtype).to(device)
        input, hx, leaves = self.arguments(dtype, device)
        torch.manual_seed(self.seed)  # the dropout masks
        with torch.set_grad_enabled(self.case.grad):
            return run_layer(module, input, hx, self.cotangents if self.case.grad else None, leaves)


def rows(case: Case) -> int:
    return len(case.lengths) if case.lengths is not None else case.B


def steps(case: Case) -> int:
    return max(case.lengths) if case.lengths is not None else case.T


def make_layer(namespace: Any, cell: str, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    name, extra = CELLS[cell]
    if cell == "lstm_proj":
        extra = {"proj_size": case.projection(cell)}
    layer: torch.nn.Module = getattr(namespace, name)(
        case.I, case.H, num_layers=case.layers, bias=case.bias, batch_first=case.batch_first,
        dropout=case.dropout, bidirectional=case.bidirectional, dtype=dtype, **extra,
    )  # fmt: skip
    return layer


def on_integers(cell: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether rounding would decide ReLUs (see Sampler): often in the narrow dtypes, and about once
    in ten million pre-activations in float32, so that only small problems do without integers."""
    if cell != "rnn_relu":
        return False
    directions = 2 if case.bidirectional else 1
    units = steps(case) * rows(case) * case.H * case.layers * directions
    return units > 2000 or dtype in (torch.bfloat16, torch.float16)


def build(cell: str, case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw the values of `case` from `seed`, each exactly representable in `dtype`."""
    sampler = Sampler(seed, dtype, on_integers(cell, case, dtype))
    T, B = steps(case), rows(case)
    D = 2 if case.bidirectional else 1
    HP = case.projection(cell) or case.H  # features of h

    def sequence(features: int) -> tuple[int, ...]:
        if case.unbatched:
            return (T, features)
        return (B, T, features) if case.batch_first else (T, B, features)

    def state(features: int, batch: int = B) -> tuple[int, ...]:
        lead = case.layers * D
        return (lead, features) if case.unbatched else (lead, batch, features)

    def state_leaf(features: int) -> tuple[int, ...]:
        if case.hx == "strided":
            *lead, last, features = state(features)
            return (*lead, features, last)
        return state(features, 1 if case.hx == "expanded" else B)

    states = {"h": HP, "c": case.H} if cell.startswith("lstm") else {"h": HP}
    layer = make_layer(torch.nn, cell, case, torch.float64)
    values = {
        name: sampler.parameter(value.shape, case.H) for name, value in layer.state_dict().items()
    }
    for name in values:
        if name.startswith("bias"):
            values[name] = (values[name] * case.bias_scale).to(dtype).double()
    values["input"] = sampler.data(sequence(case.I * (2 if case.strided else 1)))
    if case.hx != "none":
        for name, features in states.items():
            values[f"{name}_0"] = sampler.data(state_leaf(features))
    output = sequence(D * HP) if case.lengths is None else (sum(case.lengths), D * HP)
    cotangents = {"output": sampler.cotangent(output, T * B)}
    for name, features in states.items():
        cotangents[f"{name}_n"] = sampler.cotangent(state(features), T * B)
    return Problem(cell, case, dtype, seed, values, cotangents)


def expected(
    cell: str, case: Case, dtype: torch.dtype, device: str
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    """The problem, torch.nn's results in `dtype` on the device and in float64; computed once."""
    return _expected(cell, case, dtype, device, torch.backends.cudnn.allow_tf32)


@functools.cache
def _expected(
    cell: str, case: Case, dtype: torch.dtype, device: str, tf32: bool
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    problem = build(cell, case, dtype)
    try:
        same = problem.run(torch.nn, device=device)
    except RuntimeError:  # cuDNN has no backward in evaluation, and wants contiguous states
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=tf32):
            same = problem.run(torch.nn, device=device)
    return problem, same, problem.run(torch.nn, torch.float64)
