"""Resets, lengths and the states of all steps, against their definition (pieces.py)."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from pieces import CELLS, DTYPES, KINDS, Problem, checked, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from compare import engines, use_engine
from fastrnn import lengths as rows_of_lengths

PROBLEMS = st.builds(
    Problem, cell=st.sampled_from(sorted(CELLS)), seed=st.integers(0, 10**6), T=st.integers(1, 7),
    B=st.integers(1, 5), I=st.integers(1, 5), H=st.sampled_from([4, 5, 9, 16]),
    layers=st.integers(1, 2), bidirectional=st.booleans(), batch_first=st.booleans(),
    bias=st.booleans(), kind=st.sampled_from(KINDS), frequency=st.sampled_from([0.0, 0.3, 1.0]),
    with_hx=st.booleans(), reset_rows=st.integers(0, 2),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", engines())
@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(problem=PROBLEMS)
def test_pieces_run_as_if_alone(isa: str, dtype: torch.dtype, problem: Problem) -> None:
    # Rounding to 16 bits moves steps of ReLU across its kink, where the derivative jumps.
    assume(problem.cell != "rnn_relu" or dtype.itemsize > 2)
    with pytest.MonkeyPatch.context() as patch, use_engine(isa):
        if problem.kind == "masked":
            patch.setattr(rows_of_lengths, "_is_symbolic", lambda _: True)
        checked(problem, dtype, return_states=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("steps", [True, 1, 2, 4, 100])
@pytest.mark.parametrize("kind", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_recomputed_segments(engine: str, cell: str, kind: str, steps: Any) -> None:
    checked(make(cell, kind), torch.float64, recompute=steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("H", [64, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_large(cell: str, kind: str, H: int, threads: int) -> None:
    """Sizes at which threads share the hidden units or the rows; the same bits for any number."""
    torch.set_num_threads(threads)
    problem = make(cell, kind, T=40, B=2 if H == 64 else 40, H=H, layers=1)
    for p in problem.module.parameters():
        p.data.mul_(0.5)
    checked(problem, torch.float64, return_states=True)


def test_one_number_of_threads_or_another() -> None:
    problem = make("gru", "dense", T=30, B=40, H=64)
    cotangents: dict[str, Tensor] = {}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(problem.got(torch.float32, cotangents, return_states=True))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_at_the_start_replaces_hx(engine: str, cell: str) -> None:
    problem = make(cell, "dense", layers=1, bidirectional=False)
    module, x = problem.module, problem.input
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    resets[0] = True
    hx = problem._state([s.requires_grad_() for s in problem.hx])
    output, _ = module(x, hx, resets=resets)
    torch.testing.assert_close(output, module(x)[0])
    output.sum().backward()
    assert not any(s.grad.any() for s in problem.hx)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_second_derivatives(engine: str, cell: str, kind: str) -> None:
    problem = make(cell, kind, T=3, B=2, H=4, layers=1)
    module = problem.module

    def run(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        n = len(problem.hx)
        data, named = problem._arguments(x)
        output, last, states = module(
            data, problem._state(list(state[:n])), return_states=True, **named,
            reset_hx=problem._state(list(state[n:])),
        )  # fmt: skip
        last = last if isinstance(last, tuple) else (last,)
        return (problem._padded(output), *last, *(s for s in states if s is not None))

    given = [t.requires_grad_() for t in (problem.input, *problem.hx, *problem.reset_hx)]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_recomputed_twice_is_refused() -> None:
    layer, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    output = layer(x, recompute=2)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiled(cell: str, dynamic: bool) -> None:
    torch.compiler.reset()
    problem = make(cell, "lengths")
    module, x = problem.module, problem.input
    named = {
        "resets": problem.resets, "lengths": torch.tensor(problem.lengths), "return_states": True,
        "reset_hx": problem._state(problem.reset_hx),
    }  # fmt: skip
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for run in (module, compiled):
        module.zero_grad()
        output, last, states = run(x, **named)
        (output.sum() + states.h.square().sum()).backward()
        flat = [output, *(last if isinstance(last, tuple) else (last,)), *states]
        found = [t for t in (*flat, *(p.grad for p in module.parameters())) if t is not None]
        if run is module:
            expected = [t.detach().clone() for t in found]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_recompute_breaks_a_graph_that_may_break() -> None:
    layer = fastrnn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(9, 2, 3, requires_grad=True)
    found = {}
    for name, run in (("compiled", torch.compile(layer, backend="aot_eager")), ("eager", layer)):
        output = run(x, recompute=3)[0]
        leaves = [x, *layer.parameters()]
        found[name] = [output, *torch.autograd.grad(output.square().sum(), leaves)]
    for one, other in zip(found["compiled"], found["eager"], strict=True):
        assert one.equal(other)
    torch.compiler.reset()  # forgets that the graph broke
    with pytest.raises(Exception, match="recompute is not possible under"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x, recompute=3)


def test_under_torch_func_the_reference_runs() -> None:
    layer, x = fastrnn.GRU(3, 4).double(), torch.randn(2, 5, 3, 3).double()
    resets = torch.rand(5, 3) < 0.3
    with pytest.warns(UserWarning, match="no rules of torch.func for resets"):
        mapped = torch.func.vmap(lambda one: layer(one, resets=resets)[0])(x)
    torch.testing.assert_close(mapped, torch.stack([layer(one, resets=resets)[0] for one in x]))


def test_states_are_those_of_the_steps(engine: str) -> None:
    layer = fastrnn.LSTM(3, 4, num_layers=2, batch_first=True)
    x = torch.randn(2, 5, 3)
    output, (h_n, c_n), states = layer(x, return_states=True)
    assert states.h.shape == states.c.shape == (2, 2, 5, 4)
    assert states.h[-1].equal(output)
    torch.testing.assert_close(states.h[:, :, -1], h_n)
    torch.testing.assert_close(states.c[:, :, -1], c_n)
    alone = layer(x[0], return_states=True)[2]
    assert alone.h.shape == alone.c.shape == (2, 5, 4)
    gru = fastrnn.GRU(3, 4)(x.transpose(0, 1), return_states=True)[2]
    assert gru.c is None
    assert isinstance(gru, fastrnn.States)


def test_impossible_lengths_are_marked_where_values_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_of_lengths, "_is_symbolic", lambda _: True)
    output, h_n = fastrnn.GRU(3, 4)(torch.randn(5, 3, 3), lengths=torch.tensor([6, 2, -1]))
    for result in (output, h_n):
        assert result[:, [0, 2]].isnan().all()
        assert not result[:, 1].isnan().any()


def test_recompute_beside_lengths_without_packing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_of_lengths, "_is_symbolic", lambda _: True)
    with pytest.raises(RuntimeError, match="recompute beside lengths"):
        fastrnn.GRU(3, 4)(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]), recompute=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_lengths_of_any_integer_type(
    masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of_lengths, "_is_symbolic", lambda _: masked)
    layer, x, lengths = fastrnn.GRU(3, 4), torch.randn(300, 2, 3), torch.tensor([100, 7])
    for one, other in zip(
        layer(x, lengths=lengths.to(dtype)), layer(x, lengths=lengths), strict=True
    ):
        assert one.equal(other)


def test_padding_may_hold_anything(engine: str) -> None:
    layer, x = fastrnn.GRU(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    x[3:, 1] = float("nan")
    x.requires_grad_()
    output, _ = layer(x, lengths=torch.tensor([5, 3]))
    output.sum().backward()
    assert not output.isnan().any()
    assert not output[3:, 1].any()
    assert not any(p.grad.isnan().any() for p in layer.parameters())  # type: ignore[union-attr]
    assert x.grad is not None
    assert not x.grad[3:, 1].any()


@pytest.mark.parametrize("cell", CELLS)
def test_no_row_has_a_step(engine: str, cell: str) -> None:
    """hx comes back as a tensor of its own, and everything is part of the graph."""
    problem = make(cell, "lengths")
    module, x = problem.module, problem.input.requires_grad_()
    before = [s.clone() for s in problem.hx]
    hx = problem._state(problem.hx)
    nothing = torch.zeros(x.shape[1], dtype=torch.long)
    output, last, states = module(x, hx, lengths=nothing, return_states=True)
    assert not output.any()
    assert not any(s.any() for s in states if s is not None)
    for mine, own in zip(last if isinstance(last, tuple) else (last,), before, strict=True):
        assert mine.equal(own)
        found = torch.autograd.grad(mine.sum(), [x, *module.parameters()], retain_graph=True)
        assert not any(g.any() for g in found)
        mine.detach().zero_()
    assert all(s.equal(b) for s, b in zip(problem.hx, before, strict=True))


def test_gradients_of_lengths_in_a_graph_of_torch_operations() -> None:
    """What make_fx records is what runs."""
    layer, x, lengths = fastrnn.GRU(3, 4), torch.randn(5, 3, 3), torch.tensor([5, 0, 2])

    def gradient(data: Tensor) -> Tensor:
        data = data.detach().requires_grad_()
        return torch.autograd.grad(layer(data, lengths=lengths)[0].square().sum(), data)[0]

    graph = make_fx(gradient)(x)
    torch.testing.assert_close(graph(2 * x), gradient(2 * x))
    x.requires_grad_()
    output = layer(x, lengths=lengths)[0]

    def backward(grad: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, grad, retain_graph=True)[0]

    grad = torch.randn_like(output)
    torch.testing.assert_close(make_fx(backward)(grad)(2 * grad), backward(2 * grad))


@pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference")
def test_lengths_in_forward_mode_and_with_batches_of_gradients() -> None:
    layer, lengths = fastrnn.LSTM(3, 4, bidirectional=True).double(), torch.tensor([5, 0, 2])
    x = torch.randn(5, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda data: layer(data, lengths=lengths, return_states=True)[2],
        (x,), check_forward_ad=True, check_batched_grad=True,
    )  # fmt: skip


def test_lengths_of_tensors_without_data() -> None:
    with FakeTensorMode():
        layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 3, 3)
        output, (h_n, c_n) = layer(x, lengths=torch.tensor([5, 0, 2]))
        assert (output.shape, h_n.shape, c_n.shape) == ((5, 3, 4), (1, 3, 4), (1, 3, 4))


def test_lengths_under_another_default_device() -> None:
    layer, x, lengths = fastrnn.GRU(3, 4), torch.randn(5, 3, 3), torch.tensor([5, 0, 2])
    expected = layer(x, lengths=lengths)
    with torch.device("meta"):
        found = layer(x, lengths=lengths)
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_reset_rows(engine: str, cell: str) -> None:
    module, x = getattr(fastrnn, cell)(3, 4), torch.randn(3, 3)
    pair = cell == "LSTMCell"

    def state(rows: int) -> Any:
        return (torch.randn(rows, 4), torch.randn(rows, 4)) if pair else torch.randn(rows, 4)

    def of_rows(s: Any, rows: Any) -> Any:
        return tuple(t[rows] for t in s) if pair else s[rows]

    hx, other = state(3), state(3)
    reset = torch.tensor([True, False, True])
    for behind in (None, other):
        got = module(x, hx, reset=reset, reset_hx=behind)
        kept = module(x[1:2], of_rows(hx, [1]))
        begun = module(x[[0, 2]], None if behind is None else of_rows(behind, [0, 2]))
        for one, carried, fresh in zip(
            *((s if pair else (s,)) for s in (got, kept, begun)), strict=True
        ):
            torch.testing.assert_close(one[1:2], carried)
            torch.testing.assert_close(one[[0, 2]], fresh)
    torch.testing.assert_close(module(x, reset=reset), module(x))
    function = getattr(fastrnn.functional, cell.lower().replace("cell", "_cell"))
    options = {"reset": reset, "reset_hx": other}
    expected = module(x, hx, **options)
    torch.testing.assert_close(function(x, hx, *module.parameters(), **options), expected)
    with pytest.raises(TypeError, match="reset must be a bool tensor"):
        module(x, hx, reset=torch.ones(3))
    with pytest.raises(ValueError, match=r"reset must have shape \(3,\)"):
        module(x, hx, reset=torch.ones(2).bool())
    with pytest.raises(ValueError, match="without reset"):
        module(x, hx, reset_hx=other)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_of_steps(batch_first: bool) -> None:
    layer, x = fastrnn.GRU(3, 4, batch_first=batch_first), torch.randn(5, 3, 3)
    lengths = torch.tensor([5, 0, 2])
    mask = torch.arange(5)[:, None] < lengths
    data, marks = (t.transpose(0, 1) if batch_first else t for t in (x, mask))
    for one, other in zip(layer(data, mask=marks), layer(data, lengths=lengths), strict=True):
        assert one.equal(other)
    with pytest.raises(ValueError, match="without gaps"):
        layer(data, mask=~marks)
    with pytest.raises(ValueError, match="mask must have shape"):
        layer(data, mask=marks[:2])
    with pytest.raises(ValueError, match="mask needs an input of 3 dimensions"):
        layer(data[0], mask=marks)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        layer(data, mask=marks.float())
    with pytest.raises(ValueError, match="lengths and mask"):
        layer(data, mask=marks, lengths=lengths)


@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_under_autocast(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a call without options, however rows of lengths are run."""
    problem = make(cell, "lengths", layers=1)
    module, x = problem.module.float(), problem.input.float()
    lengths = torch.tensor(problem.lengths)

    def dtypes(**options: Any) -> list[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            output, last, *states = module(x, **options)
        last = last if isinstance(last, tuple) else (last,)
        assert all(s is None or s.dtype == output.dtype for found in states for s in found)
        return [t.dtype for t in (output, *last)]

    expected = dtypes()
    assert dtypes(lengths=torch.zeros_like(lengths), return_states=True) == expected
    assert dtypes(lengths=lengths, resets=problem.resets, return_states=True) == expected
    monkeypatch.setattr(rows_of_lengths, "_is_symbolic", lambda _: True)
    assert dtypes(lengths=lengths, resets=problem.resets, return_states=True) == expected
