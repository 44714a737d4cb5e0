"""Resets and gradients of cells on Triton's kernels of one step, against the reference, by the rule
of fastrnn.parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from test_triton_ops import freed
from torch import Tensor
from torch.library import opcheck

from compare import check, check_identical
from fastrnn import reference
from fastrnn.triton import forward, launch, passes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy, of a mask

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru"]
GROUPS = [(1, 0), (1, 1), (3, 0), (2, 2)]  # D, direction
SIZES = (4, 4, 3, 6)  # T, B, I, H
LENGTHS = [4, 4, 2, 1]


class Call(NamedTuple):
    """Arguments of ``layer``, without ``save``; and gradients of its first four results."""

    cell: str
    input: Tensor
    weights: Sequence[Tensor]
    h0: Any  # tensors, or None
    c0: Any
    batch_sizes: Any
    groups: int
    direction: int
    resets: Any
    grads: Sequence[Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:8]

    def to(self, *args: Any) -> Call:
        """Numbers in another dtype, or all on a device."""

        def moved(t: Tensor) -> Tensor:
            is_moved = t.is_floating_point() or (t.dtype == torch.uint8 and "cuda" in args)
            return t.to(*args) if is_moved else t

        return Call(*torch.utils._pytree.tree_map_only(Tensor, moved, tuple(self)))

    def backward_arguments(self, results: Sequence[Tensor], wanted: Any = None) -> list[Any]:
        output, _, _, cells, saved = results
        return [
            self.cell, *self.grads[:3], self.input, output, cells, saved, *self.arguments[2:],
            wanted or self.wanted(), self.resets, self.grads[3],
        ]  # fmt: skip

    def wanted(self, weights: int = 1) -> list[int]:
        states = [int(s is not None) for s in (self.h0, self.c0)]
        return [1, *states, *[weights] * len(self.weights)]


def problem(
    cell: str, groups: tuple[int, int], sizes: tuple[int, ...] = SIZES,
    dtype: torch.dtype = torch.float32, packed: bool = False, bias: bool = True,
) -> Call:  # fmt: skip
    """Boundaries of all kinds, the first step's too, and rows without any."""
    (T, B, I, H), (D, direction) = sizes, groups  # noqa: E741
    projected, cell = cell == "lstm_proj", cell.removesuffix("_proj")
    info, P = reference.CELLS[cell], H // 2 if projected else H
    batch_sizes, lead = None, [T, B]
    if packed:
        batch_sizes = torch.tensor([sum(n > t for n in LENGTHS) for t in range(LENGTHS[0])])
        lead, B = [sum(LENGTHS)], len(LENGTHS)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape)).to(dtype)

    G = info.gates
    shapes = [(G * H, I), (G * H, P), *[(G * H,)] * (2 * bias), *[(P, H)] * projected]
    weights = [randn(*s, scale=0.6 / s[-1] ** 0.5) for _ in range(D) for s in shapes]
    c0 = randn(D, 2 * B, H) if info.has_c else None
    grads = [randn(*lead, D * P), randn(D, B, P), None, None]
    if info.has_c:
        dcells = torch.randn(D, torch.Size(lead).numel(), H)
        grads[2:] = randn(D, B, H), dcells.to(reference.compute_dtype(dtype))
    resets = torch.randint(0, 3, lead, dtype=torch.uint8)
    return Call(
        cell, randn(*lead, I), weights, randn(D, 2 * B, P), c0, batch_sizes, D, direction, resets,
        grads,
    )  # fmt: skip


