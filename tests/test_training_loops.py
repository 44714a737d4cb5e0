"""Training with PyTorch's means: optimizers, accumulation, clipping, averages, norms of weights.

Losses and weights after some steps obey the rule of compare.py against torch.nn's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries, build
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training import (
    I,
    Net,
    check_as_torch,
    data,
    flat,
    losses_and_weights,
    results,
    sgd,
    stack,
    target,
)

import fastrnn
from compare import check_identical

each = pytest.mark.parametrize("name", LAYERS + CELLS)

@each
def test_gradient_accumulation(name: str) -> None:
    """Of micro-batches, in gradients that `zero_grad` keeps and in those it drops."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        optimizer = sgd(net)
        for step in range(4):
            for part in (slice(0, 1), slice(1, 4)):
                output = net(data(dtype)[:, part])[0]
                loss = nn.functional.mse_loss(output, target(dtype)[:, part], reduction="sum")
                (loss / target().numel()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        return {k: p.detach() for k, p in net.named_parameters()}

    check_as_torch(run)


@each
def test_deterministic_training(name: str) -> None:
    """Runs are the same bits again, with two threads too, and `use_deterministic_algorithms`
    (which the fixtures enable) refuses nothing."""
    assert torch.are_deterministic_algorithms_enabled()
    runs = []
    for threads in (1, 1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        net = build(fastrnn, name, 16, 64, **stack(name))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        found = {}
        for i in range(3):
            optimizer.zero_grad()
            output = net(torch.randn((10, 24, 16) if name in LAYERS else (24, 16)))
            loss = sum(t.square().mean() for t in flat(output))
            loss.backward()
            optimizer.step()
            found[f"loss {i}"] = loss.detach()[None]
        runs.append(found | {k: p.detach() for k, p in net.named_parameters()})
    for run in runs[1:]:
        check_identical(run, runs[0])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2, foreach=True),
    # Large eps: where a gradient is nearly zero Adam divides rounding errors by rounding errors.
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-2, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-2, fused=True),
}


@each
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(name: str, kind: str) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        return losses_and_weights(net, OPTIMIZERS[kind](net.parameters()), dtype)

    check_as_torch(run)


@each
def test_lbfgs(name: str) -> None:
    """Calls forward and backward as often as its line search needs."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3, line_search_fn="strong_wolfe")
        losses = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(data(dtype))[0], target(dtype))
            loss.backward()
            losses.append(loss.detach())
            return loss

        optimizer.step(closure)
        return {f"loss {i}": loss for i, loss in enumerate(losses)}

    check_as_torch(run)


@each
def test_clipping(name: str) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        found = {}
        for norm in (1.0, 2.0, math.inf):
            net.zero_grad()
            net(data(dtype))[0].square().sum().backward()
            total = clip_grad_norm_(net.parameters(), 0.5, norm, error_if_nonfinite=True)
            assert total > 0.5
            found[f"norm {norm}"] = total
            found |= {f"{norm} {k}": p.grad for k, p in net.named_parameters()}
        clip_grad_value_(net.parameters(), 1e-3)
        assert max(p.grad.abs().max() for p in net.parameters()) <= 1.001e-3
        return found

    check_as_torch(run)


@both_libraries
@each
def test_clipping_refuses_nan(lib: ModuleType, name: str) -> None:
    net = Net(lib, name)
    (net(data())[0].sum() * math.nan).backward()
    assert all(p.grad.isnan().all() for p in net.core.parameters())
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)


@each
@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_model(name: str, average: str) -> None:
    """A deep copy whose parameters are changed in place: its results are those of the average."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        how = get_ema_multi_avg_fn(0.7) if average == "ema" else None
        averaged = AveragedModel(net, multi_avg_fn=how, use_buffers=True)
        optimizer = sgd(net)
        with torch.no_grad():
            averaged(data(dtype))  # what this call may keep is stale afterwards
        for _ in range(3):
            losses_and_weights(net, optimizer, dtype, steps=1)
            averaged.update_parameters(net)
        update_bn([data(dtype)], averaged)
        with torch.no_grad():
            output = averaged(data(dtype))[0]
        assert not torch.equal(output, net(data(dtype))[0])
        return {"output": output, **{k: p.detach() for k, p in averaged.named_parameters()}}

    check_as_torch(run)


NORMS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight": parametrizations.weight_norm,
    # Run until it has converged: torch.nn's layers run it more than once in a call.
    "spectral": partial(parametrizations.spectral_norm, n_power_iterations=100),
    "orthogonal": parametrizations.orthogonal,
}


@each
@pytest.mark.parametrize("kind", NORMS)
def test_training_of_parametrized_weights(name: str, kind: str) -> None:
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        NORMS[kind](net.core, weight)
        found = losses_and_weights(net, sgd(net, 0.05), dtype)
        net.eval()
        with parametrize.cached(), torch.no_grad():
            found |= {"output": net(data(dtype))[0]}
        return found

    check_as_torch(run)


@both_libraries
@each
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_detect_anomaly(lib: ModuleType, name: str) -> None:
    """Says nothing of finite gradients, and names NaN where the backward pass makes them."""
    net = Net(lib, name)
    with torch.autograd.detect_anomaly(check_nan=True):
        results(net, data())
        output = net(data())[0]
        output.register_hook(lambda g: g * math.nan)
        with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
            output.sum().backward()


@each
def test_jacobian_and_products(name: str) -> None:
    """torch.autograd.functional: first and second derivatives through double backward."""
    functional = torch.autograd.functional

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        input, v = data(dtype)[:3, :2], target(dtype)[:3, :2, :1].expand(-1, -1, I).contiguous()

        def loss(x: Tensor) -> Tensor:
            return net(x)[0].square().sum()

        found = {
            "jacobian": functional.jacobian(lambda x: net(x)[0].sum(0), input),
            "hessian": functional.hessian(loss, input),
            "hvp": functional.hvp(loss, input, v)[1],
            "vhp": functional.vhp(loss, input, v)[1],
            "jvp": functional.jvp(lambda x: net(x)[0], input, v)[1],
        }
        assert found["hvp"].abs().max() > 0.01
        torch.testing.assert_close(found["hvp"], found["vhp"])
        return found

    check_as_torch(run)
