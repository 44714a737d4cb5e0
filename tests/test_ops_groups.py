"""What vmap makes of the operators, asked of them directly: an input for each member of an ensemble
(M * I features, group d reads the (d mod M)-th), and weight gradients by parts of the batch.

Against the reference, one group and one part at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from compare import bits, check, engines, poisoned_memory, use_engine
from fastrnn import reference

pytestmark = pytest.mark.skipif(
    fastrnn._ops.native_error is not None, reason="pure-Python install: there are no operators"
)

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NATIVE = [e for e in engines() if e.startswith("native")]
# members M, groups D, direction
GROUPS = [(1, 1, 0), (2, 2, 1), (3, 3, 0), (2, 4, 2), (3, 6, 2), (2, 4, 0), (1, 4, 2), (5, 5, 1)]
SIZES = [(3, 4, 3, 5), (1, 2, 1, 1), (4, 6, 20, 17), (2, 12, 2, 8)]  # T, B, I, H
LENGTHS = [7, 7, 5, 2, 1]  # of packed rows


@pytest.fixture(params=NATIVE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_engine(request.param):
        yield request.param


def problem(
    cell: str, groups: tuple[int, int, int], size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32, packed: bool = False, bias: bool = True,
    states: bool = True, entering: int = 1,
) -> list[Any]:  # fmt: skip
    """Arguments of ``layer``, without ``save``; entering: rows of h0 and c0 for each of the batch.
    """
    (M, D, direction), (T, B, I, H) = groups, size  # noqa: E741
    projected, cell = cell == "lstm_proj" and H > 1, cell.removesuffix("_proj")
    info, P = reference.CELLS[cell], H // 2 if projected else H
    if packed:
        T, B = LENGTHS[0], len(LENGTHS)
    batch_sizes = torch.tensor([sum(n > t for n in LENGTHS) for t in range(T)]) if packed else None
    lead = (sum(LENGTHS),) if packed else (T, B)
    integers = cell == "rnn_relu"  # exact: rounding decides no ReLU

    def randn(*shape: int, scale: float = 0.5) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape).to(dtype) / 4
        return (scale * torch.randn(*shape)).to(dtype)

    G = info.gates
    shapes = [(G * H, I), (G * H, P), *[(G * H,)] * (2 * bias), *[(P, H)] * projected]
    weights = [randn(*s, scale=0.6 / s[-1] ** 0.5) for _ in range(D) for s in shapes]
    h0 = randn(D, entering * B, P) if states or packed else None
    c0 = randn(D, entering * B, H) if info.has_c and states else None
    return [cell, randn(*lead, M * I), weights, h0, c0, batch_sizes, D, direction]


def cotangents(forward: Any, has_c: bool) -> list[Any]:
    output, h_n, c_n = forward[:3]
    return [torch.randn_like(output), torch.randn_like(h_n),
            torch.randn_like(c_n) if has_c else None]  # fmt: skip


def named(forward: Any, backward: Any) -> dict[str, Tensor]:
    dinput, dweights, dh0, dc0 = backward
    names = ("output", "h_n", "c_n", "cells", "saved")
    found = dict(zip(names, forward, strict=True)) | {"dinput": dinput, "dh0": dh0, "dc0": dc0}
    found |= {f"dweight{i}": g for i, g in enumerate(dweights)}
    return {k: v for k, v in found.items() if v.numel()}


def run(ops: Any, call: list[Any], grads: list[Any], wanted: list[int]) -> dict[str, Tensor]:
    forward = ops.layer(*call, True)
    output, _, _, cells, saved = forward
    cell, input, *rest = call
    backward = ops.layer_backward(cell, *grads, input, output, cells, saved, *rest, wanted)
    return named(forward, backward)


def by_hand(
    call: list[Any], grads: list[Any], wanted: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same by ``reference.layer`` of each group and of each part of the batch, alone."""
    cell, input, weights, h0, c0, batch_sizes, D, direction = call
    per = len(weights) // D
    I, parts = weights[0].shape[1], max(1, *wanted)  # noqa: E741
    M = input.shape[-1] // I
    forwards, dinput = [], torch.zeros_like(input, dtype=torch.float64)
    found: dict[str, list[Any]] = {"dh0": [], "dc0": []}
    of_weights: list[Any] = []
    for d in range(D):
        columns = slice(d % M * I, d % M * I + I)
        reverse = int(reference.reversed_group(d, D, direction))
        x = input[..., columns].to(dtype).requires_grad_()
        own = [w.to(dtype).requires_grad_() for w in weights[d * per : d * per + per]]
        states = [None if s is None else s[d : d + 1].to(dtype) for s in (h0, c0)]
        P, B = own[1].shape[1], input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        H = own[1].shape[0] // reference.CELLS[cell].gates
        if states[0] is None:
            states[0] = x.new_zeros(1, B, P)
        if cell == "lstm" and states[1] is None:
            states[1] = x.new_zeros(1, B, H)
        given = [s if s is None else s.detach().requires_grad_() for s in states]
        results = reference.layer(cell, x, own, *given, batch_sizes, 1, reverse)
        forwards.append([r.detach() for r in results])
        targets = [g if g is None else g.to(dtype) for g in grads]
        targets[0] = targets[0][..., d * P : d * P + P]
        targets[1:] = [g if g is None else g[d : d + 1] for g in targets[1:]]
        terms = [r * g for r, g in zip(results, targets, strict=False) if g is not None]
        leaves = [x, given[0], *([given[1]] if cell == "lstm" else []), *own]
        got = torch.autograd.grad(sum(t.sum() for t in terms), leaves, retain_graph=True)  # type: ignore[arg-type]
        dinput[..., columns] += got[0]
        found["dh0"].append(got[1])
        found["dc0"] += got[2:3] if cell == "lstm" else []
        for i, w in enumerate(own):
            n = wanted[3 + d * per + i]
            if n <= 1:
                of_weights.append(got[len(got) - per + i])
                continue
            rows = range(0, B, B // parts)
            each = [
                torch.autograd.grad(
                    sum(t[:, r : r + B // parts].sum() for t in terms), w, retain_graph=True  # type: ignore[arg-type]
                )[0]
                for r in rows
            ]
            of_weights.append(torch.stack(each))
    columns_of = list(zip(*forwards, strict=True))
    forward = [torch.cat(columns_of[0], -1), *(torch.cat(c) for c in columns_of[1:3])]
    forward += [torch.cat(columns_of[3]), torch.cat(columns_of[4])]
    states_found = [torch.cat(found[k]) if found[k] else x.new_empty(0) for k in ("dh0", "dc0")]
    return named(forward, (dinput.to(dtype), of_weights, *states_found))


def wanted_of(call: list[Any], parts: int) -> list[int]:
    return [1, 1, int(call[0] == "lstm"), *[parts] * len(call[2])]


def stacked(call: list[Any], wanted: list[int], size: int) -> tuple[list[Any], list[int]]:
    """The same call, and flags, with weights of ``size`` groups at a time."""
    weights, D = call[2], call[6]
    per = len(weights) // D
    entries = [(g * per, i) for g in range(0, D, size) for i in range(per)]
    stacks = [torch.stack(weights[f + i : f + size * per : per]) for f, i in entries]
    return changed(call, weights=stacks), [*wanted[:3], *(wanted[3 + f + i] for f, i in entries)]


def apart(found: dict[str, Tensor], call: list[Any], size: int, parts: int) -> dict[str, Tensor]:
    """The gradients of weights of ``size`` groups at a time as those of each group."""
    per = len(call[2]) // call[6]
    result = {k: v for k, v in found.items() if not k.startswith("dweight")}
    for name, gradient in found.items():
        if name.startswith("dweight"):
            entry, kind = divmod(int(name.removeprefix("dweight")), per)
            for s, own in enumerate(gradient.unbind(int(parts > 1))):
                result[f"dweight{(entry * size + s) * per + kind}"] = own
    return result


def agree(
    ops: Any, call: list[Any], parts: int, poisoned: bool = True, device: str = "cpu"
) -> None:
    """That the operators obey the rule of fastrnn.parity, next to the reference."""
    wanted = wanted_of(call, parts)
    grads = cotangents(reference.layer(call[0], call[1][..., : call[2][0].shape[1]], *call[2:]),
                       call[0] == "lstm")  # fmt: skip
    move = torch.utils._pytree.tree_map_only
    given, given_grads = (
        move(Tensor, lambda t: t if t.dtype == torch.int64 else t.to(device), tree)
        for tree in (call, grads)
    )
    if poisoned:
        with poisoned_memory():
            got = run(ops, given, given_grads, wanted)
    else:
        got = run(ops, given, given_grads, wanted)
    same = by_hand(call, grads, wanted, call[1].dtype)
    exact = by_hand(call, grads, wanted, torch.float64)
    got = {k: v.cpu() for k, v in got.items() if k in same}
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in same.items()}
    check(got, same, exact)
    D = call[6]
    for size in {D, max(n for n in range(1, D + 1) if D % n == 0 and n < max(D, 2))}:
        at_once, wanted_at_once = stacked(given, wanted, size)
        other = apart(run(ops, at_once, given_grads, wanted_at_once), call, size, parts)
        other = {k: other[k].cpu() for k in got}
        check(other, same, exact)
        if ops is torch.ops.fastrnn and device == "cpu":  # elsewhere products depend on addresses
            assert not [k for k in got if not torch.equal(bits(other[k]), bits(got[k]))], size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_members_and_parts(cell: str, dtype: torch.dtype) -> None:
    for i, groups in enumerate(GROUPS):
        size = SIZES[(i + i // 4 + DTYPES.index(dtype)) % len(SIZES)]
        call = problem(cell, groups, size, dtype, bias=i % 3 > 0, states=i % 2 > 0)
        counts = [n for n in range(1, size[1] + 1) if size[1] % n == 0]
        agree(torch.ops.fastrnn, call, counts[-1 - i % len(counts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_members_of_packed_data(cell: str, dtype: torch.dtype) -> None:
    for groups in GROUPS:
        agree(torch.ops.fastrnn, problem(cell, groups, SIZES[0], dtype, packed=True), 1)


@pytest.mark.parametrize("cell", CELLS)
def test_not_all_of_them_in_parts(cell: str) -> None:
    """Each weight is asked for as a whole, in parts, or not at all."""
    call = problem(cell, (2, 4, 2), (3, 6, 3, 5))
    wanted = [0, 0, 0, *itertools.islice(itertools.cycle([0, 3, 1, 3, 0, 1, 3]), len(call[2]))]
    grads = cotangents(torch.ops.fastrnn.layer(*call, False), cell.startswith("lstm"))
    got = run(torch.ops.fastrnn, call, grads, wanted)
    whole = run(torch.ops.fastrnn, call, grads, wanted_of(call, 1))
    parts = run(torch.ops.fastrnn, call, grads, wanted_of(call, 3))
    assert not {"dinput", "dh0", "dc0"} & set(got)
    for i, n in enumerate(wanted[3:]):
        name = f"dweight{i}"
        assert (name in got) == (n > 0)
        if n > 0:
            assert torch.equal(got[name], (whole if n == 1 else parts)[name])
    # for each of the rows, and of an empty batch
    rows = problem(cell, (1, 1, 0), (2, 0, 3, 5))
    none = cotangents(torch.ops.fastrnn.layer(*rows, False), cell.startswith("lstm"))
    empty = run(torch.ops.fastrnn, rows, none, wanted_of(rows, 4))
    for i, w in enumerate(rows[2]):
        assert torch.equal(empty[f"dweight{i}"], torch.zeros(4, *w.shape))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("isa")
def test_same_bits_for_any_threads(cell: str) -> None:
    before = torch.get_num_threads()
    for groups, parts in [((5, 10, 2), 1), ((3, 3, 0), 4), ((1, 1, 0), 12), ((1, 2, 2), 2)]:
        call = problem(cell, groups, (6, 12, 9, 48))
        grads = cotangents(torch.ops.fastrnn.layer(*call, False), cell.startswith("lstm"))
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(torch.ops.fastrnn, call, grads, wanted_of(call, parts)))
        torch.set_num_threads(before)
        for other in found[1:]:
            different = [k for k in other if not torch.equal(bits(other[k]), bits(found[0][k]))]
            assert not different


def changed(call: list[Any], **new: Any) -> list[Any]:
    names = ["cell", "input", "weights", "h0", "c0", "batch_sizes", "groups", "direction"]
    return [new.get(name, value) for name, value in zip(names, call, strict=True)]


def test_wrong_inputs_are_refused() -> None:
    """Features that are no multiple, or a number of inputs that does not divide the groups."""
    ops = torch.ops.fastrnn
    call = problem("gru", (2, 4, 2), SIZES[0])
    grads = cotangents(ops.layer(*call, False), False)
    results = ops.layer(*call, True)
    lead = call[1].shape[:-1]
    for width, text in [
        (7, "weight_ih must have shape"), (2, "weight_ih must have shape"),
        (0, "weight_ih must have shape"), (9, "does not divide the 2 groups of a direction"),
        (12, "does not divide the 2 groups"), (3 * 10**6, "does not divide the 2 groups"),
    ]:  # fmt: skip
        wrong = changed(call, input=torch.randn(*lead, width) if width < 100 else
                        torch.randn(1, 1, 1).expand(*lead, width))  # fmt: skip
        with pytest.raises(RuntimeError, match=text):
            ops.layer(*wrong, True)
        output, _, _, cells, saved = results
        cell, input, *rest = wrong
        with pytest.raises(RuntimeError, match=text):
            ops.layer_backward(
                cell, *grads, input, output, cells, saved, *rest, wanted_of(call, 1)
            )
    other = [w if i != 4 else torch.randn(15, 6) for i, w in enumerate(call[2])]
    with pytest.raises(RuntimeError, match="weight_ih must have shape"):
        ops.layer(*changed(call, weights=other), True)  # one group with more features


def refused_stacks(weights: list[Tensor]) -> list[tuple[list[Tensor], str]]:
    """Weights that are stacked in a wrong way for 4 groups, and what is said."""
    flat = [w[0] for w in weights]
    return [
        ([w[:3] for w in weights], "3 groups at a time do not make 4 groups"),
        ([w[:0] for w in weights], "0 groups at a time do not make 4 groups"),
        ([torch.cat([w, w]) for w in weights], "8 groups at a time do not make 4 groups"),
        ([weights[0], *flat[1:]], "weight_hh must have|at a time, got"),
        ([*weights[:-1], flat[-1]], "must have shape|at a time, got"),
        ([*weights[:-1], weights[-1][:1]], "must have shape|at a time, got"),
        ([flat[0], *weights[1:]], "weights are not 2 to 5 for each of 4 groups"),
        ([w[:2] for w in weights], "weights are not 2 to 5 for each of 2|must have shape"),
        (weights[:1], "1 weights are not 2 to 5"),
        ([weights[0], torch.zeros(()), *weights[2:]], "weight_hh must have|at a time, got"),
    ]


def test_wrong_stacks_are_refused() -> None:
    call = problem("gru", (2, 4, 2), SIZES[0])
    call = stacked(call, wanted_of(call, 1), 4)[0]
    assert len(call[2]) == 4
    torch.ops.fastrnn.layer(*call, False)
    for weights, text in refused_stacks(call[2]):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.fastrnn.layer(*changed(call, weights=weights), False)


@pytest.mark.parametrize("packed", [False, True])
def test_wrong_parts_are_refused(packed: bool) -> None:
    ops = torch.ops.fastrnn
    call = problem("lstm", (2, 2, 0), SIZES[0], packed=packed)
    grads = cotangents(ops.layer(*call, False), True)
    good = wanted_of(call, 1)
    for parts in (-1, 3, 5, 8, 2**40, -(2**63)) + ((2, 4) if packed else ()):
        for place in range(len(good)):
            wanted = [*good[:place], parts, *good[place + 1 :]]
            with pytest.raises(RuntimeError, match="wanted must hold 0, 1 or, of a weight, a "):
                run(ops, call, grads, wanted)
    for wanted in (good[:-1], [*good, 1], []):
        with pytest.raises(RuntimeError, match="wanted must hold 11 flags"):
            run(ops, call, grads, wanted)


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("cell", CELLS)
def test_parts_of_a_batch_with_resets(isa: str, cell: str, direction: int) -> None:
    """The gradients of weights by rows of the batch are those of each row alone."""
    torch.manual_seed(0)
    T, B = 6, 3
    call = problem(cell, (1, 1, direction), (T, B, 4, 5), torch.float64, entering=2)
    resets = torch.randint(0, 3, (T, B), dtype=torch.uint8)
    cell, x, weights, h0, c0, *_ = call
    doutput = torch.randn(T, B, weights[1].shape[1], dtype=x.dtype)
    has_c = cell == "lstm"

    def gradients(rows: slice, parts: int) -> list[Tensor]:
        h, c = (
            None if s is None else torch.cat([s[:, :B][:, rows], s[:, B:][:, rows]], 1)
            for s in (h0, c0)
        )
        own = (cell, x[:, rows].contiguous(), weights, h, c, None, 1, direction)
        output, _, _, cells, saved = torch.ops.fastrnn.layer(*own, True, resets[:, rows])
        wanted = [1, 1, int(has_c), *[parts] * len(weights)]
        grads = (doutput[:, rows], None, None)
        found = torch.ops.fastrnn.layer_backward(
            cell, *grads, own[1], output, cells, saved, *own[2:], wanted, resets[:, rows]
        )
        return list(found[1])

    together = gradients(slice(None), B)
    for b in range(B):
        for one, each in zip(gradients(slice(b, b + 1), 1), together, strict=True):
            torch.testing.assert_close(each[b], one)
