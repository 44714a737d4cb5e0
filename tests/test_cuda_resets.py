"""What csrc/cuda makes of boundaries between steps (resets) and of gradients of the c of each step,
by the operators on its kernels on the host, against the reference and its derivatives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops_groups import LENGTHS
from test_ops_groups import problem as arguments
from torch import Tensor

import cuda_on_host
from compare import check, check_identical, poisoned_memory
from fastrnn import reference

_why_not = cuda_on_host.why_not()
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GROUPS = [(1, 0), (1, 1), (2, 2), (3, 0), (4, 2), (2, 1)]  # D, direction
SIZES = [(5, 3, 2, 8), (1, 2, 3, 5), (7, 4, 3, 17), (3, 1, 1, 1), (9, 5, 3, 12)]  # T, B, I, H
ARGUMENTS = (
    "cell", "input", "weights", "h0", "c0", "batch_sizes", "groups", "direction",
)  # fmt: skip
NAMES = ("output", "h_n", "c_n", "cells", "saved")


def problem(
    cell: str, groups: tuple[int, int], size: tuple[int, int, int, int], dtype: torch.dtype,
    packed: bool = False, states: bool = True, resets: bool = True, share: float = 0.6,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `reference.layer`. share: of rows that have a boundary."""
    entering = 2 if resets else 1
    found = arguments(cell, (1, *groups), size, dtype, packed, states, states, entering)
    call = dict(zip(ARGUMENTS, found, strict=True))
    lead = call["input"].shape[:-1]
    codes = torch.randint(1, 3, lead) * (torch.rand(lead) < share)
    return call | {"resets": codes.to(torch.uint8) if resets else None}


def cotangents(call: dict[str, Any], dcells: bool) -> dict[str, Tensor]:
    """Of output, h_n, c_n and, if asked for, of the c of each step."""
    results = dict(zip(NAMES, reference.layer(**call), strict=True))
    wanted = NAMES[: 4 if dcells else 3]
    return {name: torch.randn_like(results[name]) for name in wanted if results[name].numel()}


