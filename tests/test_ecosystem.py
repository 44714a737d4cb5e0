"""Frameworks around a layer: PyTorch Lightning and transformers.

Losses and weights obey the rule of compare.py against the same training of torch.nn's layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
import transformers
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from training import Net, data, target

import fastrnn
from compare import check


class Lit(lightning.LightningModule):
    def __init__(self, net: nn.Module, low: bool = False) -> None:
        super().__init__()
        self.net, self.low = net, low
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        output = self.net(batch)[0]
        if self.low:
            assert output.dtype == torch.bfloat16
        loss = nn.functional.mse_loss(output, target().to(batch))
        self.losses.append(loss.detach())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(
    model: Lit, directory: Path, dtype: torch.dtype, checkpoint: Path | None = None, **options: Any
) -> Path:
    """Train for `max_epochs` of two batches; the checkpoint."""
    saver = ModelCheckpoint(directory, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, callbacks=[saver], logger=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory,
        **options,
    )  # fmt: skip
    batches = [data(dtype), data(dtype) * 2]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(model, loader, ckpt_path=checkpoint)
    assert trainer.global_step > 0
    return Path(saver.last_model_path)


def lightning_results(model: Lit) -> dict[str, Tensor]:
    losses = {f"loss {i}": loss for i, loss in enumerate(model.losses)}
    return losses | {k: p.detach() for k, p in model.named_parameters()}


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, loggers, tensor cores
        yield


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell"])
@pytest.mark.usefixtures("quiet")
def test_lightning(tmp_path: Path, name: str) -> None:
    """Clipping, accumulation, a schedule, and training that goes on from a checkpoint."""

    def run(lib: ModuleType, dtype: torch.dtype, other: ModuleType) -> dict[str, Tensor]:
        place = tmp_path / f"{lib.__name__}-{dtype}"
        first = Lit(Net(lib, name).to(dtype))
        precision: Any = {torch.float64: "64-true"}.get(dtype, "32-true")
        options = {"gradient_clip_val": 0.5, "precision": precision}
        checkpoint = fit(first, place / "a", dtype, max_epochs=2, **options)
        # The checkpoint of one library goes on in the other.
        second = Lit(Net(other, name).to(dtype))
        fit(second, place / "b", dtype, checkpoint, max_epochs=4, **options)
        loaded = Lit.load_from_checkpoint(checkpoint, net=Net(other, name).to(dtype))
        for key, value in first.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
        assert len(first.losses) == len(second.losses) == 4
        return lightning_results(first) | {
            f"then {k}": v for k, v in lightning_results(second).items()
        }

    expected = run(nn, torch.float32, nn), run(nn, torch.float64, nn)
    check(run(fastrnn, torch.float32, nn), *expected)
    check(run(nn, torch.float32, fastrnn), *expected)


@pytest.mark.usefixtures("quiet")
def test_lightning_in_mixed_precision(tmp_path: Path) -> None:
    """GRUCell's results are float32 under autocast; the readout's are bfloat16."""
    model = Lit(Net(fastrnn, "GRUCell"), low=True)
    fit(model, tmp_path, torch.float32, max_epochs=3, precision="bf16-mixed",
        accumulate_grad_batches=2)  # fmt: skip
    assert model.losses[-2] < model.losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


# transformers


def speech_recognizer() -> tuple[Any, dict[str, Tensor]]:
    """A transducer: an LSTM of two layers predicts from the tokens so far; and its input."""
    encoder = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "conv_kernel_size": 3, "subsampling_factor": 2,
        "subsampling_conv_channels": 4, "num_mel_bins": 8, "dropout": 0.0, "layerdrop": 0.0,
        "activation_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    config = transformers.ParakeetRNNTConfig(
        vocab_size=13, decoder_hidden_size=12, num_decoder_layers=2, encoder_config=encoder,
        blank_token_id=12, pad_token_id=2, decoder_start_token_id=12, max_symbols_per_step=3,
    )  # fmt: skip
    input = {"input_features": torch.randn(2, 24, 8), "decoder_input_ids": torch.arange(10) % 12}
    input["decoder_input_ids"] = input["decoder_input_ids"].reshape(2, 5)
    model = transformers.ParakeetForRNNT(config)
    with torch.no_grad():  # the default is so small that the LSTM would hardly matter
        for p in (*model.decoder.parameters(), *model.joint.parameters()):
            p.normal_(0.0, 0.7) if p.dim() == 2 else p.zero_()
    return model, input


def train(model: Any, input: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype).train()
    input = {k: v.to(dtype) if v.is_floating_point() else v for k, v in input.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2)
    found = {}
    for i in range(3):
        optimizer.zero_grad()
        logits = model(**input).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(120) % 13)
        loss.backward()
        optimizer.step()
        found[f"loss {i}"] = loss.detach()
    lstm = dict(model.decoder.lstm.named_parameters())
    return found | {k: p.detach() for k, p in lstm.items()}


def test_transformers_training() -> None:
    model, input = speech_recognizer()
    expected = train(model, input, torch.float32), train(model, input, torch.float64)
    assert expected[0]["loss 2"] < expected[0]["loss 0"]
    assert [entry.name for entry in fastrnn.replace(model).swapped] == ["decoder.lstm"]
    check(train(model, input, torch.float32), *expected)


def test_transformers_generation() -> None:
    """Greedy decoding runs the LSTM token by token and keeps its state in a cache."""
    model, input = speech_recognizer()

    def generate() -> Tensor:
        features = input["input_features"]
        return model.eval().generate(input_features=features, max_new_tokens=20).sequences

    expected = generate()
    assert all(len(set(row.tolist())) >= 4 for row in expected)
    fastrnn.replace(model)
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("what", ["replaced", "torch"])
def test_transformers_save_and_load(tmp_path: Path, what: str) -> None:
    """A saved model does not tell which library it was saved with."""
    model, input = speech_recognizer()
    before = model.eval()(**input).logits
    if what == "replaced":
        fastrnn.replace(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ParakeetForRNNT.from_pretrained(tmp_path).eval()
    assert type(loaded.decoder.lstm) is nn.LSTM
    assert torch.equal(loaded(**input).logits, before)
    fastrnn.replace(loaded)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(loaded(**input).logits, before)
