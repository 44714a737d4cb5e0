"""What was once found wrong, one test each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastrnn
from compare import check, engines, use_engine

KINDS = ["RNN", "LSTM", "GRU"]
needs_auto = pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference")


def twins(kind: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    theirs = getattr(nn, kind)(*sizes, **options)
    ours = getattr(fastrnn, kind)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(
    module: Any, input: Tensor, cotangent: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    module.to(dtype)
    leaf = input.detach().to(dtype).requires_grad_()
    names = ["input", *(name for name, _ in module.named_parameters())]
    found = torch.autograd.grad(
        module(leaf)[0], [leaf, *module.parameters()], cotangent.to(dtype)
    )
    return dict(zip(names, found, strict=True))


@needs_auto
@pytest.mark.parametrize("kind", KINDS)
def test_vectorized_jacobian(kind: str) -> None:
    ours, theirs = twins(kind, 3, 4)
    input = torch.randn(3, 2, 3)
    got, expected = (
        {"jacobian": torch.autograd.functional.jacobian(lambda v: m(v)[0], input, vectorize=True)}  # noqa: B023
        for m in (ours, theirs)
    )
    exact = torch.autograd.functional.jacobian(lambda v: theirs.double()(v)[0], input.double())
    check(got, expected, {"jacobian": exact})


@needs_auto
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_through_a_backward_pass(kind: str) -> None:
    ours, theirs = twins(kind, 3, 4)
    tangents = []
    for module in (ours, theirs.double(), theirs):
        dtype = torch.float64 if module is theirs else torch.float32
        torch.manual_seed(0)
        input = torch.randn(5, 2, 3, dtype=torch.float64).to(dtype).requires_grad_()
        output = module(input)[0]
        with fw.dual_level():
            cotangent = fw.make_dual(torch.ones_like(output), torch.full_like(output, 2.0))
            (gradient,) = torch.autograd.grad(output, input, cotangent)
            tangents.append({"tangent": fw.unpack_dual(gradient).tangent})
    check(tangents[0], {"tangent": tangents[1]["tangent"].float()}, tangents[1])


@needs_auto
@pytest.mark.parametrize("kind", KINDS)
def test_complex_layers(kind: str) -> None:
    ours, theirs = twins(kind, 3, 4)
    ours.to(torch.complex64), theirs.to(torch.complex64)
    input = torch.randn(5, 2, 3, dtype=torch.complex64)
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])


def test_wrong_weights_are_refused(engine: str) -> None:
    gru = fastrnn.GRU(3, 4, bidirectional=True, bias=False)
    gru.weight_ih_l0 = nn.Parameter(torch.randn(14, 3))
    gru.weight_ih_l0_reverse = nn.Parameter(torch.randn(10, 3))
    rnn = fastrnn.RNN(3, 4)
    rnn.bias_ih_l0 = nn.Parameter(torch.randn(10, 4))
    lstm, wider, fewer = fastrnn.LSTM(3, 4), fastrnn.GRU(3, 4), fastrnn.GRU(3, 4, num_layers=2)
    lstm.bias = False
    wider.hidden_size = 5
    fewer.num_layers = 1
    for module in (gru, rnn, lstm, wider, fewer):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
                module(torch.randn(5, 2, 3))
    unknown = fastrnn.GRU(3, 4)
    unknown.mode = "X"
    with pytest.raises(ValueError, match="unknown mode"):
        unknown(torch.randn(5, 2, 3))


@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_cotangents_reach_the_weights_as_in_torch(engine: str, kind: str, where: int) -> None:
    """Also through the zeros that stand for an initial state that was not given."""
    ours, theirs = twins(kind, 3, 4)
    input, cotangent = torch.randn(4, 2, 3), torch.ones(4, 2, 4)
    cotangent[where, 0, 0] = float("nan")
    check(
        gradients(ours, input, cotangent, torch.float32),
        gradients(theirs, input, cotangent, torch.float32),
        gradients(theirs, input, cotangent, torch.float64),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_hooks_may_change_the_layout(engine: str, kind: str) -> None:
    ours, theirs = twins(kind, 3, 4)
    input, cotangent = torch.randn(4, 2, 3), torch.randn(4, 2, 4)

    def other_layout(t: Tensor) -> Tensor:
        return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, other_layout):
        got = gradients(ours, input, cotangent, torch.float32)
    check(
        got,
        gradients(theirs, input, cotangent, torch.float32),
        gradients(theirs, input, cotangent, torch.float64),
    )


@pytest.mark.parametrize("part", [slice(None), slice(1, None)], ids=["all", "some steps"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_changed_in_place(engine: str, kind: str, part: slice) -> None:
    """The gradient is that of the layer as it ran, whatever became of its output."""
    ours, theirs = twins(kind, 3, 4, num_layers=2)
    input = torch.randn(4, 2, 3)

    def run(module: Any, dtype: torch.dtype, in_place: bool) -> dict[str, Tensor]:
        module.to(dtype)
        leaf = input.to(dtype).requires_grad_()
        output = module(leaf)[0]
        loss = (output[part].mul_(3.0) if in_place else 3.0 * output[part]).sum()
        found = torch.autograd.grad(loss, [leaf, *module.parameters()])
        return {str(i): g for i, g in enumerate(found)}

    check(
        run(ours, torch.float32, True),
        run(theirs, torch.float32, False),
        run(theirs, torch.float64, False),
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_states_of_cells_changed_in_place(engine: str, kind: str, batch: int) -> None:
    """Episode resets multiply the states by a mask."""
    ours, theirs = twins(kind, 3, 4)
    input, first = torch.randn(5, batch, 3), torch.randn(batch, 4)

    def run(module: Any, dtype: torch.dtype, in_place: bool) -> dict[str, Tensor]:
        module.to(dtype)
        leaves = [input.to(dtype).requires_grad_(), first.to(dtype).requires_grad_()]
        state: Any = (leaves[1],) * 2 if kind == "LSTMCell" else leaves[1]
        loss = torch.zeros((), dtype=dtype)
        for x in leaves[0]:
            state = module(x, state)
            states = state if isinstance(state, tuple) else (state,)
            for s in states:
                loss = loss + (3.0 * s).sum()
            states = tuple(s.mul_(0.5) if in_place else 0.5 * s for s in states)
            state = states if kind == "LSTMCell" else states[0]
        found = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        return {str(i): g for i, g in enumerate(found)}

    check(
        run(ours, torch.float32, True),
        run(theirs, torch.float32, False),
        run(theirs, torch.float64, False),
    )


def test_output_changed_behind_autograd(engine: str) -> None:
    ours, _ = twins("GRU", 3, 4)
    input = torch.randn(4, 2, 3)
    expected = torch.autograd.grad(ours(input)[0].sum(), list(ours.parameters()))
    output = ours(input)[0]
    loss = output.sum()
    output.detach().zero_()
    found = torch.autograd.grad(loss, list(ours.parameters()))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_gradients_of_both_biases_are_tensors_of_their_own(engine: str) -> None:
    ours, _ = twins("LSTM", 3, 4)
    for _ in range(2):
        ours(torch.randn(4, 2, 3))[0].sum().backward()
    assert ours.bias_ih_l0.grad.data_ptr() != ours.bias_hh_l0.grad.data_ptr()


def test_parametrizations_run_once_per_call() -> None:
    layer = fastrnn.LSTM(3, 4)
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return 2 * weight

    parametrize.register_parametrization(layer, "weight_hh_l0", Counted(), unsafe=True)
    calls.clear()
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(5, 2, 3))
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["rows", "columns", "dtype", "storage"])
def test_weights_that_changed_in_place_are_seen(change: str) -> None:
    layer, input = fastrnn.GRU(6, 8), torch.randn(5, 2, 6)
    with torch.no_grad():
        layer(input)
        weight = layer.weight_hh_l0
        if change == "rows":
            weight.data = weight.data[:16]
        elif change == "columns":
            weight.data = weight.data.view(16, 12)
        elif change == "dtype":
            weight.data = weight.data.view(torch.bfloat16)
        else:
            weight.untyped_storage().resize_(64)
        with pytest.raises((RuntimeError, ValueError)):
            layer(input)


def test_state_of_nones_is_refused() -> None:
    with torch.no_grad(), pytest.raises((AttributeError, TypeError)):
        fastrnn.LSTM(3, 4)(torch.randn(5, 2, 3), (None, None))


def test_sums_over_many_features_stay_exact() -> None:
    theirs = nn.RNN(20000, 8)
    ours = fastrnn.RNN(20000, 8)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.rand(8, 20000) / 20000)
        ours.load_state_dict(theirs.state_dict())
        input = torch.rand(7, 3, 20000)
        got, same = ours(input)[0], theirs(input)[0]
        exact = copy.deepcopy(theirs).double()(input.double())[0]
    check({"output": got}, {"output": same}, {"output": exact})


@pytest.mark.parametrize("kind", ["RNN", "GRU", "projected"])
@pytest.mark.parametrize("isa", [e for e in engines() if e != "reference"])
def test_long_sums_of_narrow_layers(isa: str, kind: str) -> None:
    """Sums over a million rows, of one sign, are made of parts: torch.nn's own reach 8e-4."""
    options = {"proj_size": 2} if kind == "projected" else {}
    ours, theirs = twins("LSTM" if options else kind, 4, 3 if options else 2, **options)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(p.abs_())
    input, cotangent = torch.rand(2, 500_000, 4), torch.rand(2, 500_000, 2)
    with use_engine(isa):
        found = gradients(ours, input, cotangent, torch.float32)
    exact = gradients(theirs, input, cotangent, torch.float64)
    errors = {
        name: ((found[name] - g).abs().max() / (1 + g.abs().max())).item()
        for name, g in exact.items()
    }
    assert max(errors.values()) < 3e-6, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_few_steps_and_rows(
    engine: str, kind: str, batch: int, steps: int, dtype: torch.dtype
) -> None:
    """Backward passes read weight_hh where it lies, or packed; wide sums are cut in parts."""
    ours, theirs = twins(kind, 3, 75, bidirectional=True)
    input, first = torch.randn(steps, batch, 3), torch.randn(2, batch, 75)
    cotangent = torch.randn(steps, batch, 150)

    def run(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        module.to(dtype)
        leaves = [t.to(dtype).requires_grad_() for t in (input, first)]
        hx = (leaves[1], leaves[1]) if kind == "LSTM" else leaves[1]
        found = torch.autograd.grad(
            module(leaves[0], hx)[0], [*leaves, *module.parameters()], cotangent.to(dtype)
        )
        return {str(i): g for i, g in enumerate(found)}

    check(run(ours, dtype), run(copy.deepcopy(theirs), dtype), run(theirs, torch.float64))


def test_wrong_calls_that_count_like_right_ones() -> None:
    x, h, square = torch.randn(2, 3), torch.randn(2, 4), torch.randn(4, 4)
    lstm, rnn = fastrnn.LSTMCell(3, 4), fastrnn.RNNCell(3, 4)
    with pytest.raises(RuntimeError, match="biases must have shape"):
        fastrnn.functional.lstm_cell(x, (h, h), lstm.weight_ih, lstm.weight_hh, square, None)
    with pytest.raises(TypeError, match="weights must be Tensors"):
        fastrnn.functional.rnn_cell(x, h, rnn.weight_ih, None, rnn.weight_hh)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        fastrnn.LSTM(3, 4)(torch.randn(5, 2, 3), ())


def test_errors_of_hooks_are_not_taken_for_wrong_arguments() -> None:
    calls = []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise RuntimeError("the disk is full")

    for module, input in (
        (fastrnn.GRU(3, 4), torch.randn(5, 2, 3)),
        (fastrnn.GRUCell(3, 4), torch.randn(2, 3)),
    ):
        calls.clear()
        arguments = (input,) if isinstance(module, fastrnn.GRU) else (input, torch.randn(2, 4))
        with (
            pytest.raises(RuntimeError, match="the disk is full"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            module(*arguments)
        assert len(calls) == 1
