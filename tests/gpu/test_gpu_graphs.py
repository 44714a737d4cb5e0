"""Steps that run as graphs (FASTRNN_CUDA_KERNEL=step-graph, csrc/cuda/program.h): one serves every
call of a shape, whatever its length, its weights and its memory."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import cuda_on_host
import fastrnn
from compare import check, check_identical
from fastrnn import _ops, cuda_graphs

LAYERS = ["RNN", "LSTM", "GRU"]


@pytest.fixture(autouse=True)
def _graphs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "step-graph")


def results(layer: nn.Module, x: Tensor, lengths: list[int] | None = None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    given: Any = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths))
    output, state = layer(given)
    y = output if lengths is None else output.data
    h = state if isinstance(state, Tensor) else torch.cat([s.flatten() for s in state])
    names = [name for name, _ in layer.named_parameters()]
    weights = [p for _, p in layer.named_parameters()]
    # Slopes that grow: rows and steps differ.
    slopes = [torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t).to(t) for t in (y, h)]
    grads = torch.autograd.grad([y, h], [x, *weights], slopes)
    return {"y": y.detach(), "h": h.detach()} | dict(zip(["x", *names], grads, strict=True))


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor, lengths: list[int] | None) -> None:
    theirs.load_state_dict(ours.state_dict())
    same = results(theirs, x, lengths)
    exact = results(theirs.double(), x.double(), lengths)
    check(results(ours, x, lengths), same, exact)
    theirs.float()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 5}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_all_lengths_and_weights(
    device: str, name: str, options: dict[str, Any]
) -> None:
    if "proj_size" in options and name != "LSTM":
        return
    ours = getattr(fastrnn, name)(3, 12, **options).to(device)
    theirs = getattr(nn, name)(3, 12, **options).to(device)

    def calls(*shapes: tuple[int, list[int] | None]) -> None:
        for steps, lengths in shapes:
            with torch.no_grad():
                for weight in ours.parameters():
                    weight.uniform_(-0.4, 0.4)
            compare(ours, theirs, torch.randn(steps, 4, 3, device=device), lengths)

    calls((9, None), (20, [20, 1, 1, 1]))
    before, count = cuda_on_host.programs() if device == "cpu" else None, kept(device)
    calls((40, None), (7, [7, 7, 2, 1]), (64, [64, 33, 33, 9]), (1, None))
    assert kept(device) == count
    if before is not None:
        after = cuda_on_host.programs()
        assert after.recorded == before.recorded
        assert after.run > before.run + 20


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_one_shape_take_turns(device: str, name: str) -> None:
    ours = getattr(fastrnn, name)(12, 12, num_layers=3).to(device)
    theirs = getattr(nn, name)(12, 12, num_layers=3).to(device)
    compare(ours, theirs, torch.randn(20, 4, 12, device=device), None)


@pytest.mark.parametrize("train", [False, True])
def test_threads(device: str, train: bool) -> None:
    layers = [fastrnn.GRU(3, 12).to(device) for _ in range(4)]
    inputs = [torch.randn(30, 4, 3, device=device) for _ in layers]

    def call(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
        if train:
            return results(layer, x)
        with torch.no_grad():
            return {"y": layer(x)[0]}

    expected = [call(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    found: list[list[dict[str, Tensor]]] = [[] for _ in layers]

    def run(i: int) -> None:
        # The choice of a backend is the thread's.
        with fastrnn.use_backend("native"):
            for _ in range(10):
                found[i].append(call(layers[i], inputs[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rounds, wanted in zip(found, expected, strict=True):
        assert len(rounds) == 10
        for got in rounds:
            check_identical(got, wanted)


def kept(device: str) -> int:
    if device == "cpu":
        return cuda_on_host.programs().kept
    count: int = importlib.import_module("fastrnn._C").kept_programs()
    return count


def test_as_many_are_kept_as_are_said(device: str) -> None:
    """And those that are kept still run when others have gone."""
    layer = fastrnn.LSTM(2, 32).to(device)
    inputs = {batch: torch.randn(24, batch, 2, device=device) for batch in range(1, 140)}
    expected = {}
    for batch, x in inputs.items():
        with torch.no_grad():
            expected[batch] = layer(x)[0]
        assert kept(device) <= 64
    assert kept(device) > 0
    for batch in (139, 138, 100, 1):
        with torch.no_grad():
            assert torch.equal(layer(inputs[batch])[0], expected[batch])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host's kernels say that they are not")
def test_steps_run_one_by_one_where_nothing_can_be_recorded(device: str) -> None:
    layer, x = fastrnn.GRU(2, 4), torch.randn(20, 3, 2)
    expected = results(layer, x)
    cuda_on_host.allow_programs(False)
    try:
        before = cuda_on_host.programs()
        check_identical(results(layer, x), expected)
        assert cuda_on_host.programs().run == before.run
    finally:
        cuda_on_host.allow_programs(True)


def test_a_pass_that_fails_leaves_nothing_taken(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All go when there are too many, as soon as no pass has one."""
    with pytest.raises(RuntimeError, match=r"B=3000 would keep .* more than 64 MiB"):
        fastrnn.RNN(2, 4096 - 96).to(device).half()(
            torch.ones(20, 3000, 2, device=device, dtype=torch.float16)
        )
    for batch in range(1, 70):
        fastrnn.RNN(2, 4).to(device)(torch.ones(16, batch, 2, device=device))
    assert kept(device) <= 64


