"""What a GPU asks beside right numbers: streams, graphs, devices, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from compare import check_identical

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
LAYERS = ["RNN", "LSTM", "GRU"]


def both(name: str, device: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, name)(6, 16, **options)
    ours = getattr(fastrnn, name)(6, 16, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    for p in layer.parameters():
        p.grad = None
    output = layer(x)[0]
    output.square().sum().backward()
    return {"y": output.detach()} | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(device: str, name: str, value: float) -> None:
    ours, theirs = both(name, device)
    x = torch.randn(7, 5, 6, device=device)
    x[2, 3, 1] = value
    got, expected = ours(x)[0].cpu(), theirs(x)[0].cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("name", LAYERS)
def test_twice_the_same_bits(device: str, kernel: str, name: str) -> None:
    layer, _ = both(name, device, num_layers=2, bidirectional=True)
    x = torch.randn(33, 9, 6, device=device)
    check_identical(gradients(layer, x), gradients(layer, x))


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward(device: str, name: str) -> None:
    results = []
    for layer in both(name, device):
        x = torch.linspace(-1, 1, 5 * 2 * 6, device=device).view(5, 2, 6).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no second derivative
            (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(slope.square().sum(), x)
        results.append(second)
    torch.testing.assert_close(*results)


def test_backward_in_evaluation(device: str) -> None:
    """cuDNN refuses it."""
    ours, _ = both("LSTM", device)
    grads = gradients(ours.eval(), torch.randn(3, 2, 6, device=device))
    assert all(g.isfinite().all() for g in grads.values())


def test_dropout_draws_the_same_masks_for_a_seed(device: str) -> None:
    layer, _ = both("GRU", device, num_layers=3, dropout=0.5)
    x, results = torch.randn(4, 3, 6, device=device), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_input_and_weights_apart_are_refused(device: str) -> None:
    layer, _ = both("LSTM", device)
    with pytest.raises(RuntimeError, match="device"):
        layer(torch.randn(3, 2, 6, device="meta"))


@needs_gpu
@pytest.mark.parametrize("name", LAYERS)
def test_another_stream(device: str, kernel: str, name: str) -> None:
    layer, _ = both(name, device)
    x = torch.randn(50, 8, 6, device=device)
    expected = gradients(layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gradients(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    check_identical(got, expected)


@needs_gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [False, True])
def test_capture_in_a_graph(device: str, kernel: str, name: str, train: bool) -> None:
    layer, _ = both(name, device)
    x = torch.randn(20, 4, 6, device=device)

    def call() -> dict[str, Tensor]:
        if train:
            return gradients(layer, x)
        with torch.no_grad():
            return {"y": layer(x)[0]}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    got = {k: v.clone() for k, v in captured.items()}
    check_identical(got, call())


@needs_gpu
def test_nothing_waits_for_the_device(device: str, kernel: str) -> None:
    layer, _ = both("LSTM", device)
    x = torch.randn(20, 3, 6, device=device)
    gradients(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_tf32_flags_are_honoured(device: str, kernel: str) -> None:
    layer = fastrnn.LSTM(512, 512).to(device)
    nn.init.zeros_(layer.weight_ih_l0)  # the recurrent products alone: a graph keeps their flags
    x, h = torch.randn(20, 64, 512, device=device), torch.randn(1, 64, 512, device=device)
    results = []
    for allowed in (False, True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        results.append(layer(x, (h, h))[0])
    assert 0 < (results[1] - results[0]).abs().max() < 1e-2
    assert torch.equal(results[2], results[0])


@needs_gpu
@pytest.mark.parametrize("name", [*LAYERS, "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: str, name: str, dtype: torch.dtype) -> None:
    """The dtype of autocast; torch.nn's layers give float16 even under bfloat16."""
    layer = getattr(fastrnn, name)(6, 16).to(device)
    x = torch.randn(*((5, 3, 6) if name in LAYERS else (3, 6)), device=device)
    with torch.autocast("cuda", dtype=dtype):
        result = layer(x)
    assert (result[0] if isinstance(result, tuple) else result).dtype == dtype


@needs_gpu
@needs_two
def test_another_device(device: str) -> None:
    layer, _ = both("GRU", "cuda:1")
    expected, _ = both("GRU", "cuda:0")
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(layer(x.to("cuda:1"))[0].cpu(), expected(x.to("cuda:0"))[0].cpu())
    assert torch.cuda.current_device() == 0
