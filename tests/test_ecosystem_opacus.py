"""Opacus: what it makes of fastrnn's layers, and the way that works.

Opacus goes by the type of a module. It refuses torch.nn.LSTM and GRU before training and offers
layers of its own in their place. Those of fastrnn it does not know: `fastrnn.restore` comes first.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import LAYERS, both_libraries, build, states
from opacus import GradSampleModule, PrivacyEngine
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn

import fastrnn
from compare import check

pytestmark = [
    pytest.mark.filterwarnings("ignore:fastrnn runs its slow reference"),
    pytest.mark.filterwarnings("ignore::UserWarning:opacus.*"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
each_layer = pytest.mark.parametrize("name", LAYERS)
B, T, I, H = 4, 5, 3, 6  # noqa: E741 - the dimension key
LR = 0.5


class Classifier(nn.Module):
    """A layer, or a cell over all steps or over the first alone, and a readout of the last."""

    def __init__(self, lib: ModuleType, name: str, steps: int = T, **options: Any) -> None:
        super().__init__()
        self.steps = steps
        self.core = build(lib, name, I, H, **options)
        self.head = nn.Linear(H * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, input: Tensor) -> Tensor:
        if not hasattr(self.core, "num_layers"):
            state = self.core(input[:, 0])
            for t in range(1, self.steps):
                state = self.core(input[:, t], state)
            return self.head(states(state)[0])
        return self.head(self.core(input)[0][:, -1])


def layer_model(lib: ModuleType, name: str) -> Classifier:
    return Classifier(lib, name, num_layers=2, bidirectional=True, batch_first=True)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, I, generator=generator).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum(1).mean()


def make_private(model: nn.Module, **options: Any) -> tuple[Any, Any, PrivacyEngine]:
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(rows(), batch_size=B)
    private, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, poisson_sampling=False, **options
    )
    return private, optimizer, engine


@both_libraries
@each_layer
def test_unrestored_layers(lib: ModuleType, name: str) -> None:
    """torch.nn.LSTM and GRU are refused by the validator; all others, fastrnn's among them, pass
    it, and the first backward pass raises. No gradient of a sample is made up."""
    model = layer_model(lib, name)
    refused = lib is nn and name != "RNN"
    assert [type(e).__name__ for e in ModuleValidator.validate(model)] == (
        ["ShouldReplaceModuleError"] if refused else []
    )
    if refused:
        with pytest.raises(UnsupportedModuleError, match=f"do not support nn.{name}"):
            make_private(model, noise_multiplier=1.0, max_grad_norm=1.0)
        return
    assert type(ModuleValidator.fix(model).core) is type(model.core)  # left as it is
    private, _, _ = make_private(model, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(TypeError if lib is fastrnn else RuntimeError) as raised:
        loss_of(private(rows())).backward()
    message = "can be converted to an index" if lib is fastrnn else "match the broadcast shape"
    assert message in str(raised.value)
    assert all(p.grad_sample is None for p in model.core.parameters())


def sample_gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of each row by itself, from autograd."""
    model.to(dtype)
    found = [
        torch.autograd.grad(loss_of(model(row[None])), list(model.parameters()))
        for row in rows(dtype)
    ]
    stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return dict(zip(dict(model.named_parameters()), stacked, strict=True))


@both_libraries
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell"])
@pytest.mark.parametrize("steps", [1, T])
def test_unrestored_cells(lib: ModuleType, name: str, steps: int) -> None:
    """Opacus calls a module that it does not know again with its first argument alone, without
    the state of a cell. torch.nn's cells then raise. fastrnn's run, and what Opacus computes is
    right without a state and wrong, without a word, with one: those of W_hh are zero."""
    model = Classifier(lib, name, steps)
    assert ModuleValidator.validate(model) == []
    exact = sample_gradients(model, torch.float64)
    private = GradSampleModule(model.float())
    loss = loss_of(private(rows()))
    if lib is nn:
        with pytest.raises(RuntimeError, match="match the broadcast shape"):
            loss.backward()
        return
    loss.backward()
    for key, p in model.named_parameters():
        right = torch.allclose(p.grad_sample.double(), exact[key], atol=1e-6)
        assert right == (steps == 1 or key.startswith("head")), key
    assert not model.core.weight_hh.grad_sample.any()
    assert exact["core.weight_hh"].any() == (steps > 1)
    # What is not Opacus' own is right: the gradient of the batch.
    torch.testing.assert_close(model.core.weight_hh.grad.double(), exact["core.weight_hh"].mean(0))


