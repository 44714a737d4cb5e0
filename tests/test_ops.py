"""The operators `fastrnn::layer` and `fastrnn::layer_backward` against the reference: plain PyTorch
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
from compare import check, check_identical, engines, poisoned_memory, use_engine
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
    states: bool = True, features: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `reference.layer` for made-up data."""
    steps, batch, hidden, projection = size
    info, groups = reference.CELLS[cell], 2 if direction == 2 else 1
    projected = projection if cell == "lstm" else 0
    width = projected or hidden
    batch_sizes = None
    lead: tuple[int, ...] = (steps, batch)
    if packed:
        steps, batch = LENGTHS[0], len(LENGTHS)
        batch_sizes = torch.tensor([sum(n > t for n in LENGTHS) for t in range(steps)])
        lead = (sum(LENGTHS),)

    def randn(*sizes: int, scale: float = 0.5) -> Tensor:
        return (scale * torch.randn(*sizes, dtype=torch.float64)).to(dtype).requires_grad_()

    weights: list[Tensor] = []
    rows = info.gates * hidden
    for _ in range(groups):
        weights += [randn(rows, features), randn(rows, width, scale=0.5 / width**0.5)]
        weights += [randn(rows), randn(rows)] if states else []
        weights += [randn(projected, hidden, scale=0.5 / hidden**0.5)] if projected else []
    return {
        "cell": cell,
        "input": randn(*lead, features),
        "weights": weights,
        "h0": randn(groups, batch, width) if states or packed else None,
        "c0": randn(groups, batch, hidden) if states and info.has_c else None,
        "batch_sizes": batch_sizes,
        "groups": groups,
        "direction": direction,
    }


def leaves_of(arguments: dict[str, Any]) -> list[Tensor]:
    named = [arguments[name] for name in ("input", "h0", "c0")]
    return [t for t in (*named, *arguments["weights"]) if t is not None]


