"""What forward of torch.nn's recurrent modules returns, accepts and keeps, apart from its numbers.

Numbers are tested in test_modules.py, wrong calls in test_errors.py.
"""

from __future__ import annotations

import copy
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import LAYERS, both_libraries, build, make_hx, states
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence

import fastrnn


@both_libraries
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("name", "proj"), [("RNN", 0), ("LSTM", 0), ("LSTM", 2), ("GRU", 0)])
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_shapes_and_types(
    lib: ModuleType, name: str, proj: int, layout: str, batch_first: bool, given: bool
) -> None:
    options = {"proj_size": proj} if proj else {}
    layer = getattr(lib, name)(3, 4, 2, bidirectional=True, batch_first=batch_first, **options)
    state, rows = proj or 4, () if layout == "unbatched" else (5,)
    hx: Any = torch.randn(4, *rows, state)
    hx = (hx, torch.randn(4, *rows, 4)) if name == "LSTM" else hx
    shape = {"batched": (5, 6, 3) if batch_first else (6, 5, 3), "unbatched": (6, 3)}
    if layout == "packed":
        x: Any = pack_sequence([torch.randn(n, 3) for n in (2, 6, 1, 6, 4)], enforce_sorted=False)
    else:
        x = torch.randn(shape[layout])
    output, h_n = layer(x, hx) if given else layer(x)
    if layout == "packed":
        assert type(output) is PackedSequence
        assert torch.equal(output.batch_sizes, x.batch_sizes)
        assert torch.equal(output.sorted_indices, x.sorted_indices)
        assert torch.equal(output.unsorted_indices, x.unsorted_indices)
        assert output.data.shape == (19, 2 * state)
    else:
        assert output.shape == (*shape[layout][:-1], 2 * state)
    assert isinstance(h_n, tuple if name == "LSTM" else Tensor)
    assert states(h_n)[0].shape == (4, *rows, state)
    assert states(h_n)[-1].shape == (4, *rows, 4 if name == "LSTM" else state)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_grad_flags(lib: ModuleType, name: str, training: bool) -> None:
    layer, x = build(lib, name, 3, 4).train(training), torch.randn(5, 2, 3)
    hx = make_hx(name, 1, 2, 4)
    for h in states(hx):
        h.requires_grad_()
    output, h_n = layer(x, hx)
    assert all(y.requires_grad for y in (output, *states(h_n)))
    grads = torch.autograd.grad(output.sum(), states(hx))
    assert all(g.abs().sum() > 0 for g in grads)  # nothing detaches the initial state
    with torch.no_grad():
        output, h_n = layer(x, hx)
        assert not any(y.requires_grad for y in (output, *states(h_n)))


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_initial_state_may_be_a_list_or_any_view(lib: ModuleType, name: str) -> None:
    layer = build(lib, name, 3, 4, 2)
    x = torch.randn(2, 5, 6)[..., ::2].transpose(0, 1)
    assert not x.is_contiguous()
    views = {
        "expanded": lambda: torch.randn(2, 1, 4).expand(2, 2, 4),
        "transposed": lambda: torch.randn(4, 2, 2).permute(2, 1, 0),
        "strided": lambda: torch.randn(2, 2, 8)[..., ::2],
    }
    for make in views.values():
        hx = [make(), make()] if name == "LSTM" else make()
        output, _ = layer(x, hx)
        plain = tuple(h.contiguous() for h in hx) if name == "LSTM" else hx.contiguous()
        expected, _ = layer(x.contiguous(), plain)
        assert torch.allclose(output, expected, atol=1e-6)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_final_state_is_not_the_output(lib: ModuleType, name: str, steps: int) -> None:
    layer, x = build(lib, name, 3, 4, 2), torch.randn(steps, 2, 3, requires_grad=True)
    output, h_n = layer(x)
    before = output.detach().clone()
    assert torch.equal(states(h_n)[0][-1], output[-1])
    for h in states(h_n):
        h.mul_(2)  # changing a final state in place is allowed, also under autograd
    assert torch.equal(output, before)
    (output.sum() + sum(h.sum() for h in states(h_n))).backward()
    assert x.grad is not None


@both_libraries
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_output_may_be_changed_in_place(lib: ModuleType, name: str) -> None:
    x = torch.randn(3, 2, 3)
    grads = []
    for in_place in (False, True):
        layer = build(lib, name, 3, 4, 2)
        output, _ = layer(x)
        output = output.mul_(2) if in_place else output * 2
        output.sum().backward()
        grads.append(layer.weight_hh_l0.grad)
    assert torch.allclose(*grads)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(lib: ModuleType, name: str, batch_first: bool) -> None:
    layer = getattr(lib, name)(3, 4, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((0, 5, 3) if batch_first else (5, 0, 3), requires_grad=True)
    output, h_n = layer(x)
    assert output.shape == (*x.shape[:2], 8)
    assert all(h.shape == (4, 0, 4) for h in states(h_n))
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("batch_first", "shape"), [(False, (0, 2, 3)), (True, (2, 0, 3))])
def test_empty_sequence(
    lib: ModuleType, name: str, batch_first: bool, shape: tuple[int, ...]
) -> None:
    layer = getattr(lib, name)(3, 4, batch_first=batch_first)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(torch.randn(shape))


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_acts_between_layers_only(lib: ModuleType, name: str) -> None:
    x = torch.randn(6, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = build(lib, name, 3, 4, dropout=0.5)
    assert torch.equal(one(x)[0], one.eval()(x)[0])
    two = build(lib, name, 3, 4, 2, dropout=0.5)
    first, second = two(x), two(x)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(states(first[1])[0][0], states(second[1])[0][0])  # before the dropout
    assert torch.equal(two.eval()(x)[0], two(x)[0])


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_equals_one_sequence_at_a_time(
    lib: ModuleType, name: str, bidirectional: bool, enforce_sorted: bool
) -> None:
    lengths = (6, 4, 4, 1) if enforce_sorted else (4, 1, 6, 4)
    layer = build(lib, name, 3, 4, 2, bidirectional=bidirectional)
    sequences = [torch.randn(n, 3) for n in lengths]
    hx = make_hx(name, 4 if bidirectional else 2, 4, 4)
    output, h_n = layer(pack_sequence(sequences, enforce_sorted=enforce_sorted), hx)
    for row, (got, sequence) in enumerate(zip(unpack_sequence(output), sequences, strict=True)):
        alone = tuple(h[:, row].contiguous() for h in states(hx))
        expected, state = layer(sequence, alone if name == "LSTM" else alone[0])
        assert torch.allclose(got, expected, atol=1e-6)
        for a, b in zip(states(h_n), states(state), strict=True):
            assert torch.allclose(a[:, row], b, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in LAYERS]
    + [(name, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for name in LAYERS]
    + [("LSTM", {"proj_size": 2}), ("LSTM", {"bias": False})],
    ids=str,
)
def test_no_warnings(name: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = getattr(fastrnn, name)(3, 4, **options)
        x = torch.randn(5, 2, 3).transpose(0, 1)
        layer(x)[0].sum().backward()
        copy.deepcopy(layer)(pack_padded_sequence(x, [2, 2, 1, 1, 1]))
