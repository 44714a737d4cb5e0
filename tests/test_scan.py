"""The operators `fastrnn::scan` and `fastrnn::scan_backward` against the reference: plain PyTorch
with its own derivatives; for every cell, direction, layout, dtype and instruction set.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from compare import check, check_identical, engines, use_engine
from fastrnn import autograd, reference

pytestmark = pytest.mark.skipif(
    fastrnn._ops.native_error is not None, reason="pure-Python install: there are no operators"
)

CELLS = list(reference.CELLS)
NATIVE = [e for e in engines() if e.startswith("native")]
# T, B, H, P: one step, one row, one unit, widths around the vectors of every instruction set
SIZES = [(1, 1, 1, 0), (3, 2, 5, 2), (5, 7, 16, 7), (4, 13, 33, 0), (9, 4, 77, 20)]
LENGTHS = [7, 7, 5, 2, 1]
NAMES = ("output", "h_n", "c_n", "cells", "saved")


@pytest.fixture(params=NATIVE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_engine(request.param):
        yield request.param


def problem(
    cell: str, size: tuple[int, int, int, int], direction: int, packed: bool, dtype: torch.dtype,
    states: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `reference.scan` for made-up data."""
    steps, batch, hidden, projection = size
    info, groups = reference.CELLS[cell], 2 if direction == 2 else 1
    projected = projection if cell == "lstm" and packed is False else 0
    width = projected or hidden
    batch_sizes = None
    lead: tuple[int, ...] = (steps, batch)
    if packed:
        steps, batch = LENGTHS[0], len(LENGTHS)
        batch_sizes = torch.tensor([sum(n > t for n in LENGTHS) for t in range(steps)])
        lead = (sum(LENGTHS),)

    def randn(*sizes: int, scale: float = 0.5) -> Tensor:
        return (scale * torch.randn(*sizes, dtype=torch.float64)).to(dtype).requires_grad_()

    return (
        cell,
        randn(*lead, groups, info.gates * hidden),
        randn(groups, info.gates * hidden, width, scale=0.5 / width**0.5),
        *((randn(groups, info.gates * hidden), randn(groups, info.gates * hidden)) if states
          else (None, None)),
        randn(groups, projected, hidden, scale=0.5 / hidden**0.5) if projected else None,
        randn(groups, batch, width) if states or packed else None,
        randn(groups, batch, hidden) if states and info.has_c else None,
        batch_sizes,
        direction,
    )


def run(scan: Callable[..., Any], arguments: tuple[Any, ...], cotangents: list[Tensor]) -> Any:
    """Results and gradients, by name, of output, h_n and c_n weighted with the cotangents."""
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    results = scan(*arguments)[:3]
    kept = [r for r in results if r.numel()]
    loss = sum((r.double() * c).sum() for r, c in zip(kept, cotangents, strict=False))
    gradients = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
    named = {name: r.detach() for name, r in zip(NAMES, results, strict=False) if r.numel()}
    return named | {f"grad{i}": g for i, g in enumerate(gradients)}


def cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def one(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.detach().to(dtype).requires_grad_()

    return tuple(one(a) for a in arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_equal_to_reference(cell: str, direction: int, dtype: torch.dtype) -> None:
    cases = [(size, False, states) for size in SIZES for states in (True, False)]
    for size, packed, states in [*cases, (SIZES[3], True, True)]:
        arguments = problem(cell, size, direction, packed, dtype, states)
        probe = [r for r in reference.scan(*arguments)[:3] if r.numel()]
        cotangents = [torch.randn(r.shape, dtype=torch.float64) for r in probe]
        check(
            run(autograd.scan, arguments, cotangents),
            run(reference.scan, arguments, cotangents),
            run(reference.scan, cast(arguments, torch.float64), cotangents),
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direction", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_reference_backward_is_the_gradient_of_its_forward(
    cell: str, direction: int, packed: bool
) -> None:
    """The formulas of scan_backward against PyTorch's derivative of scan, all five cotangents."""
    arguments = problem(cell, (4, 3, 5, 2), direction, packed, torch.float64)
    results = reference.scan(*arguments)
    cotangents = [torch.randn_like(r) if r.requires_grad else None for r in results]
    leaves = [arguments[i] for i in (1, 6, 7) if arguments[i] is not None]
    expected = torch.autograd.grad(
        [r for r in results if r.requires_grad], leaves, [c for c in cotangents if c is not None]
    )
    output, _, _, cells, saved = results
    got = reference.scan_backward(
        cell, *cotangents, output, cells, saved, *(arguments[i] for i in (2, 5, 6, 7, 8, 9))
    )
    computed = [got[0], got[4], *([got[5]] if len(leaves) > 2 else [])]
    for e, g in zip(expected, computed, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_table(cell: str) -> None:
    from fastrnn import _C

    info = reference.CELLS[cell]
    assert _C.cells()[cell] == {
        "gates": info.gates, "saved": info.saved, "own": info.own, "has_c": info.has_c,
    }  # fmt: skip
    assert list(_C.cells()) == CELLS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, packed: bool) -> None:
    arguments = problem(cell, (3, 2, 5, 2), 2, packed, torch.float32)
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.fastrnn.scan.default, (*plain, True))
    torch.library.opcheck(torch.ops.fastrnn.scan.default, (*plain, False))
    output, h_n, c_n, cells, saved = torch.ops.fastrnn.scan(*plain, True)
    has_c = reference.CELLS[cell].has_c
    _, _, weight_hh, _, _, weight_hr, h0, c0, batch_sizes, direction = plain
    backward = (
        cell, torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if has_c
        else None, output, cells, saved, weight_hh, weight_hr, h0, c0, batch_sizes, direction,
        True, has_c,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastrnn.scan_backward.default, backward)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_same_bits_for_any_threads_and_batch(cell: str, packed: bool) -> None:
    """A row's result depends neither on the threads nor on the rows beside it, as long as there are
    some (a single row has a kernel of its own); a second run of the same input gives the same
    bits."""
    arguments = problem(cell, (40, 9, 96, 0), 2, packed, torch.float32)
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    threads = torch.get_num_threads()

    def once(count: int) -> dict[str, Tensor]:
        torch.set_num_threads(count)
        try:
            results = torch.ops.fastrnn.scan(*plain, True)
        finally:
            torch.set_num_threads(threads)
        return {name: r for name, r in zip(NAMES, results, strict=True) if r.numel()}

    one = once(1)
    check_identical(once(1), one)
    check_identical(once(2), one)
    check_identical(once(3), one)
    if not packed:
        alone = list(plain)
        alone[1] = plain[1][:, 4:7].contiguous()
        alone[6:8] = [s if s is None else s[:, 4:7].contiguous() for s in plain[6:8]]
        output = torch.ops.fastrnn.scan(*alone, False)[0]
        assert torch.equal(output, one["output"][:, 4:7])


class _HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )


def _heap_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _HeapInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("cell", CELLS)
def test_no_memory_is_lost(cell: str) -> None:
    """The heap after 500 calls of both operators is what it was, to less than 10 bytes a call."""
    arguments = problem(cell, (3, 2, 5, 0), 0, False, torch.float32)

    def step() -> None:
        output = autograd.scan(*arguments)[0]
        torch.autograd.grad(output.sum(), [arguments[1]])

    def grown(calls: int) -> int:
        gc.collect()
        before = _heap_bytes()
        for _ in range(calls):
            step()
        gc.collect()
        return _heap_bytes() - before

    grown(100)
    assert min(grown(500) for _ in range(3)) < 10 * 500


def test_no_rows() -> None:
    arguments = problem("lstm", (3, 0, 5, 0), 0, False, torch.float32)
    output, h_n, c_n = autograd.scan(*arguments)
    assert output.shape == (3, 0, 1, 5)
    assert h_n.shape == c_n.shape == (1, 0, 5)
    gradients = torch.autograd.grad(output.sum(), [arguments[1], arguments[2]])
    assert [g.shape for g in gradients] == [arguments[1].shape, arguments[2].shape]
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_special_values(cell: str, value: float) -> None:
    """NaN and infinities give what the reference gives, in the row and unit where they are."""
    arguments = problem(cell, (4, 3, 17, 0), 0, False, torch.float32)
    plain = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
    plain[1][1, 1, 0, 3] = value
    got, expected = torch.ops.fastrnn.scan(*plain, False)[0], reference.scan(*plain)[0]
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