def by_reference(
    call: dict[str, Any], grads: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results, and gradients of all there is, in a dtype."""
    is_float = torch.is_floating_point
    call = {k: v.to(dtype) if isinstance(v, Tensor) and is_float(v) else v for k, v in call.items()}
    has_c, D = reference.CELLS[call["cell"]].has_c, call["groups"]
    B = call["input"].shape[1] if call["batch_sizes"] is None else int(call["batch_sizes"][0])
    H, P = call["weights"][0].shape[0], call["weights"][1].shape[1]
    H //= reference.CELLS[call["cell"]].gates
    K = B if call["resets"] is None else 2 * B
    leaves = {"input": call["input"], "h0": call["h0"], "c0": call["c0"]}
    if leaves["h0"] is None:
        leaves["h0"] = call["input"].new_zeros(D, K, P)
    if leaves["c0"] is None and has_c:
        leaves["c0"] = call["input"].new_zeros(D, K, H)
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items() if v is not None}
    weights = [w.to(dtype).requires_grad_() for w in call["weights"]]
    results = dict(
        zip(NAMES, reference.layer(**{**call, **leaves, "weights": weights}), strict=True)
    )
    loss = sum((results[name].double() * g.double()).sum() for name, g in grads.items())
    names = [*leaves, *(f"weight{i}" for i in range(len(weights)))]
    found = torch.autograd.grad(loss, [*leaves.values(), *weights])  # type: ignore[arg-type]
    results = {k: v.detach() for k, v in results.items() if v.numel()}
    return results | {f"d{name}": g for name, g in zip(names, found, strict=True)}


def by_operators(
    ops: Any, call: dict[str, Any], grads: dict[str, Tensor], states: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    def to(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    given = {k: v if k == "batch_sizes" else to(v) for k, v in call.items()}
    given["weights"] = [w.to(device) for w in call["weights"]]
    resets, input, cell = given.pop("resets"), given.pop("input"), given.pop("cell")
    rest = list(given.values())
    results = ops.layer(cell, input, *rest, True, resets)
    output, _, _, cells, saved = results
    has_c = cell == "lstm"
    doutput, dh_n, dc_n, dcells = (to(grads.get(name)) for name in NAMES[:4])
    wanted = [1, int(states), int(states and has_c), *[1] * len(given["weights"])]
    dinput, dweights, dh0, dc0 = ops.layer_backward(
        cell, doutput, dh_n, dc_n, input, output, cells, saved, *rest, wanted, resets, dcells
    )
    named = dict(zip(NAMES, results, strict=True)) | {"dinput": dinput, "dh0": dh0, "dc0": dc0}
    named |= {f"dweight{i}": g for i, g in enumerate(dweights)}
    return {k: v.cpu() for k, v in named.items() if v.numel()}


def agree(ops: Any, call: dict[str, Any], dcells: bool, device: str = "cpu") -> None:
    """That the operators obey the rule of fastrnn.parity next to the reference, and give the same
    bits twice, in memory that holds NaN."""
    grads = cotangents(call, dcells and call["cell"] == "lstm")
    with poisoned_memory():
        got = by_operators(ops, call, grads, device=device)
        check_identical(by_operators(ops, call, grads, device=device), got)
        without = by_operators(ops, call, grads, states=False, device=device)
    same = by_reference(call, grads, call["input"].dtype)
    exact = by_reference(call, grads, torch.float64)
    check(got, same, exact)
    check_identical(without, {k: v for k, v in got.items() if k not in ("dh0", "dc0")})


@pytest.fixture(autouse=True)
def _step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "step")


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_on_host.load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_equal_to_reference(ops: Any, cell: str, dtype: torch.dtype) -> None:
    for i, groups in enumerate(GROUPS):
        for j, size in enumerate(SIZES):
            call = problem(cell, groups, size, dtype, states=(i + j) % 3 > 0)
            agree(ops, call, dcells=(i + j) % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_packed(ops: Any, cell: str, dtype: torch.dtype) -> None:
    for i, groups in enumerate(GROUPS):
        agree(ops, problem(cell, groups, SIZES[i % 3], dtype, packed=True), dcells=i % 2 == 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("cell", CELLS)
def test_boundaries_nowhere_and_everywhere(ops: Any, cell: str, share: float) -> None:
    for packed in (False, True):
        call = problem(cell, (2, 2), SIZES[4], torch.float32, packed, share=share)
        agree(ops, call, dcells=True)
        for code in (1, 2):
            agree(ops, call | {"resets": call["resets"].clamp(max=code)}, dcells=False)


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_cells_alone(ops: Any, cell: str, dtype: torch.dtype) -> None:
    for i, groups in enumerate(GROUPS):
        for packed in (False, True):
            call = problem(cell, groups, SIZES[i % 5], dtype, packed, resets=False)
            agree(ops, call, dcells=True)


@pytest.mark.parametrize("cell", CELLS)
def test_without_any_boundary_the_bits_are_those_of_a_plain_call(ops: Any, cell: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = problem(cell, (2, 2), SIZES[0], dtype, packed=True, share=0)
        B = len(LENGTHS)
        plain = call | {"h0": call["h0"][:, :B], "resets": None}
        plain["c0"] = None if call["c0"] is None else call["c0"][:, :B]
        grads = cotangents(call, False)
        got = by_operators(ops, call, grads)
        expected = by_operators(ops, plain, grads)
        for name in ("dh0", "dc0"):
            if name in got:
                assert not got[name][:, B:].any()
                got[name] = got[name][:, :B]
        check_identical(got, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_passes_a_boundary(ops: Any, cell: str) -> None:
    """Of NaN in one part of the sequence no other part has anything, forward or backward."""
    call = problem(cell, (2, 2), SIZES[2], torch.float32, share=0)
    call["resets"][3], call["resets"][5] = 1, 2
    grads = cotangents(call, False)
    clean = by_operators(ops, call, grads)
    call["input"][3:5] = float("nan")
    got = by_operators(ops, call, grads)
    assert got["output"][3:5].isnan().all()
    if cell != "rnn_relu":  # its slope at NaN is 0
        assert got["dinput"][3:5].isnan().all()
        assert got["dh0"].isnan().any()
    for name in ("output", "dinput"):
        for part in (slice(3), slice(5, None)):
            assert torch.equal(got[name][part], clean[name][part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_arrays_that_begin_anywhere(ops: Any, cell: str, dtype: torch.dtype) -> None:
    call = problem(cell, (2, 2), SIZES[0], dtype)
    grads = cotangents(call, True)

    def apart(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    moved = {k: apart(v) if isinstance(v, Tensor) else v for k, v in call.items()}
    got = by_operators(ops, moved, {k: apart(g) for k, g in grads.items()})
    check_identical(got, by_operators(ops, call, grads))


KERNELS = ["step-graph", "persistent-block", "persistent-grid"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_several_steps_refuse(
    ops: Any, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    call = problem("lstm", (1, 0), SIZES[0], torch.bfloat16)
    grads = cotangents(call, False)
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", kernel)
    with pytest.raises(RuntimeError, match=f"KERNEL={kernel} cannot be met: it has no resets"):
        by_operators(ops, call, grads)
    plain = problem("lstm", (1, 0), SIZES[0], torch.bfloat16, resets=False)
    by_operators(ops, plain, grads)
    with pytest.raises(RuntimeError, match="cannot be met: it takes no gradients of the cell stat"):
        by_operators(ops, plain, cotangents(plain, True))


def test_by_themselves_they_leave_it_to_steps(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "auto")
    monkeypatch.setenv("FASTRNN_PERSISTENT", "1")

    def ran(resets: bool, dcells: bool) -> int:
        call = problem("lstm", (1, 0), SIZES[4], torch.bfloat16, resets=resets)
        before = cuda_on_host.programs()
        agree(ops, call, dcells)
        after = cuda_on_host.programs()
        return after.blocks + after.grids - before.blocks - before.grids

    assert ran(True, False) == 0
    assert 0 < ran(False, True) < ran(False, False)
