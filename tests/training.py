"""What the tests of training tools share: one network over any layer or cell, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from drop_in import LAYERS, build, states
from torch import Tensor, nn

import fastrnn
from compare import check, with_gradients

T, B, I, H = 6, 4, 5, 9  # noqa: E741 - the dimension key
STACK: dict[str, Any] = {"num_layers": 2, "dropout": 0.5}


class Net(nn.Module):
    """A layer, or a cell in a loop over time, and a readout.

    The result is always flat: outputs of the readout [T, B, 3], then the final states.
    """

    def __init__(
        self, lib: ModuleType, name: str, input_size: int = I, hidden_size: int = H, **options: Any
    ) -> None:
        super().__init__()
        self.name = name
        self.core = build(lib, name, input_size, hidden_size, **options)
        self.readout = nn.Linear(hidden_size, 3)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if self.name in LAYERS:
            output, state = self.core(input)
        else:
            state, steps = None, []
            for step in input:
                state = self.core(step, state)
                steps.append(states(state)[0])
            output = torch.stack(steps)
        return (self.readout(output), *states(state))


def stack(name: str) -> dict[str, Any]:
    """Options for two layers with dropout between them; none for a cell."""
    return STACK if name in LAYERS else {}


def data(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    """A random input, the same values in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (T, B, I), generator=generator).to(dtype)


def target(dtype: torch.dtype = torch.float32) -> Tensor:
    return data(dtype, T, B, 3)


def results(
    net: nn.Module, input: Tensor, call: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Results of `call(input)`, by default of the net, and the gradients of all leaves."""
    input = input.detach().clone().requires_grad_()
    outputs = dict(zip(("output", "h", "c"), (call or net)(input), strict=False))
    generator = torch.Generator().manual_seed(2)
    cotangents = {k: torch.randn(v.shape, generator=generator) for k, v in outputs.items()}
    leaves = {"input": input, **dict(net.named_parameters())}
    return with_gradients(outputs, leaves, cotangents)


def flat(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [value]
    return [t for item in value for t in flat(item)]


Run = Callable[[ModuleType, torch.dtype], Mapping[str, Tensor]]


def check_as_torch(run: Run, dtype: torch.dtype = torch.float32) -> None:
    """`run(library, dtype)` of fastrnn obeys the rule against torch.nn's."""
    check(run(fastrnn, dtype), run(nn, dtype), run(nn, torch.float64))


def sgd(net: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def losses_and_weights(
    net: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, steps: int = 3
) -> dict[str, Tensor]:
    """The loss of each of a few steps of training, and the parameters after the last."""
    found: dict[str, Tensor] = {}
    for i in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(data(dtype))[0], target(dtype))
        loss.backward()
        optimizer.step()
        found[f"loss {i}"] = loss.detach()
    return found | {k: p.detach().clone() for k, p in net.named_parameters()}


__all__ = [
    "STACK", "B", "H", "I", "Net", "T", "check_as_torch", "data", "flat", "losses_and_weights",
    "results", "sgd", "stack", "target",
]  # fmt: skip