@both_libraries
def test_unrestored_lstm_cell(lib: ModuleType) -> None:
    private = GradSampleModule(Classifier(lib, "LSTMCell"))
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'detach'"):
        private(rows())


def private_model(name: str) -> tuple[Classifier, nn.Module]:
    """A model with fastrnn's layer, and what `restore` and Opacus' fix make of a model like it."""
    model, copied = layer_model(fastrnn, name), layer_model(fastrnn, name)
    copied.load_state_dict(model.state_dict())
    fastrnn.restore(copied)
    fixed = ModuleValidator.fix(copied)
    if name == "RNN":  # Opacus has a layer for it and does not put it in
        assert type(fixed.core) is nn.RNN
        fixed.core = DPRNN(I, H, num_layers=2, bidirectional=True, batch_first=True)
        fixed.core.load_state_dict(model.core.state_dict())
    assert type(fixed.core) is {"RNN": DPRNN, "LSTM": DPLSTM, "GRU": DPGRU}[name]
    assert set(dict(fixed.named_parameters())) == set(model.state_dict())
    return model, fixed


@each_layer
def test_gradients_of_samples_after_restore(name: str) -> None:
    """They are fastrnn's, of each row by itself."""
    model, fixed = private_model(name)
    private = GradSampleModule(fixed)
    loss_of(private(rows())).backward()
    got = {key: p.grad_sample for key, p in fixed.named_parameters()}
    theirs = layer_model(nn, name)
    theirs.load_state_dict(model.state_dict())
    same, exact = sample_gradients(theirs, torch.float32), sample_gradients(theirs, torch.float64)
    check(got, same, exact)
    check(sample_gradients(model, torch.float32), same, exact)


@each_layer
@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_private_step_after_restore(name: str, clip: float) -> None:
    """A step without noise moves the weights by the mean of the clipped gradients of fastrnn's
    rows; the new parameters go back by name (the state dict of a model with Opacus' layers has
    each of theirs twice)."""
    model, fixed = private_model(name)
    private, optimizer, _ = make_private(fixed, noise_multiplier=0.0, max_grad_norm=clip)
    optimizer.zero_grad()
    loss_of(private(rows())).backward()
    optimizer.step()
    got = {k: p.detach().clone() for k, p in fixed.named_parameters()}

    def expected(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        mine = layer_model(lib, name)
        mine.load_state_dict(model.state_dict())
        gradients = sample_gradients(mine, dtype)
        norm = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
        assert (norm > 0.1).all()
        factor = (clip / norm).clamp(max=1.0)
        moved = {k: torch.einsum("b,b...->...", factor, g) / B for k, g in gradients.items()}
        return {k: p.detach() - LR * moved[k] for k, p in mine.named_parameters()}

    same, exact = expected(nn, torch.float32), expected(nn, torch.float64)
    check(got, same, exact)
    check(expected(fastrnn, torch.float32), same, exact)
    before = model(rows())
    model.load_state_dict(got)
    after = model(rows())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fixed(rows()))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_privacy_budget_after_restore() -> None:
    """With noise, and the accountant at work."""
    model, fixed = private_model("LSTM")
    private, optimizer, engine = make_private(fixed, noise_multiplier=1.1, max_grad_norm=1.0)
    loss_of(private(rows())).backward()
    optimizer.step()
    assert 0 < engine.get_epsilon(1e-5) < 20
    assert not torch.equal(fixed.core.weight_hh_l0, model.core.weight_hh_l0)
