"""torch.distributed: two processes train what one trains, with torch.nn's layers and with
fastrnn's: DDP, FSDP2, and checkpoints between different numbers of processes.

Dimension key: T time, B batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastrnn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from processes import Pair
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LIBRARIES = {"torch.nn": nn, "fastrnn": fastrnn}
CELLS = ("RNN", "LSTM", "GRU")
STEPS, B, T = 4, 6, 5
Data = list[tuple[Tensor, Tensor]]

libraries = pytest.mark.parametrize("library", LIBRARIES)
cells = pytest.mark.parametrize("cell", CELLS)


class Model(nn.Module):
    """A net of two layers between linear ones; the sizes divide unevenly among processes."""

    def __init__(self, library: str, cell: str) -> None:
        super().__init__()
        self.before = nn.Linear(5, 6)
        self.rnn = getattr(LIBRARIES[library], cell)(6, 7, num_layers=2)
        self.behind = nn.Linear(7, 3)

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(self.before(input), state)
        return self.behind(output), state


def build(library: str, cell: str, kind: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(1)
    return kind(library, cell)


def batches(rank: int | None = None, steps: int = STEPS) -> Data:
    """Inputs [T, B, 5] and targets [T, B, 3]; for a rank every second row."""
    random = torch.Generator().manual_seed(2)
    rows = slice(rank, None, None if rank is None else 2)
    return [
        (
            torch.randn(T, B, 5, generator=random)[:, rows],
            torch.randn(T, B, 3, generator=random)[:, rows],
        )
        for _ in range(steps)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def train(model: nn.Module, data: Data, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One update per batch; every second batch continues from the state of the one before."""
    optimizer, state = optimizer or sgd(model), None
    for i, (input, target) in enumerate(data):
        output, state = model(input, None if i % 2 == 0 else detached(state))
        optimizer.zero_grad()
        mse_loss(output, target).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the whole model, on every rank."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@functools.cache
