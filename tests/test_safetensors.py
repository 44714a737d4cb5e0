"""Safetensors files: what torch.nn's layers save, fastrnn's load, and the reverse."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastrnn
from compare import check_identical

safetensors = pytest.importorskip("safetensors.torch")

libraries = pytest.mark.parametrize("library", [nn, fastrnn], ids=["torch.nn", "fastrnn"])
cells = pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])


@pytest.mark.parametrize(
    ("source", "target"), [(nn, fastrnn), (fastrnn, nn)], ids=["to fastrnn", "to torch.nn"]
)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
@cells
def test_files_of_the_other_library(
    cell: str, source: ModuleType, target: ModuleType, options: dict[str, int], tmp_path: Path
) -> None:
    saved, loaded = (getattr(library, cell)(5, 7, **options) for library in (source, target))
    assert not torch.equal(saved.weight_hh_l0, loaded.weight_hh_l0)
    safetensors.save_file(saved.state_dict(), tmp_path / "saved")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "saved"))
    check_identical(loaded.state_dict(), saved.state_dict())
    safetensors.save_file(loaded.state_dict(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "saved").read_bytes()
    input = torch.randn(4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input)[0], saved(input)[0])


@libraries
@cells
def test_a_layer_that_stands_in_two_places(cell: str, library: ModuleType, tmp_path: Path) -> None:
    """save_file refuses tensors that share memory; save_model writes them once."""
    layer, other = (getattr(library, cell)(4, 4) for _ in range(2))
    model, loaded = nn.ModuleList([layer, layer]), nn.ModuleList([other, other])
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(model.state_dict(), tmp_path / "saved")
    safetensors.save_model(model, str(tmp_path / "saved"))
    assert len(safetensors.load_file(tmp_path / "saved")) == 4
    safetensors.load_model(loaded, str(tmp_path / "saved"))
    check_identical(loaded.state_dict(), model.state_dict())
    assert loaded[0].weight_hh_l0 is loaded[1].weight_hh_l0


@libraries
@cells
def test_layers_that_are_swapped_share_nothing(
    cell: str, library: ModuleType, tmp_path: Path
) -> None:
    """After `fastrnn.replace` and `fastrnn.restore` the file is the one from before."""
    model = nn.Sequential(getattr(nn, cell)(4, 4), nn.Linear(4, 2))
    safetensors.save_model(model, str(tmp_path / "before"))
    fastrnn.replace(model)
    if library is nn:
        fastrnn.restore(model)
    assert type(model[0]).__module__.split(".")[0] == library.__name__.split(".")[0]
    safetensors.save_model(model, str(tmp_path / "after"))
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_quantized_layers(weights: str, tmp_path: Path) -> None:
    """A quantized layer's file holds the few bytes per weight, and another one loads it."""
    layers = [fastrnn.LSTM(8, 8), fastrnn.LSTM(8, 8)]
    for layer in layers:
        fastrnn.quantize(layer, weights=weights)
    safetensors.save_file(layers[0].state_dict(), tmp_path / "saved")
    layers[1].load_state_dict(safetensors.load_file(tmp_path / "saved"))
    check_identical(layers[1].state_dict(), layers[0].state_dict())
    input = torch.randn(4, 3, 8)
    with torch.no_grad():
        assert torch.equal(layers[1](input)[0], layers[0](input)[0])
