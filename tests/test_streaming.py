"""`fastrnn.Stream`: chunks of any sizes are one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn


def flat(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


H_OF_TWO = torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    "state",
    [H_OF_TWO, (H_OF_TWO,), (H_OF_TWO,) * 3, (H_OF_TWO[:1],) * 2, (torch.zeros(4),) * 2, (0.0, 0.0),
     (H_OF_TWO, torch.zeros(2, 2, 4))],
)  # fmt: skip
def test_wrong_states_of_rows(state: Any) -> None:
    stream = fastrnn.Stream(fastrnn.LSTM(3, 4, num_layers=2))
    stream(torch.randn(5, 2, 3))
    before = [s.clone() for s in stream.state]
    with pytest.raises((TypeError, ValueError), match="Stream: "):
        stream.reset([1], state)
    assert all(s.equal(b) for s, b in zip(stream.state, before, strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "num_layers": 2}])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_chunks_are_one_sequence(
    engine: str, name: str, options: dict[str, Any], grad: bool
) -> None:
    layer, x = getattr(fastrnn, name)(3, 5, **options).double(), torch.randn(11, 2, 3).double()
    with torch.set_grad_enabled(grad):
        stream, found = fastrnn.Stream(layer), []
        for chunk in x.split([1, 4, 2, 3, 1]):
            data = chunk.transpose(0, 1) if options else chunk
            output = stream(data)
            found.append(output.transpose(0, 1) if options else output)
        expected, state = layer(x.transpose(0, 1) if options else x)
        expected = expected.transpose(0, 1) if options else expected
    torch.testing.assert_close(torch.cat(found), expected)
    torch.testing.assert_close(flat(stream.state), flat(state))
    assert not any(s.requires_grad for s in flat(stream.state))


@pytest.mark.parametrize("rows", [[1], torch.tensor([False, True, False]), torch.tensor([1])])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@torch.no_grad()
def test_rows_begin_anew(engine: str, name: str, rows: Any) -> None:
    layer, x = getattr(fastrnn, name)(3, 5).double(), torch.randn(4, 3, 3).double()
    stream = fastrnn.Stream(layer)
    stream(x)
    before = stream.state
    kept = [s.clone() for s in flat(before)]
    stream.reset(rows)
    output = stream.step(x[0])
    torch.testing.assert_close(output[1], layer(x[:1])[0][0, 1])
    torch.testing.assert_close(output[[0, 2]], layer(x[:1], before)[0][0, [0, 2]])
    assert all(s.equal(k) for s, k in zip(flat(before), kept, strict=True))  # not in place
    stream.reset()
    torch.testing.assert_close(stream(x), layer(x)[0])
    own = tuple(torch.ones(1, 1, 5).double() for _ in flat(stream.state))
    stream.reset(rows, own if name == "LSTM" else own[0])
    assert all(s[0, 1].eq(1).all() and not s[0, 0].eq(1).all() for s in flat(stream.state))


def test_states_come_second(engine: str) -> None:
    stream = fastrnn.Stream(fastrnn.GRU(3, 5))
    output, states = stream(torch.randn(4, 2, 3), return_states=True)
    assert states.h[0].equal(output)


def test_truncated_training(engine: str) -> None:
    """Gradients of every chunk are those of the chunk from the state that it was given."""
    layer, x = fastrnn.LSTM(3, 5).double(), torch.randn(6, 2, 3).double()
    stream = fastrnn.Stream(layer)
    for chunk in x.split(2):
        stream(chunk).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    state = None
    for chunk in x.split(2):
        output, state = layer(chunk, state)
        output.square().sum().backward()
        state = tuple(s.detach() for s in state)
    for one, p in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_wrong_layers_and_rows() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.Stream(fastrnn.GRU(3, 4, bidirectional=True))
    with pytest.raises(TypeError, match="got Linear"):
        fastrnn.Stream(torch.nn.Linear(3, 4))
    stream = fastrnn.Stream(fastrnn.GRU(3, 4))
    stream.reset([0])  # nothing to reset yet
    with pytest.raises(ValueError, match="no rows yet"):
        stream.reset([0], torch.zeros(1, 1, 4))
    stream(torch.randn(5, 2, 3))
    with pytest.raises(IndexError):
        stream.reset([2])
    stream.reset([])
    unbatched = fastrnn.Stream(fastrnn.GRU(3, 4))
    unbatched(torch.randn(5, 3))
    with pytest.raises(ValueError, match="rows must be indices or a bool tensor"):
        stream.reset(torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="rows must be indices or a bool tensor"):
        stream.reset(torch.ones(2).byte())
    with pytest.raises(ValueError, match="without batch"):
        unbatched.reset([0])
