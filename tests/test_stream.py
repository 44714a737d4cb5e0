"""`module.step`: equal to a sequence of one step, whatever happens to the weights in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from compare import check, engines, use_engine
from fastrnn import _ops

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 5}),
    "gru": ("GRU", {}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(_ops.native_error is not None, reason="pure-Python install")


def named(output: Tensor, state: Any) -> dict[str, Tensor]:
    states = state if isinstance(state, tuple) else (state,)
    return {"output": output} | dict(zip(("h", "c"), states, strict=False))


def make(
    cell: str, I: int = 3, H: int = 9, **options: Any  # noqa: E741
) -> tuple[nn.Module, nn.Module]:
    """A fastrnn layer and torch.nn's with the same weights."""
    name, extra = CELLS[cell]
    layer = getattr(fastrnn, name)(I, H, **options, **extra)
    return layer, layer.to_torch()


def state_of(layer: Any, B: int, dtype: torch.dtype) -> Any:
    h = torch.randn(layer.num_layers, B, layer.proj_size or layer.hidden_size, dtype=dtype)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(layer.num_layers, B, layer.hidden_size, dtype=dtype)


def by_torch(layer: nn.Module, frames: Tensor, state: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    module = copy.deepcopy(layer).to(dtype)
    cast = tuple(s.to(dtype) for s in state) if isinstance(state, tuple) else state
    cast = cast.to(dtype) if isinstance(cast, Tensor) else cast
    output, new = module(frames.to(dtype), cast)
    return named(output, new)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "I", "H", "layers"), [(1, 3, 9, 1), (1, 40, 70, 2), (3, 1, 6, 3), (7, 33, 17, 1)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_a_sequence(
    engine: str, cell: str, B: int, I: int, H: int, layers: int, dtype: torch.dtype  # noqa: E741
) -> None:
    layer, twin = make(cell, I, H, num_layers=layers)
    layer.to(dtype)
    frames, state = torch.randn(4, B, I).to(dtype), state_of(layer, B, dtype)
    outputs, now = [], state
    with torch.no_grad():
        for frame in frames:
            output, now = layer.step(frame, now)  # type: ignore[operator]
            outputs.append(output)
        same, exact = (by_torch(twin.to(dtype), frames, state, t) for t in (dtype, torch.float64))
    check(named(torch.stack(outputs), now), same, exact)


@needs_native
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", [e for e in engines() if e != "reference"])
def test_fast_path_is_taken(isa: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without gradients nor, of one layer, with them; with them of more layers it is."""
    layer, _ = make(cell)
    deep, _ = make(cell, num_layers=2)
    monkeypatch.setattr(fastrnn.layers, "run", lambda *a: pytest.fail("the general path"))
    with use_engine(isa), torch.no_grad():
        for module in (layer, deep):
            module.step(torch.randn(2, 3))  # type: ignore[operator]
            module(torch.randn(1, 2, 3))
    with use_engine(isa):
        assert layer(torch.randn(5, 2, 3))[0].requires_grad
        assert not layer.requires_grad_(False)(torch.randn(5, 2, 3))[0].requires_grad
        with pytest.raises(pytest.fail.Exception, match="the general path"):
            deep(torch.randn(5, 2, 3))


UPDATES: dict[str, Callable[[Any], None]] = {
    "in place": lambda m: m.weight_hh_l0.add_(0.1),
    "in place through data": lambda m: m.weight_hh_l0.data.mul_(0.5),
    "data swapped": lambda m: setattr(m.weight_ih_l0, "data", torch.randn(m.weight_ih_l0.shape)),
    "data a view of itself": lambda m: setattr(
        m.weight_hh_l0, "data", m.weight_hh_l0.data.unflatten(0, (-1, 9)).mT.flatten(0, 1)
    ),
    "another parameter": lambda m: setattr(
        m, "weight_hh_l0", nn.Parameter(torch.randn(m.weight_hh_l0.shape))
    ),
    "bias": lambda m: m.bias_ih_l0.add_(1.0),
    "load_state_dict": lambda m: m.load_state_dict(
        {name: torch.randn(p.shape) for name, p in m.state_dict().items()}
    ),
    "load_state_dict assign": lambda m: m.load_state_dict(
        {name: torch.randn(p.shape) for name, p in m.state_dict().items()}, assign=True
    ),
    "numpy": lambda m: m.weight_hh_l0.data.numpy().fill(0.25),
    "reset_parameters": lambda m: m.reset_parameters(),
    "vector to parameters": lambda m: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters())), m.parameters()
    ),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_no_update_of_the_weights_is_missed(engine: str, cell: str, update: str) -> None:
    layer, _ = make(cell, 9, 9)
    frame, old = torch.randn(2, 9), state_of(layer, 2, torch.float32)
    with torch.no_grad():
        before = layer.step(frame, old)[0]  # type: ignore[operator]
        UPDATES[update](layer)
        output, state = layer.step(frame, old)  # type: ignore[operator]
        expected, expected_state = layer(frame[None], old)
    assert not torch.equal(output, before)
    torch_like = named(expected[0], expected_state)
    check(named(output, state), torch_like, torch_like)


def test_an_optimizer_step_and_functional_call_are_seen(engine: str) -> None:
    layer, _ = make("gru")
    frame = torch.randn(2, 3)
    with torch.no_grad():
        before = layer.step(frame)[0]  # type: ignore[operator]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(4, 2, 3))[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer.step(frame)[0]  # type: ignore[operator]
    assert not torch.equal(before, after)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, frame: Tensor) -> Tensor:
            return self.layer.step(frame)[0]  # type: ignore[operator]

    others = {f"layer.{name}": torch.randn(p.shape) for name, p in layer.named_parameters()}
    with torch.no_grad():
        called = torch.func.functional_call(Model(), others, (frame,))
        assert torch.equal(layer.step(frame)[0], after)  # type: ignore[operator]
        layer.load_state_dict({k.removeprefix("layer."): v for k, v in others.items()})
        torch.testing.assert_close(called, layer(frame[None])[0][0])


def test_out_may_be_the_state(engine: str) -> None:
    for cell in CELLS:
        layer, _ = make(cell, num_layers=2)
        frame, state = torch.randn(2, 3), state_of(layer, 2, torch.float32)
        with torch.no_grad():
            output, new = layer.step(frame, state)  # type: ignore[operator]
            same, kept = layer.step(frame, state, out=state)  # type: ignore[operator]
        assert torch.equal(same, output)
        assert kept is state
        for a, b in zip(named(same, kept).values(), named(output, new).values(), strict=True):
            assert torch.equal(a, b)


def test_unbatched_and_batch_first(engine: str) -> None:
    for options in ({}, {"batch_first": True}):
        layer, _ = make("lstm", **options)
        frame = torch.randn(2, 3)
        with torch.no_grad():
            output, (h, c) = layer.step(frame)  # type: ignore[operator]
            one, (h1, c1) = layer.step(frame[0], (h[:, 0], c[:, 0]))  # type: ignore[operator]
            two, (_, c2) = layer.step(frame, (h, c))  # type: ignore[operator]
        assert output.shape == (2, 9)
        assert one.shape == (9,)
        assert h1.shape == c1.shape == (1, 9)
        torch.testing.assert_close(one, two[0])
        torch.testing.assert_close(c1, c2[:, 0])


def test_gradients_pass_through_steps(engine: str) -> None:
    layer, _ = make("lstm")
    frames = torch.randn(5, 2, 3)
    state, outputs = None, []
    for frame in frames:
        output, state = layer.step(frame, state)  # type: ignore[operator]
        outputs.append(output)
    by_steps = torch.autograd.grad(torch.stack(outputs).sum(), list(layer.parameters()))
    at_once = torch.autograd.grad(layer(frames)[0].sum(), list(layer.parameters()))
    for a, b in zip(by_steps, at_once, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_pickles_step_on_their_own(engine: str) -> None:
    layer, _ = make("gru")
    frame = torch.randn(1, 3)
    with torch.no_grad():
        expected = layer.step(frame)[0]  # type: ignore[operator]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin.step(frame)[0], expected)
            twin.weight_hh_l0.zero_()
            twin.step(frame)
        assert torch.equal(layer.step(frame)[0], expected)  # type: ignore[operator]
        fastrnn.restore(layer)
        pickle.dumps(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B", [1, 4, 5])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_without_gradients(
    engine: str, name: str, B: int, bias: bool, dtype: torch.dtype
) -> None:
    """Few rows run as steps do; the numbers and errors are those of the general path."""
    for options in ({}, {"nonlinearity": "relu"}) if name == "RNNCell" else ({},):
        theirs = getattr(nn, name)(5, 19, bias=bias, **options).to(dtype)
        ours = getattr(fastrnn, name)(5, 19, bias=bias, dtype=dtype, **options)
        ours.load_state_dict(theirs.state_dict())
        input, h = torch.randn(B, 5).to(dtype), torch.randn(B, 19).to(dtype)
        state: Any = (h, torch.randn(B, 19).to(dtype)) if name == "LSTMCell" else h
        double = copy.deepcopy(theirs).double()
        wide = tuple(s.double() for s in state) if name == "LSTMCell" else h.double()
        with torch.no_grad():
            for hx, hx64 in ((state, wide), (None, None)):
                results = ours(input, hx), theirs(input, hx), double(input.double(), hx64)
                check(*(
                    dict(zip("hc", r if isinstance(r, tuple) else (r,), strict=False))
                    for r in results
                ))  # fmt: skip
            before = ours(input, state)
            ours.weight_hh.data.mul_(0.5)
            changed = ours(input, state)
            assert not torch.equal(changed[0], before[0])
            for wrong in (torch.zeros(B, 6).to(dtype), torch.zeros(B, 5, 1).to(dtype)):
                with pytest.raises((RuntimeError, ValueError), match=r"size|Expected"):
                    ours(wrong, state)


def test_a_cell_of_another_nonlinearity(engine: str) -> None:
    cell, input = fastrnn.RNNCell(3, 4), torch.randn(1, 3)
    with torch.no_grad():
        cell(input)
        cell.nonlinearity = "relu"
        assert (cell(input) >= 0).all()
        cell.nonlinearity = "cubic"
        with pytest.raises(RuntimeError, match="cubic"):
            cell(input)


def test_a_replica_steps_over_its_own_weights(engine: str) -> None:
    """DataParallel copies a module's attributes and gives the copy other parameters."""
    layer, _ = make("gru")
    frame, state = torch.randn(1, 3), torch.randn(1, 1, 9)
    with torch.no_grad():
        layer.step(frame, state)  # type: ignore[operator]
        replica = layer._replicate_for_data_parallel()  # type: ignore[operator]
        for name, p in layer.named_parameters():
            setattr(replica, name, torch.randn(p.shape))
        expected = replica(torch.cat([frame[None]] * 9), state)[0][0]
        torch.testing.assert_close(replica.step(frame, state)[0], expected)


WRONG: dict[str, tuple[tuple[Any, ...], type[Exception]]] = {
    "input 3-D": ((torch.zeros(1, 2, 3),), ValueError),
    "input 0-D": ((torch.zeros(()),), ValueError),
    "input width": ((torch.zeros(2, 4),), RuntimeError),
    "input float64": ((torch.zeros(2, 3, dtype=torch.float64),), ValueError),
    "input list": (([1.0, 2.0, 3.0],), TypeError),
    "state tensor": ((torch.zeros(2, 3), torch.zeros(2, 1, 2, 9)), TypeError),
    "state batch": ((torch.zeros(2, 3), (torch.zeros(1, 3, 9),) * 2), RuntimeError),
    "state width": ((torch.zeros(2, 3), (torch.zeros(1, 2, 8),) * 2), RuntimeError),
    "state layers": ((torch.zeros(2, 3), (torch.zeros(2, 2, 9),) * 2), RuntimeError),
    "state dtype": ((torch.zeros(2, 3), (torch.zeros(1, 2, 9).double(),) * 2), RuntimeError),
    "state count": ((torch.zeros(2, 3), (torch.zeros(1, 2, 9),) * 3), RuntimeError),
    "out shape": ((torch.zeros(2, 3), None, (torch.zeros(1, 3, 9),) * 2), RuntimeError),
    "out dtype": ((torch.zeros(2, 3), None, (torch.zeros(1, 2, 9).half(),) * 2), RuntimeError),
    "out tensor": ((torch.zeros(2, 3), None, torch.zeros(1, 2, 9)), TypeError),
    "out count": ((torch.zeros(2, 3), None, (torch.zeros(1, 2, 9),)), TypeError),
    "out numbers": ((torch.zeros(2, 3), None, (0.0, 1.0)), TypeError),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_steps(engine: str, wrong: str) -> None:
    arguments, error = WRONG[wrong]
    layer, _ = make("lstm")
    with torch.no_grad():
        layer.step(torch.zeros(2, 3))  # type: ignore[operator]
        with pytest.raises(error):
            layer.step(*arguments)  # type: ignore[operator]


def test_bidirectional_is_refused(engine: str) -> None:
    layer, _ = make("gru", bidirectional=True)
    with torch.no_grad(), pytest.raises(ValueError, match="bidirectional"):
        layer.step(torch.zeros(2, 3))  # type: ignore[operator]


def test_weights_cut_short_are_refused(engine: str) -> None:
    layer, _ = make("gru")
    with torch.no_grad():
        layer.step(torch.zeros(2, 3))  # type: ignore[operator]
        layer.weight_hh_l0.untyped_storage().resize_(16)
        with pytest.raises(RuntimeError, match="storage"):
            layer.step(torch.zeros(2, 3))  # type: ignore[operator]


@torch.no_grad()
def test_out_is_written_as_in_place(engine: str) -> None:
    layer, twin = make("gru", 4, 5, num_layers=2)
    buffer, frame = torch.randn(3, 2, 5), torch.randn(2, 4)
    expected = twin(frame[None], buffer[:2].clone())[1]
    state = buffer[:2].clone()
    before = state._version
    layer.step(frame, state, out=state)  # type: ignore[operator]
    assert state._version > before
    layer.step(frame, buffer[:2], out=buffer[1:])  # type: ignore[operator]
    for found in (state, buffer[1:]):
        torch.testing.assert_close(found, expected)
    with torch.inference_mode():
        state = torch.zeros(2, 2, 5)
        layer.step(frame, state, out=state)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="nference tensor"):
        layer.step(frame, out=state)  # type: ignore[operator]