def named(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    names = ("output", "h_n", "c_n", "cells", "saved")
    found = dict(zip(names, results, strict=True))
    found["cells"] = found["cells"].to(found["output"].dtype)  # of 16 bits: as exact as h is
    found |= {f"d leaf {i}": t for i, t in enumerate(leaves)}
    return {name: t.detach().cpu() for name, t in found.items() if t.numel()}


def run(call: Call, device: str, wanted: list[int] | None = None) -> dict[str, Tensor]:
    """By the operators: results, and gradients of input, h0, c0 and weights."""
    ops = torch.ops.fastrnn_triton
    call = call.to(device)
    results = ops.layer(*call.arguments, True, call.resets)
    given = call.backward_arguments(results, wanted)
    dinput, dweights, dh0, dc0 = ops.layer_backward(*given)
    return named(results, [dinput, dh0, dc0, *dweights])


def by_reference(call: Call) -> dict[str, Tensor]:
    states = [s for s in (call.h0, call.c0) if s is not None]
    leaves = [t.detach().requires_grad_() for t in (call.input, *states, *call.weights)]
    rest = iter(leaves[1:])
    h0, c0 = (None if s is None else next(rest) for s in (call.h0, call.c0))
    results = reference.layer(
        call.cell, leaves[0], list(rest), h0, c0, *call.arguments[5:], call.resets
    )
    chosen = [r for r, g in zip(results, call.grads, strict=False) if g is not None]
    at = iter(torch.autograd.grad(chosen, leaves, [g for g in call.grads if g is not None]))
    found = [next(at)] + [call.input[:0] if s is None else next(at) for s in (call.h0, call.c0)]
    return named(results, [*found, *at])


def agree(call: Call, device: str) -> dict[str, Tensor]:
    found = run(call, device)
    check(found, by_reference(call), by_reference(call.to(torch.float64)))
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients(
    device: str, cell: str, groups: tuple[int, int], packed: bool
) -> None:
    """Also: without what backward needs."""
    call = problem(cell, groups, packed=packed, bias=groups[0] != 3)
    found, call = agree(call, device), call.to(device)
    *results, cells, saved = torch.ops.fastrnn_triton.layer(*call.arguments, False, call.resets)
    assert cells.numel() == saved.numel() == 0
    for name, result in zip(("output", "h_n", "c_n"), results, strict=True):
        assert not result.numel() or torch.equal(result.cpu(), found[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(device: str, cell: str, dtype: torch.dtype) -> None:
    """Also: a second run gives the same bits."""
    call = problem(cell, (2, 2), dtype=dtype, packed=True)
    check_identical(run(call, device), agree(call, device))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm_proj", "gru"])
def test_blocks_and_chunks(device: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of units; input products of two steps at a time."""
    call = problem(cell, (2, 2), (3, 18, 2, 70))
    rows = 2 * 18 * 2 * reference.CELLS[call.cell].gates * 70 * 4
    monkeypatch.setattr(forward, "GATES_BYTES", rows)
    agree(call, device)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2, 4), (4, 1, 2, 3), (2, 0, 3, 4)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_sizes(device: str, cell: str, sizes: tuple[int, ...]) -> None:
    """Also: without initial states zeros enter."""
    call = problem(cell, (2, 2), sizes)
    agree(call, device)
    agree(call._replace(h0=None, c0=None), device)


@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["lstm_proj", "gru"])
def test_one_code_everywhere(
    device: str, ask: Callable[[str], None], cell: str, packed: bool, code: int
) -> None:
    """No boundary anywhere: the bits of a call without resets."""
    ask("step")
    call = problem(cell, (2, 2), packed=packed)
    found = agree(call._replace(resets=torch.full_like(call.resets, code)), device)
    if code == 0:
        h0, c0 = (s if s is None else s[:, : s.shape[1] // 2] for s in (call.h0, call.c0))
        plain = run(call._replace(resets=None, h0=h0, c0=c0), device)
        for name in ("d leaf 1", "d leaf 2")[: 2 if call.c0 is not None else 1]:
            first, rest = found[name].chunk(2, 1)
            assert not rest.any()
            found[name] = first
        check_identical(found, plain)


def test_codes_above_two(device: str) -> None:
    """They count as 2, as csrc/scan.h has it."""
    call = problem("lstm", (2, 2), packed=True)
    large = torch.where(call.resets == 2, 255 - torch.arange(len(call.resets)), call.resets)
    check_identical(run(call._replace(resets=large.byte()), device), run(call, device))


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj", "gru"])
def test_nothing_passes_a_boundary(device: str, cell: str) -> None:
    """Neither NaN in what comes before, nor in the gradients of what comes behind."""
    call = problem(cell, (2, 2))
    call.resets.zero_()[2] = 1
    call.input[:2, 0] = torch.nan
    call.grads[0][2:, 1] = torch.nan
    forwards, backwards = run(call, device)["output"].chunk(2, -1)
    for h in (forwards, backwards):
        assert h[:2, 0].isnan().all()
        assert h[2:].isfinite().all()
    call.input.nan_to_num_()
    found = run(call, device)
    dinput, dh0 = found["d leaf 0"], found["d leaf 1"]
    assert dinput[:2].isfinite().all()
    assert dinput[2:, 1].isnan().all()
    B = dinput.shape[1]
    assert dh0[0].isnan().any(-1).nonzero().flatten().tolist() == [B + 1]  # of the reset
    assert dh0[1].isnan().any(-1).nonzero().flatten().tolist() == [1]  # of the last step


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj"])
def test_gradients_of_cells_alone(device: str, cell: str) -> None:
    for packed in (False, True):
        call = problem(cell, (2, 2), packed=packed)
        B = call.h0.shape[1] // 2
        agree(call._replace(resets=None, h0=call.h0[:, :B], c0=call.c0[:, :B]), device)
        agree(call._replace(grads=[*[None] * 3, call.grads[3]]), device)


def test_gradients_that_are_wanted(device: str) -> None:
    """Those and no others, which are the same."""
    call = problem("lstm", (2, 2))
    everything = run(call, device)
    for places in ([], [1], [2], [4]):  # h0, c0 and the first weight_hh
        wanted = [int(i in places) for i in range(len(call.wanted()))]
        found = {k: v for k, v in run(call, device, wanted).items() if k.startswith("d")}
        check_identical(found, {f"d leaf {i}": everything[f"d leaf {i}"] for i in places})


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_parts_of_the_batch(device: str, cell: str) -> None:
    """Those of weights are the ones that each part has alone."""
    call = problem(cell, (2, 2))
    B = call.input.shape[1]
    parts = run(call, device, call.wanted(2))
    for part, rows in enumerate((slice(0, B // 2), slice(B // 2, B))):

        def of_part(t: Tensor, rows: slice = rows) -> Tensor:
            return t.unflatten(1, (-1, B))[:, :, rows].flatten(1, 2)

        h0, c0, *grads = (t if t is None else of_part(t) for t in (call.h0, call.c0, *call.grads))
        alone = call._replace(
            input=of_part(call.input), h0=h0, c0=c0, resets=of_part(call.resets), grads=grads
        )
        weights = [f"d leaf {i + 3}" for i in range(len(call.weights))]
        for name, gradient in run(alone, device).items():
            if name in weights:
                torch.testing.assert_close(parts[name][part], gradient)


def test_stacked_weights(device: str) -> None:
    call = problem("lstm", (4, 2))
    per = len(call.weights) // 4
    stacked = call._replace(weights=[torch.stack(call.weights[i::per]) for i in range(per)])
    found, expected = run(stacked, device), run(call, device)
    for i in range(per):
        for d, gradient in enumerate(found.pop(f"d leaf {3 + i}")):
            torch.testing.assert_close(gradient, expected.pop(f"d leaf {3 + d * per + i}"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_arrays_need_not_be_contiguous(device: str) -> None:
    call = problem("lstm", (2, 2))
    apart = call.grads[3].mT.contiguous().mT
    other = call._replace(resets=call.resets.t().contiguous().t(), grads=[*call.grads[:3], apart])
    check_identical(run(other, device), run(call, device))


def test_no_launches_without_resets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Recorded(launch.Launch):
        def __call__(self, grid: tuple[int, int, int], **numbers: int) -> None:
            launched.append(self._kernel.__name__)
            super().__call__(grid, **numbers)

    monkeypatch.setattr(passes, "Launch", Recorded)
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "step")
    call = problem("gru", (2, 2))
    run(call, device)
    steps = ["enter_forward", "gates_forward"] * 4 + ["gates_backward", "enter_backward"] * 4
    assert launched == steps
    launched.clear()
    run(call._replace(resets=None, h0=call.h0[:, :4]), device)
    assert launched == ["gates_forward"] * 4 + ["gates_backward"] * 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(device: str, cell: str, packed: bool) -> None:
    utilities = ("test_schema", "test_faketensor")
    ops, call = torch.ops.fastrnn_triton, problem(cell, (2, 2), packed=packed).to(device)
    given = (*call.arguments, True, call.resets)
    opcheck(ops.layer.default, given, test_utils=utilities)
    backward = tuple(call.backward_arguments(ops.layer(*given)))
    opcheck(ops.layer_backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize("kernel", ["resident", "streamed"])
def test_other_kernels_are_refused(
    device: str, ask: Callable[[str], None], kernel: str
) -> None:
    ask(kernel)
    call = problem("lstm", (1, 0), dtype=torch.float16)
    text = f"FASTRNN_TRITON_KERNEL={kernel} cannot be met: {kernel}: only kernels of one step take "
    with pytest.raises(RuntimeError, match=text + "resets"):
        run(call, device)
    call = call._replace(resets=None, h0=call.h0[:, :4], c0=call.c0[:, :4])
    with pytest.raises(RuntimeError, match=text + "gradients of cells"):
        run(call, device)
    run(call._replace(grads=[*call.grads[:3], None]), device)


def test_wrong_arguments(device: str) -> None:
    def refused(call: Call, text: str) -> None:
        with pytest.raises(RuntimeError, match=text):
            run(call, device)

    call = problem("lstm", (1, 0))
    resets, dcells = call.resets, call.grads[3]
    refused(call._replace(resets=resets[1:]), r"resets must have shape \[4, 4\], got \[3, 4\]")
    refused(call._replace(resets=resets.flatten()), r"resets must have shape \[4, 4\]")
    refused(call._replace(resets=resets.long()), "resets must have dtype torch.uint8")
    refused(call._replace(resets=resets.bool()), "resets must have dtype torch.uint8")
    refused(call._replace(h0=call.h0[:, :4]), r"h0 must have shape \[1, 8, 6\], got \[1, 4, 6\]")
    refused(call._replace(c0=call.h0[:, :4]), r"c0 must have shape \[1, 8, 6\], got \[1, 4, 6\]")
    refused(call._replace(resets=None), r"h0 must have shape \[1, 4, 6\], got \[1, 8, 6\]")

    def with_dcells(dcells: Tensor) -> Call:
        return call._replace(grads=[*call.grads[:3], dcells])

    refused(with_dcells(dcells[:, 1:]), r"dcells must have shape \[1, 16, 6\], got \[1, 15, 6\]")
    refused(with_dcells(dcells.double()), "dcells must have dtype torch.float32")
    other = problem("gru", (1, 0))
    refused(other._replace(grads=[*other.grads[:3], dcells]), "gru has no cell state, but one was")
    packed = problem("lstm", (1, 0), packed=True)
    refused(packed._replace(resets=resets), r"resets must have shape \[11\], got \[4, 4\]")
    low = problem("lstm", (1, 0), dtype=torch.float16)
    wrong = low._replace(grads=[*low.grads[:3], low.grads[3].half()])
    refused(wrong, "dcells must have dtype torch.float32")


def test_storages_that_were_freed_are_not_read(device: str) -> None:
    ops = torch.ops.fastrnn_triton
    call = problem("lstm", (1, 0)).to(device)
    given = call.backward_arguments(ops.layer(*call.arguments, True, call.resets))
    for place, name in ((15, "resets"), (16, "dcells")):
        wrong = [*given[:place], freed(given[place].clone()), *given[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"the storage of {name} holds 0 bytes"):
            ops.layer_backward(*wrong)