def test_a_layer_whose_launches_do_not_matter_is_refused(device: str) -> None:
    layer = fastrnn.LSTM(2, 1500).to(device)
    with pytest.raises(RuntimeError, match="step-graph cannot be met: weight_hh of 34 MiB"):
        layer(torch.ones(1, 1, 2, device=device))
    fastrnn.LSTM(2, 1500, proj_size=2).to(device)(torch.ones(20, 1, 2, device=device))


def test_other_names_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "magic")
    with pytest.raises(RuntimeError, match="FASTRNN_CUDA_KERNEL=magic cannot be met: there are"):
        fastrnn.GRU(2, 4).to(device)(torch.ones(1, 1, 2, device=device))
    monkeypatch.setenv("FASTRNN_PERSISTENT", "yes")
    with pytest.raises(RuntimeError, match="FASTRNN_PERSISTENT must be 0 or 1, and is yes"):
        fastrnn.GRU(2, 4).to(device)(torch.ones(1, 1, 2, device=device))


class FakeCuda:
    """What cuda_graphs.record takes of torch.cuda, and the order in which it does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = False

    def current_stream(self) -> Any:
        return self.stream_of("current", 0)

    def stream_of(self, name: str, pointer: int) -> Any:
        def wait(other: Any) -> None:
            self.calls.append(f"{name} waits for {other.name}")

        return SimpleNamespace(
            name=name, cuda_stream=pointer, device_index=0, device="cuda:0", wait_stream=wait
        )

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.calls.append("off")

    def CUDAGraph(self) -> Any:
        def begin(capture_error_mode: str) -> None:
            assert not torch.is_inference_mode_enabled()
            self.calls.append(f"begin {capture_error_mode}")

        return SimpleNamespace(
            capture_begin=begin, capture_end=lambda: self.calls.append("end"),
            replay=lambda: self.calls.append("replay"), reset=lambda: self.calls.append("reset"),
        )  # fmt: skip

    def steps(self, stream: int) -> None:
        self.calls.append(f"steps {stream}")
        if self.fails and self.calls.count("steps 7") == 2:
            raise RuntimeError("a step failed")


@pytest.mark.parametrize("fails", [False, True])
def test_recording(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    cuda = FakeCuda()
    cuda.fails = fails
    for name in ("current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(cuda_graphs, "_side_stream", lambda _: cuda.stream_of("side", 7))
    recorded = ["side waits for current", "on side", "steps 7", "begin relaxed", "steps 7", "end"]
    if fails:
        with pytest.raises(RuntimeError, match="a step failed"):
            cuda_graphs.record(cuda.steps)
        assert cuda.calls == [*recorded, "off", "current waits for side"]
        return
    with torch.inference_mode():
        program = cuda_graphs.record(cuda.steps)
    program.replay()
    program.close()
    assert cuda.calls == [*recorded, "off", "current waits for side", "replay", "reset"]


def test_release(device: str) -> None:
    fastrnn.GRU(2, 4).to(device)(torch.ones(20, 3, 2, device=device))
    assert kept(device) > 0
    if device == "cpu":
        cuda_on_host.release_programs()
    else:
        cuda_graphs.release()
    assert kept(device) == 0


@pytest.mark.skipif(not _ops.has_cuda, reason="built without CUDA kernels")
def test_what_records_says_what_products_depend_on() -> None:
    """Without a GPU: the functions that the extension calls are there, and give what it takes."""
    flag = torch.backends.cuda.matmul.allow_tf32
    found = []
    try:
        for allowed in (False, True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found.append(cuda_graphs.product_settings())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = flag
    assert found[0] == found[2] != found[1]
