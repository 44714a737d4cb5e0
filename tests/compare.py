"""Comparing results with torch.nn in tests, and choosing what computes them.

The tolerance rule itself stands in `fastrnn.parity`; here it becomes an assertion.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fastrnn
from fastrnn import _backend, _ops
from fastrnn.parity import compare, error, run_layer, with_gradients

__all__ = [
    "check",
    "check_identical",
    "compare",
    "engines",
    "error",
    "poisoned_memory",
    "run_cell",
    "run_layer",
    "use_engine",
    "with_gradients",
]


def check(
    got: Mapping[str, Tensor], torch_same: Mapping[str, Tensor], ref64: Mapping[str, Tensor]
) -> None:
    """Assert that every tensor of `got` obeys the rule; the message lists those that do not."""
    failures = [str(c) for c in compare(got, torch_same, ref64) if not c.ok]
    assert not failures, "\n" + "\n".join(failures)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def check_identical(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that both hold the same tensors, bit for bit."""
    assert list(got) == list(expected)
    different = [
        name
        for name in got
        if not torch.equal(bits(got[name]), bits(expected[name]))
    ]
    assert not different, f"not bit-identical: {different}"


def engines() -> list[str]:
    """Everything that can compute a layer on this CPU: "native-" + instruction set, "reference"."""
    names = ["reference"]
    if _backend.backends()["native"] is None:
        names += [f"native-{isa}" for isa in importlib.import_module("fastrnn._C").cpu_isas()]
    return names


@contextlib.contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Compute with one of `engines()` inside the block."""
    backend, _, isa = name.partition("-")
    with fastrnn.use_backend(backend):
        if not isa:
            yield
            return
        native = importlib.import_module("fastrnn._C")
        before = native.cpu_isa()
        native.set_cpu_isa(isa)
        try:
            yield
        finally:
            native.set_cpu_isa(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block every uninitialised tensor starts as NaN (integers as their maximum).

    An element that an operator forgets to write, or reads before it is written, then shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native = None if _ops.native_error else importlib.import_module("fastrnn._C")
    if native:
        native.poison(True)
    try:
        yield
    finally:
        if native:
            native.poison(False)
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_cell(
    cell: torch.nn.Module, input: Tensor, hx: Any, cotangents: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """`run_layer` for RNNCell, LSTMCell and GRUCell: "h", for an LSTM also "c", and gradients."""
    result = cell(input, hx)
    results = result if isinstance(result, tuple) else (result,)
    outputs = dict(zip(("h", "c"), results, strict=False))
    leaves = {"input": input, **dict(cell.named_parameters())}
    if hx is not None:
        states = hx if isinstance(hx, tuple) else (hx,)
        leaves |= zip(("h_0", "c_0"), states, strict=False)
    return with_gradients(outputs, leaves, cotangents)
