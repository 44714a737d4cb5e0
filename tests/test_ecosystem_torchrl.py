"""TorchRL's modules around a layer: single steps, whole trajectories, resets.

fastrnn's layers stand where torch.nn's do, but for one thing: trajectories that begin within a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import build
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

import fastrnn
from compare import check, with_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

HIDDEN = {"LSTM": ("h", "c"), "GRU": ("h",)}
each_rl = pytest.mark.parametrize("name", HIDDEN)
B, T, L, H = 3, 6, 2, 7
# Where a new trajectory starts: at the first step of some rows, or in the middle of rows.
RESETS: dict[str, list[tuple[int, int]]] = {
    "none": [], "first": [(0, 0), (2, 0)], "middle": [(0, 2), (1, 5), (1, 0)],
}  # fmt: skip


def policy(core: nn.Module, name: str, **options: Any) -> TensorDictSequential:
    """A recurrent module of TorchRL around `core`, and a linear layer that reads its output."""
    wrapper: Any = {"LSTM": LSTMModule, "GRU": GRUModule}[name]
    keys = HIDDEN[name]
    recurrent = wrapper(
        **{name.lower(): core},
        in_keys=["x", *keys],
        out_keys=["y", *(("next", key) for key in keys)],
        **options,
    )
    torch.manual_seed(3)
    readout = TensorDictModule(nn.Linear(H, 2), in_keys=["y"], out_keys=["action"])
    return TensorDictSequential(recurrent, readout)


def rl_core(lib: ModuleType, name: str) -> nn.Module:
    return build(lib, name, 5, H, num_layers=L, batch_first=True)


def rollout(name: str, resets: str, dtype: torch.dtype) -> tuple[TensorDict, dict[str, Tensor]]:
    """Data of B rows of T steps, and its leaves."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(B, T, *shape, generator=generator).to(dtype).requires_grad_()

    leaves = {"x": leaf(5), **{key: leaf(L, H) for key in HIDDEN[name]}}
    starts = torch.zeros(B, T, 1, dtype=torch.bool)
    for row, step in RESETS[resets]:
        starts[row, step] = True
    return TensorDict({**leaves, "is_init": starts}, [B, T]), leaves


def recurrent_results(
    module: TensorDictSequential, name: str, resets: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Results and gradients of a batch of trajectories."""
    module = module.to(dtype)
    input, leaves = rollout(name, resets, dtype)
    with set_recurrent_mode(True):
        found = module(input)
    outputs = {key: found[key] for key in ("action", "y")}
    outputs |= {key: found["next", key] for key in HIDDEN[name]}
    generator = torch.Generator().manual_seed(2)
    cotangents = {k: torch.randn(v.shape, generator=generator) for k, v in outputs.items()}
    return with_gradients(outputs, {**leaves, **dict(module.named_parameters())}, cotangents)


def rollout_results(
    lib: ModuleType, name: str, resets: str, dtype: torch.dtype = torch.float32, grad: bool = True
) -> dict[str, Tensor]:
    """Step by step: actions, the last states, and gradients through all steps."""
    module = policy(rl_core(lib, name), name).to(dtype)
    input, leaves = rollout(name, resets, dtype)
    outputs = {}
    with torch.set_grad_enabled(grad):
        step = input[:, 0]
        for t in range(T):
            if t:
                step = input[:, t].update({key: step["next", key] for key in HIDDEN[name]})
            step = module(step)
            outputs[f"action {t}"] = step["action"]
    outputs |= {key: step["next", key] for key in HIDDEN[name]}
    ones = {key: torch.ones_like(value) for key, value in outputs.items()}
    leaves |= dict(module.named_parameters())
    return with_gradients(outputs, leaves, ones if grad else None)


@each_rl
@pytest.mark.parametrize("resets", RESETS)
def test_single_steps(name: str, resets: str) -> None:
    """A row is reset where `is_init` says so; with gradients and in the way without them."""
    same = rollout_results(nn, name, resets)
    exact = rollout_results(nn, name, resets, torch.float64)
    check(rollout_results(fastrnn, name, resets), same, exact)
    without = rollout_results(fastrnn, name, resets, grad=False)
    check(without, {key: same[key] for key in without}, exact)
    if resets == "middle":
        assert not torch.equal(same["action 5"], rollout_results(nn, name, "none")["action 5"])


@each_rl
@pytest.mark.parametrize("resets", ["none", "first"])
def test_recurrent_mode(name: str, resets: str) -> None:
    check(
        recurrent_results(policy(rl_core(fastrnn, name), name), name, resets),
        recurrent_results(policy(rl_core(nn, name), name), name, resets),
        recurrent_results(policy(rl_core(nn, name), name), name, resets, torch.float64),
    )


def class_of_both(name: str) -> Any:
    """fastrnn's layer as an instance of torch.nn's class, too."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        nn.RNNBase.__init__(self, name, *args, **kwargs)

    return type(name, (getattr(fastrnn, name), getattr(nn, name)), {"__init__": init})


def expected_in_the_middle(name: str) -> list[dict[str, Tensor]]:
    return [
        recurrent_results(policy(rl_core(nn, name), name), name, "middle", dtype)
        for dtype in (torch.float32, torch.float64)
    ]


@each_rl
@pytest.mark.parametrize("way", ["mask", "restore", "make_cudnn_based", "class of both"])
def test_trajectories_within_a_row(name: str, way: str) -> None:
    """TorchRL packs them for instances of torch.nn's classes only and calls other modules with a
    mask of the steps of each row; other ways, of which the last stays on fastrnn's kernels."""
    module = policy(rl_core(fastrnn, name), name)
    weights = dict(module.named_parameters())
    if way == "mask":
        pass  # as it is
    elif way == "restore":
        fastrnn.restore(module)
    elif way == "make_cudnn_based":
        module[0].make_cudnn_based()
        assert type(getattr(module[0], name.lower())) is getattr(nn, name)
    else:
        core = class_of_both(name)(5, H, num_layers=L, batch_first=True)
        core.load_state_dict(rl_core(nn, name).state_dict())
        assert core.forward.__func__ is fastrnn.LSTM.forward
        module = policy(core, name)
    check(recurrent_results(module, name, "middle"), *expected_in_the_middle(name))
    if way != "class of both":  # in place: what an optimizer holds stays
        assert all(p is weights[key] for key, p in module.named_parameters())


@each_rl
def test_python_based(name: str) -> None:
    """TorchRL's own layers take the Parameters of a fastrnn layer, as of a torch.nn one."""
    module = policy(rl_core(fastrnn, name), name)
    before = recurrent_results(module, name, "first")
    module[0].make_python_based()
    assert not isinstance(getattr(module[0], name.lower()), fastrnn.modules.Layer)
    exact = recurrent_results(policy(rl_core(nn, name), name), name, "first", torch.float64)
    check(recurrent_results(module, name, "first"), before, exact)
