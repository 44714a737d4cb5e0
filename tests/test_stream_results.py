"""What the steps of a stream give and leave: results like any others, nothing written by a call
that fails, nothing lost where other threads change the module."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from compare import engines, use_engine
from test_stream import make, needs_native


@needs_native
@pytest.mark.parametrize("isa", [e for e in engines() if e != "reference"])
@torch.no_grad()
def test_results_are_no_views(isa: str) -> None:
    with use_engine(isa):
        cell = fastrnn.GRUCell(4, 5)(torch.randn(3, 4))
        output = fastrnn.RNN(4, 5, batch_first=True)(torch.randn(3, 2, 4))[0]
    for result in (cell, output):
        result.detach_()
        assert not result._is_view()


@needs_native
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_outputs_of_batch_first_are_no_views(options: dict[str, Any], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        output = fastrnn.RNN(4, 5, batch_first=True, **options)(torch.randn(3, 2, 4))[0]
    assert not output._is_view()


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers", "bias"])
@torch.no_grad()
def test_changed_attributes_are_seen(engine: str, name: str) -> None:
    layer, _ = make("rnn_tanh", 4, 5, num_layers=2)
    layer(torch.randn(3, 2, 4))
    setattr(layer, name, {"input_size": 3, "hidden_size": 6, "num_layers": 1, "bias": False}[name])
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(3, 2, 4))


@torch.no_grad()
def test_weight_with_negative_bit(engine: str) -> None:
    layer, twin = make("rnn_tanh", 4, 5)
    layer.weight_ih_l0 = nn.Parameter(torch._neg_view(torch.randn(5, 4)))
    x = torch.randn(3, 2, 4)
    for factor in (1.0, 0.0):
        layer.weight_ih_l0.mul_(factor)
        twin.weight_ih_l0.copy_(layer.weight_ih_l0)  # type: ignore[union-attr,operator]
        torch.testing.assert_close(layer(x)[0], twin(x)[0])


@needs_native
@torch.no_grad()
def test_a_profile_names_the_steps() -> None:
    layer, frame = fastrnn.GRU(3, 4), torch.randn(2, 3)
    layer.step(frame)
    with torch.profiler.profile() as profile:
        layer.step(frame)
    assert "fastrnn::step" in {event.key for event in profile.key_averages()}


@torch.no_grad()
def test_results_can_be_resized(engine: str) -> None:
    layer, _ = make("lstm", 4, 5)
    for x in (torch.randn(3, 2, 4), torch.randn(1, 2, 4)):
        output, state = layer(x)
        for _ in range(2):
            for t in (output, *state):
                assert t.resize_(100).numel() == 100
                t.untyped_storage().resize_(0)
            output, state = layer(x, tuple(torch.zeros(1, 2, 5) for _ in range(2)))


def wrong_out() -> dict[str, tuple[Any, str]]:
    with torch.inference_mode():
        inference = torch.zeros(1, 2, 9)
    memory = torch.zeros(27)
    return {
        "expanded": ((torch.zeros(1, 2, 9), torch.zeros(1, 1, 9).expand(1, 2, 9)), "strides"),
        "inference": ((torch.zeros(1, 2, 9), inference), "inference tensor"),
        "meta": ((torch.zeros(1, 2, 9), torch.zeros(1, 2, 9, device="meta")), "must be on cpu"),
        "twice": ((memory[:18].view(1, 2, 9),) * 2, "overlap"),
        "overlap": ((memory[:18].view(1, 2, 9), memory[9:].view(1, 2, 9)), "overlap"),
    }


@pytest.mark.parametrize("wrong", wrong_out())
@torch.no_grad()
def test_wrong_out_is_not_written(engine: str, wrong: str) -> None:
    layer, _ = make("lstm", 4, 9)
    out, message = wrong_out()[wrong]
    before = out[0]._version
    with pytest.raises(RuntimeError, match=message):
        layer.step(torch.randn(2, 4), None, out=out)  # type: ignore[operator]
    assert not out[0].any()
    assert out[0]._version == before


@torch.no_grad()
def test_a_failed_step_leaves_the_version_of_out(engine: str) -> None:
    layer, _ = make("gru", 3, 4)
    state = torch.zeros(1, 2, 4)
    before = state._version
    with pytest.raises(RuntimeError):
        layer.step(torch.randn(2, 5), None, out=state)  # type: ignore[operator]
    assert state._version == before


@torch.no_grad()
def test_out_beside_the_input(engine: str) -> None:
    """Rows written while another thread still reads."""
    torch.set_num_threads(2)
    layer, memory = fastrnn.GRU(32, 64), torch.randn(256 * 64)
    x, out = memory[: 256 * 32].view(256, 32), memory.view(1, 256, 64)
    expected = layer.step(x.clone())[0]
    assert torch.equal(layer.step(x, None, out=out)[0], expected)


@torch.no_grad()
def test_c_written_over_h(engine: str) -> None:
    layer = fastrnn.LSTM(3, 4, 2, proj_size=2)
    x, memory, c = torch.randn(1, 3), torch.randn(8), torch.randn(2, 1, 4)
    h = memory[:4].view(2, 1, 2)
    expected = layer.step(x, (h.clone(), c))
    out = torch.empty(2, 1, 2), memory.view(2, 1, 4)
    output, state = layer.step(x, (h, c), out=out)
    torch.testing.assert_close((output, *state), (expected[0], *expected[1]))


def test_a_tensor_that_left_a_transform(engine: str) -> None:
    layer, twin = make("gru", 3, 4)
    kept: list[Tensor] = []
    torch.func.grad(lambda v: (kept.append(v), v.sum())[1])(torch.randn(4, 2, 3))
    with torch.no_grad():
        torch.testing.assert_close(layer(kept[0])[0], twin(kept[0])[0])
    for module in (layer, twin):
        module(kept[0])[0].square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_step_runs_an_overridden_forward(engine: str) -> None:
    class Doubled(fastrnn.GRU):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    layer, x = Doubled(3, 4), torch.randn(2, 3)
    with_gradients = layer.step(x)[0]
    with torch.no_grad():
        torch.testing.assert_close(layer.step(x)[0], with_gradients)


@needs_native
def test_another_thread_replaces_the_weights() -> None:
    layer, done = fastrnn.LSTM(8, 8), threading.Event()
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}

    def replace() -> None:
        while not done.is_set():
            for name, value in zeros.items():
                setattr(layer, name, nn.Parameter(value.clone()))

    state = [torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)]

    def exchange() -> None:
        while not done.is_set():
            state[0], state[1] = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)

    threads = [threading.Thread(target=target) for target in (replace, exchange)]
    for thread in threads:
        thread.start()
    try:
        with torch.inference_mode():
            for _ in range(3000):
                output = layer.step(torch.zeros(1, 8), state)[0]  # type: ignore[arg-type]
                assert output.isfinite().all()
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_out_may_be_part_of_a_graph(engine: str, cell: str) -> None:
    """With gradients enabled `out` is written as `copy_` writes, by frozen layers too."""
    layer, _ = make(cell, 4, 6)
    layer.requires_grad_(False)
    x = torch.randn(3, 4)
    layer(x[None])  # the short way is there now

    def pair(t: Tensor) -> Any:
        return (t, torch.zeros_like(t)) if cell == "lstm" else t

    leaf = torch.zeros(1, 3, 6, requires_grad=True)
    with pytest.raises(RuntimeError):
        layer.step(x, None, pair(leaf))
    written = leaf * 2
    layer.step(x, None, pair(written))
    written.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_gradients_enabled_inside_of_inference_mode(engine: str) -> None:
    for batch_first in (False, True):
        layer = fastrnn.GRU(4, 6, batch_first=batch_first)
        with torch.inference_mode(), torch.enable_grad():
            output, h_n = layer(torch.randn(3, 2, 4))
            cell = fastrnn.GRUCell(4, 6)(torch.randn(2, 4))
        assert not any(t.requires_grad for t in (output, h_n, cell))
