"""Number formats in training: autocast, 16-bit modules, loss scaling.

Result types are torch.nn's, of every combination that torch.nn runs everywhere.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, build, make_hx, states
from torch import Tensor, nn
from training import B, H, I, Net, check_as_torch, data, losses_and_weights, sgd, target

import fastrnn
from compare import error

each = pytest.mark.parametrize("name", LAYERS + CELLS)
LOW = [torch.bfloat16, torch.float16]
low_dtypes = pytest.mark.parametrize("low", LOW, ids=str)
# torch.nn's dense LSTM autocasts through oneDNN, which on a CPU without AVX-512 has no such LSTM.
NO_LSTM_HERE = "could not create a primitive descriptor for the LSTM"


def dtypes_under_autocast(
    lib: ModuleType, name: str, low: torch.dtype, module: torch.dtype, input: torch.dtype,
    state: torch.dtype | None,
) -> dict[str, torch.dtype]:  # fmt: skip
    """Of all results and gradients."""
    layer = build(lib, name, I, H).to(module)
    x = (data() if name in LAYERS else data()[0]).to(input).requires_grad_()
    hx: Any = None
    leaves = {"input": x, **dict(layer.named_parameters())}
    if state is not None:
        shape = (1, B, H) if name in LAYERS else (B, H)
        parts = [s.to(state).requires_grad_() for s in states(make_hx(name, *shape))]
        leaves |= {f"state {i}": s for i, s in enumerate(parts)}
        hx = tuple(parts) if len(parts) == 2 else parts[0]
    with torch.autocast("cpu", dtype=low):
        result = layer(x, hx)
    outputs = [result[0], *states(result[1])] if name in LAYERS else states(result)
    sum(t.float().sum() for t in outputs).backward()
    found = {f"result {i}": t.dtype for i, t in enumerate(outputs)}
    return found | {f"d {key}": leaf.grad.dtype for key, leaf in leaves.items()}


def check_autocast_dtypes(name: str, low: torch.dtype, *dtypes: Any) -> None:
    mine = dtypes_under_autocast(fastrnn, name, low, *dtypes)
    try:
        theirs = dtypes_under_autocast(nn, name, low, *dtypes)
    except RuntimeError as raised:
        assert NO_LSTM_HERE in str(raised)  # noqa: PT017
        theirs = mine | {key: low for key in mine if key.startswith("result")}
    assert mine == theirs


@each
@low_dtypes
@pytest.mark.parametrize("module", ["float32", "low"])
@pytest.mark.parametrize("input", ["float32", "low"])
@pytest.mark.parametrize("state", [None, "as input"])
def test_autocast_dtypes(
    name: str, low: torch.dtype, module: str, input: str, state: str | None
) -> None:
    named = {"float32": torch.float32, "low": low}
    check_autocast_dtypes(name, low, named[module], named[input], state and named[input])


@each
@low_dtypes
@pytest.mark.parametrize("state", [None, torch.float64], ids=str)
def test_autocast_leaves_float64_alone(
    name: str, low: torch.dtype, state: torch.dtype | None
) -> None:
    check_autocast_dtypes(name, low, torch.float64, torch.float64, state)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell", "GRUCell"])
@low_dtypes
@pytest.mark.parametrize("input", ["float32", "other"])
def test_autocast_promotes_the_other_16_bits(name: str, low: torch.dtype, input: str) -> None:
    """A state of bfloat16 under float16, and the other way round."""
    (other,) = set(LOW) - {low}
    dtype = torch.float32 if input == "float32" else other
    check_autocast_dtypes(name, low, torch.float32, dtype, other)


@each
@low_dtypes
def test_training_of_16_bit_modules(name: str, low: torch.dtype) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(low).to(dtype)
        return losses_and_weights(net, sgd(net), dtype)

    check_as_torch(run, low)


@each
def test_training_under_autocast(name: str) -> None:
    """float32 weights, 16-bit arithmetic, scaled losses: the loss falls, and all is as near to
    float64 as bfloat16 lets expect."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=256.0)
        found = {}
        for i in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                loss = nn.functional.mse_loss(net(data(dtype))[0], target(dtype))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found[f"loss {i}"] = loss.detach()
        return found | {k: p.detach() for k, p in net.named_parameters()}

    got, exact = run(fastrnn, torch.float32), run(nn, torch.float64)
    assert got["loss 3"] < got["loss 0"]
    for key, value in got.items():
        assert value.dtype == torch.float32
        assert error(value, exact[key]) < 8 * torch.finfo(torch.bfloat16).eps, key


@each
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_loss_scaling(name: str, bad: float) -> None:
    """GradScaler on the CPU: a step with infinite gradients is skipped and halves the scale."""

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        optimizer = sgd(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for factor in (1.0, bad, 1.0, 1.0):
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(data(dtype))[0], target(dtype)) * factor
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            kept = [torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True)]
            assert kept == [factor != 1.0] * len(kept)
        assert scales == [1024.0, 512.0, 512.0, 1024.0]
        return {k: p.detach() for k, p in net.named_parameters()}

    check_as_torch(run)