def mapped(arguments: dict[str, Any], f: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with f of every floating-point tensor."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [f(t) for t in value]
        return f(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in arguments.items()}


def detached(arguments: dict[str, Any]) -> dict[str, Any]:
    return mapped(arguments, lambda t: t.detach())


def run(layer: Callable[..., Any], arguments: dict[str, Any], cotangents: list[Tensor]) -> Any:
    """Results and gradients, by name, of output, h_n and c_n weighted with the cotangents."""
    results = layer(**arguments)[:3]
    kept = [r for r in results if r.numel()]
    loss = sum((r.double() * c).sum() for r, c in zip(kept, cotangents, strict=False))
    gradients = torch.autograd.grad(loss, leaves_of(arguments))  # type: ignore[arg-type]
    named = {name: r.detach() for name, r in zip(NAMES, results, strict=False) if r.numel()}
    return named | {f"grad{i}": g for i, g in enumerate(gradients)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_equal_to_reference(cell: str, direction: int, dtype: torch.dtype) -> None:
    cases = [(size, False, states) for size in SIZES for states in (True, False)]
    for size, packed, states in [*cases, (SIZES[3], True, True), (SIZES[4], True, True)]:
        arguments = problem(cell, size, direction, packed, dtype, states)
        probe = [r for r in reference.layer(**arguments)[:3] if r.numel()]
        cotangents = [torch.randn(r.shape, dtype=torch.float64) for r in probe]
        double = mapped(arguments, lambda t: t.detach().double().requires_grad_())
        with poisoned_memory():
            got = run(autograd.layer, arguments, cotangents)
        check(got, run(reference.layer, arguments, cotangents),
              run(reference.layer, double, cotangents))  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_four_groups_are_two_layers_of_two(cell: str) -> None:
    """Groups share nothing: of four in direction 2, the first two run forward, the others back."""
    forward, reverse = (problem(cell, (5, 3, 9, 0), d, False, torch.float32) for d in (0, 1))
    pairs = [problem(cell, (5, 3, 9, 0), d, False, torch.float32) for d in (0, 1)]
    parts = [detached(p) | {"input": forward["input"].detach()} for p in (forward, pairs[0])]
    parts += [detached(p) | {"input": forward["input"].detach()} for p in (reverse, pairs[1])]
    joined = parts[0] | {
        "weights": [w for p in parts for w in p["weights"]],
        "h0": torch.cat([p["h0"] for p in parts]),
        "c0": None if parts[0]["c0"] is None else torch.cat([p["c0"] for p in parts]),
        "groups": 4,
        "direction": 2,
    }
    output, h_n, *_ = torch.ops.fastrnn.layer(**joined, save=False)
    singles = [torch.ops.fastrnn.layer(**p, save=False) for p in parts]
    assert torch.equal(output, torch.cat([s[0] for s in singles], -1))
    assert torch.equal(h_n, torch.cat([s[1] for s in singles]))


@pytest.mark.parametrize("cell", CELLS)
def test_cell_table(cell: str) -> None:
    from fastrnn import _C

    info = reference.CELLS[cell]
    assert _C.cells()[cell] == {
        "gates": info.gates, "saved": info.saved, "own": info.own, "has_c": info.has_c,
    }  # fmt: skip
    assert list(_C.cells()) == CELLS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("projection", [0, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, projection: int, packed: bool) -> None:
    plain = detached(problem(cell, (3, 2, 5, projection), 2, packed, torch.float32))
    for save in (True, False):
        torch.library.opcheck(torch.ops.fastrnn.layer.default, (), {**plain, "save": save})
    output, h_n, c_n, cells, saved = torch.ops.fastrnn.layer(**plain, save=True)
    has_c = reference.CELLS[cell].has_c
    dc_n = torch.randn_like(c_n) if has_c else None
    rest = {k: v for k, v in plain.items() if k not in ("cell", "input")}
    for wanted in ([1, 1, int(has_c)], [0, 0, 0]):
        backward = (
            cell, torch.randn_like(output), torch.randn_like(h_n), dc_n, plain["input"], output,
            cells, saved, *rest.values(), [*wanted, *([wanted[0]] * len(plain["weights"]))],
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fastrnn.layer_backward.default, backward)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_same_bits_for_any_threads_and_batch(cell: str, packed: bool) -> None:
    """A row's result depends neither on the threads nor on the rows beside it, as long as there are
    some (a single row has a kernel of its own); a second run of the same input gives the same
    bits."""
    plain = detached(problem(cell, (40, 9, 96, 0), 2, packed, torch.float32, features=1))
    threads = torch.get_num_threads()

    def once(count: int) -> dict[str, Tensor]:
        torch.set_num_threads(count)
        try:
            results = torch.ops.fastrnn.layer(**plain, save=True)
        finally:
            torch.set_num_threads(threads)
        return {name: r for name, r in zip(NAMES, results, strict=True) if r.numel()}

    one = once(1)
    check_identical(once(1), one)
    check_identical(once(2), one)
    check_identical(once(3), one)
    if not packed:
        some = plain | {"input": plain["input"][:, 4:7]}
        some |= {k: None if plain[k] is None else plain[k][:, 4:7] for k in ("h0", "c0")}
        output = torch.ops.fastrnn.layer(**some, save=False)[0]
        assert torch.equal(output, one["output"][:, 4:7])


@pytest.mark.parametrize("name", ["input", "h0", "weight_hh", "batch_sizes", "output", "saved"])
def test_storage_cut_short_is_refused(name: str) -> None:
    """FSDP frees parameters by emptying their storage: such a tensor must not be read."""
    arguments = detached(problem("gru", (3, 2, 8, 0), 0, name == "batch_sizes", torch.float32))
    results = torch.ops.fastrnn.layer(**arguments, save=True)
    output, _, _, cells, saved = results
    victim = {"weight_hh": arguments["weights"][1], "output": output, "saved": saved}
    tensor = victim[name] if name in victim else arguments[name]
    tensor.untyped_storage().resize_(8)
    cut = pytest.raises(RuntimeError, match=r"storage of .* holds 8 bytes")
    if name not in victim or name == "weight_hh":
        with cut:
            torch.ops.fastrnn.layer(**arguments, save=True)
    rest = [v for k, v in arguments.items() if k not in ("cell", "input")]
    given = (None, None, None, arguments["input"], output, cells, saved, *rest)
    with cut:
        torch.ops.fastrnn.layer_backward("gru", *given, [1, 1, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("which", ["input", "weight_hh", "h0"])
def test_storage_cut_short_of_a_strided_tensor_is_refused(which: str) -> None:
    arguments = detached(problem("gru", (3, 2, 8, 0), 0, False, torch.float32))
    place = {"weight_hh": ("weights", 1)}.get(which)
    tensor = arguments["weights"][1] if place else arguments[which]
    strided = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    if place:
        arguments["weights"] = [arguments["weights"][0], strided, *arguments["weights"][2:]]
    else:
        arguments[which] = strided
    torch.ops.fastrnn.layer(**arguments, save=True)
    strided.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=r"storage of .* holds 8 bytes"):
        torch.ops.fastrnn.layer(**arguments, save=True)


@pytest.mark.parametrize(
    ("cell", "I", "H", "B", "T"),
    [("LSTM", 16, 8, 16, 4000), ("LSTM", 4, 4, 256, 100), ("GRU", 16, 8, 16, 1000)],
)
def test_long_sums_are_as_exact_as_torch(cell: str, I: int, H: int, B: int, T: int) -> None:  # noqa: E741
    """Weight gradients are sums over all T * B rows."""
    torch.manual_seed(2)
    base, input = getattr(torch.nn, cell)(I, H), torch.randn(T, B, I)

    def gradients(namespace: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        module = getattr(namespace, cell)(I, H).to(dtype)
        module.load_state_dict(base.state_dict())
        module(input.to(dtype))[0].sum().backward()
        return {name: p.grad for name, p in module.named_parameters()}

    check(
        gradients(fastrnn, torch.float32),
        gradients(torch.nn, torch.float32),
        gradients(torch.nn, torch.float64),
    )


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
        output = autograd.layer(**arguments)[0]
        torch.autograd.grad(output.sum(), leaves_of(arguments))

    def grown(calls: int) -> int:
        gc.collect()
        before = _heap_bytes()
        for _ in range(calls):
            step()
        gc.collect()
        return _heap_bytes() - before

    grown(100)
    assert min(grown(500) for _ in range(3)) < 10 * 500


@pytest.mark.parametrize("packed", [False])
@pytest.mark.parametrize("cell", CELLS)
def test_no_rows(cell: str, packed: bool) -> None:
    arguments = problem(cell, (3, 0, 5, 0), 0, packed, torch.float32)
    with poisoned_memory():
        output, h_n, _ = autograd.layer(**arguments)
        assert output.shape == (3, 0, 5)
        assert h_n.shape == (1, 0, 5)
        leaves = leaves_of(arguments)
        for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_special_values(cell: str, value: float) -> None:
    """NaN and infinities stand where the reference has them, and the rest is as exact as ever."""
    plain = detached(problem(cell, (4, 3, 17, 0), 0, False, torch.float32))
    plain["input"][1, 1, 1] = value
    double = mapped(plain, Tensor.double)
    got, same, exact = (
        {"output": f(**arguments)[0]}
        for f, arguments in (
            (autograd.layer, plain), (reference.layer, plain), (reference.layer, double),
        )
    )  # fmt: skip
    check(got, same, exact)