def alone(library: str, cell: str) -> dict[str, Tensor]:
    """The weights after one process has trained on whole batches."""
    model = build(library, cell)
    train(model, batches())
    return weights(model)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def check(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """Both processes end with the same bits, and but for rounding with what is expected."""
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert distance(results[0], expected) < 2e-6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def test_one_process_alone_learns_something_else_from_its_rows() -> None:
    """What `check` would see if the processes did not exchange gradients."""
    model = build("fastrnn", "LSTM")
    before = weights(model)
    train(model, batches(0))
    assert distance(before, alone("fastrnn", "LSTM")) > 1e-2
    assert distance(weights(model), alone("fastrnn", "LSTM")) > 1e-2


@cells
def test_both_libraries_learn_the_same_alone(cell: str) -> None:
    assert distance(alone("fastrnn", cell), alone("torch.nn", cell)) < 2e-6


def ddp(rank: int, library: str, cell: str, options: dict[str, bool]) -> dict[str, Tensor]:
    model = DistributedDataParallel(build(library, cell), **options)
    train(model, batches(rank))
    return weights(model)


@libraries
@cells
@pytest.mark.parametrize(
    "option", ["", "static_graph", "find_unused_parameters", "gradient_as_bucket_view"]
)
def test_ddp_trains_as_one_process(pair: Pair, library: str, cell: str, option: str) -> None:
    results = pair(ddp, library, cell, {option: True} if option else {})
    check(results, alone(library, cell))


class Branches(nn.Module):
    """Three layers, of which a call uses one."""

    def __init__(self, library: str, cell: str) -> None:
        super().__init__()
        layer = getattr(LIBRARIES[library], cell)
        self.layers = nn.ModuleList([layer(5, 3) for _ in range(3)])

    def forward(self, input: Tensor, branch: int) -> Tensor:
        output: Tensor = self.layers[branch](input)[0]
        return output


def ddp_branches(rank: int, library: str, cell: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(build(library, cell, Branches), find_unused_parameters=True)
    optimizer = sgd(model)
    for step, (input, target) in enumerate(batches(rank)):
        optimizer.zero_grad()
        mse_loss(model(input, (rank + step) % 2), target).backward()
        optimizer.step()
    return weights(model)


@libraries
@cells
def test_ddp_with_layers_that_a_process_does_not_use(pair: Pair, library: str, cell: str) -> None:
    """Each process uses one of two layers in turn, both never use the third."""
    model = build(library, cell, Branches)
    optimizer, shares = sgd(model), zip(batches(0), batches(1), strict=True)
    for step, share in enumerate(shares):
        optimizer.zero_grad()
        for rank, (input, target) in enumerate(share):
            (mse_loss(model(input, (rank + step) % 2), target) / 2).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.layers[2].parameters())
    check(pair(ddp_branches, library, cell), weights(model))


def shard(model: nn.Module, units: bool) -> nn.Module:
    """FSDP2: the recurrent layer as a unit of its own, or with the model around it."""
    if units:
        fully_shard(model.rnn)
    return fully_shard(model)


def accumulate(rank: int, library: str, cell: str, parallel: str) -> tuple[Any, ...]:
    """Two backward passes per update, and the gradients of weight_hh behind each of them."""
    plain, gradients = build(library, cell), []
    recurrent = plain.rnn.weight_hh_l0
    model = shard(plain, True) if parallel == "fsdp" else DistributedDataParallel(plain)
    optimizer, states = sgd(model), [None, None]
    for step, batch in enumerate(batches(rank)):
        optimizer.zero_grad()
        for part, rows in enumerate((slice(1), slice(1, None))):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(part == 1)
            wait = part == 0 and parallel == "ddp"
            with model.no_sync() if wait else contextlib.nullcontext():
                input, target = (tensor[:, rows] for tensor in batch)
                output, state = model(input, None if step % 2 == 0 else states[part])
                (mse_loss(output, target) * input.shape[1] / batch[0].shape[1]).backward()
            states[part] = detached(state)
            if parallel == "ddp":
                gradients.append(recurrent.grad.clone())
        optimizer.step()
    return weights(model), gradients


@libraries
@cells
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulated_gradients(pair: Pair, library: str, cell: str, parallel: str) -> None:
    (ours, gradients), (theirs, others) = pair(accumulate, library, cell, parallel)
    check([ours, theirs], alone(library, cell))
    if parallel == "ddp":  # exchanged after the second part only
        equal = [torch.equal(*pair) for pair in zip(gradients, others, strict=True)]
        assert equal == [False, True] * STEPS


def ddp_join(rank: int, library: str, cell: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(build(library, cell))
    with Join([model]):
        train(model, batches(rank, steps=2 + 2 * rank))
    return weights(model)


@libraries
@cells
def test_ddp_with_fewer_batches_in_one_process(pair: Pair, library: str, cell: str) -> None:
    """A process that has finished counts as one whose gradients are zero. Its optimizer stands
    still, and it gets the weights of the other at the end."""
    model = build(library, cell)
    optimizer, states = sgd(model), [None, None]
    for step in range(4):
        optimizer.zero_grad()
        for rank in (0, 1) if step < 2 else (1,):
            input, target = batches(rank)[step]
            state = None if step % 2 == 0 else detached(states[rank])
            output, states[rank] = model(input, state)
            (mse_loss(output, target) / 2).backward()
        optimizer.step()
    check(pair(ddp_join, library, cell), weights(model))


def fsdp(rank: int, library: str, cell: str, units: bool) -> dict[str, Tensor]:
    model = shard(build(library, cell), units)
    train(model, batches(rank))
    assert all(isinstance(t, DTensor) for p in model.parameters() for t in (p, p.grad))
    return weights(model)


@libraries
@cells
@pytest.mark.parametrize("units", [True, False])
def test_fsdp_trains_as_one_process(pair: Pair, library: str, cell: str, units: bool) -> None:
    check(pair(fsdp, library, cell, units), alone(library, cell))


def sharded_layer(rank: int, library: str, cell: str) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a sharded layer without gradients: forward, forward once more, single steps."""
    layer = fully_shard(build(library, cell).rnn)
    input = torch.linspace(-1, 1, T * B * 6).view(T, B, 6)
    with torch.no_grad():
        outputs = [layer(input)[0], layer(input)[0]]
        layer.reshard()
        state, steps = None, []
        for row in input:
            if library == "fastrnn":
                output, state = layer.step(row, state)
            else:
                output, state = layer(row[None], state)
            steps.append(output.view(B, 7))
    return outputs[0], outputs[1], torch.stack(steps)


@cells
def test_a_sharded_layer_without_gradients(pair: Pair, cell: str) -> None:
    expected = pair(sharded_layer, "torch.nn", cell)[0]
    for result in pair(sharded_layer, "fastrnn", cell):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    parts = get_state_dict(model, optimizer)
    dcp.load({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts[0], optim_state_dict=parts[1])


def half(
    rank: int | None, library: str, cell: str, parallel: str, folder: str, second: bool
) -> dict[str, Tensor]:
    """One half of the training: the first saves a checkpoint, the second starts from it."""
    model = build(library, cell)
    if parallel == "fsdp":
        model = shard(model, units=True)
    elif parallel == "ddp":
        model = DistributedDataParallel(model)
    optimizer = sgd(model)
    if second:
        load(model, optimizer, folder)
    train(model, batches(rank)[2:] if second else batches(rank)[:2], optimizer)
    if not second:
        save(model, optimizer, folder)
    return weights(model)


@cells
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("torch.nn", "torch.nn"), ("torch.nn", "fastrnn"), ("fastrnn", "torch.nn"),
     ("fastrnn", "fastrnn")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # with one process: meant
def test_checkpoints_move_between_one_process_and_two(
    pair: Pair, cell: str, parallel: str, first: str, second: str, tmp_path: Path
) -> None:
    """Weights and optimizer; saved with one library, loaded with the same or the other."""
    pair(half, first, cell, parallel, str(tmp_path / "two"), False)
    result = half(None, second, cell, "", str(tmp_path / "two"), True)
    assert distance(result, alone(second, cell)) < 2e-6
    half(None, first, cell, "", str(tmp_path / "one"), False)
    check(pair(half, second, cell, parallel, str(tmp_path / "one"), True), alone(second, cell))
