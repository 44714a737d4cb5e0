"""Models of other packages with torch.nn's recurrent layers inside, swapped in place.

Built from their configuration with random weights; nothing is downloaded.  Outputs and all
gradients obey the rule of compare.py: as near to the model in float64 as with torch.nn's layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from compare import check

Run = Callable[[Any, torch.dtype], Tensor]


def encodec() -> tuple[nn.Module, Run, list[str]]:
    """Audio codec: convolutions around two-layer LSTMs in the encoder and in the decoder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=8, upsampling_ratios=[4, 2], num_residual_layers=1
    )
    audio = torch.randn(2, 1, 160)

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        # Without the quantizer between: it has no gradient, and its codes jump with rounding.
        return model.decoder(model.encoder(audio.to(dtype)))

    names = ["encoder.layers.7.lstm", "decoder.layers.1.lstm"]
    return transformers.EncodecModel(config), run, names


def graph() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Node features, edges, edge features and the graph of each node, for two small graphs."""
    edges = torch.tensor([[0, 1, 2, 0, 3, 4, 5], [1, 2, 0, 2, 4, 5, 3]])
    return torch.randn(6, 5), edges, torch.randn(7, 3), torch.tensor([0, 0, 0, 1, 1, 1])


def attentive_fp() -> tuple[nn.Module, Run, list[str]]:
    """Molecule fingerprints: graph attention with a GRUCell after each of its layers."""
    models = pytest.importorskip("torch_geometric.nn.models")
    nodes, edges, features, batch = graph()

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        return model(nodes.to(dtype), edges, features.to(dtype), batch)

    model = models.AttentiveFP(5, 8, 4, edge_dim=3, num_layers=3, num_timesteps=2)
    return model, run, ["gru", "atom_grus.0", "atom_grus.1", "mol_gru"]


def jumping_knowledge() -> tuple[nn.Module, Run, list[str]]:
    """Graph convolutions whose layers a bidirectional LSTM weighs, and a Set2Set readout that
    runs an LSTM one step at a time with its state passed in."""
    geometric = pytest.importorskip("torch_geometric.nn")
    nodes, edges, _, batch = graph()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = geometric.GCN(5, 8, num_layers=3, jk="lstm")
            self.readout = geometric.aggr.Set2Set(8, processing_steps=3)

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        return model.readout(model.body(nodes.to(dtype), edges), batch)

    return Network(), run, ["body.jk.lstm", "readout.lstm"]


def slot_attention() -> tuple[nn.Module, Run, list[str]]:
    """Object slots that compete for the input, updated by a GRUCell in each iteration."""
    slots = pytest.importorskip("slot_attention")
    inputs, noise = torch.randn(2, 10, 8), torch.randn(2, 4, 8)

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:  # the same noise in every dtype
            patch.setattr(torch, "randn", lambda *shape, **options: noise.to(dtype))
            return model(inputs.to(dtype))

    return slots.SlotAttention(4, 8, hidden_dim=16), run, ["gru"]


def results(model: nn.Module, run: Run, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and the gradients of all parameters, of a loss that weights every output."""
    model.zero_grad()
    output = run(model, dtype)
    generator = torch.Generator().manual_seed(5)
    weights = torch.empty(output.shape, dtype=torch.float32).normal_(generator=generator)
    (output * weights.to(dtype)).sum().backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


@pytest.mark.parametrize("make", [encodec, attentive_fp, jumping_knowledge, slot_attention])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_is_as_right_as_with_torch(make: Callable[[], Any]) -> None:
    model, run, names = make()
    model.eval()  # without dropout
    reference = results(copy.deepcopy(model).double(), run, torch.float64)
    with_torch = results(model, run, torch.float32)
    types = [type(module) for module in model.modules()]
    parameters = list(model.parameters())

    report = fastrnn.replace(model)
    assert [entry.name for entry in report.swapped] == names
    assert report.left == []
    recurrent = [key for key in with_torch if key.rpartition(".")[0] in names]
    assert len(recurrent) >= 4
    check(results(model, run, torch.float32), with_torch, reference)

    assert [entry.name for entry in fastrnn.restore(model).swapped] == names
    assert [type(module) for module in model.modules()] == types
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    check(results(model, run, torch.float32), with_torch, reference)
