"""examples/: the two runs of the demo agree, and damaged MNIST files are refused by name."""

from __future__ import annotations

import gzip
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import digits
import mnist

FILES = {
    "train-images-idx3-ubyte": (70, 6, 5),
    "train-labels-idx1-ubyte": (70,),
    "t10k-images-idx3-ubyte": (20, 6, 5),
    "t10k-labels-idx1-ubyte": (20,),
}


def idx(shape: tuple[int, ...]) -> bytes:
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + bytes(i % 10 for i in range(math.prod(shape)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shape in FILES.items():
        (tmp_path / name).write_bytes(idx(shape))
    return tmp_path


def test_idx_files_are_read_plain_and_compressed(folder: Path) -> None:
    plain = mnist.load_mnist(folder)
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    compressed = mnist.load_mnist(folder)
    assert [part.shape for part in plain] == list(FILES.values())
    assert plain[0][0, 1].tolist() == [5, 6, 7, 8, 9]
    for one, other in zip(plain, compressed, strict=True):
        assert (one == other).all()


def test_the_spelling_with_a_dot_is_accepted(folder: Path) -> None:
    plain = mnist.load_mnist(folder)
    for name in FILES:
        (folder / name).rename(folder / name.replace("-idx", ".idx"))
    for one, other in zip(plain, mnist.load_mnist(folder), strict=True):
        assert (one == other).all()


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx((70, 6, 5))[:-1], "truncated"),
        (IMAGES, idx((70, 6, 5))[:9], "truncated"),
        (IMAGES, b"", "truncated"),
        (IMAGES, idx((70, 6, 5)) + b"\0", "too long"),
        (IMAGES, b"\0\0\x0d\x03" + idx((70, 6, 5))[4:], "wrong magic number 0x00000d03"),
        (IMAGES, idx((70,)) + bytes(100), "wrong magic number 0x00000801"),
        (IMAGES, idx((0, 6, 5)), "empty"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, "truncated"),
        (LABELS, idx((69,)), "69 labels for 70 images"),
        (LABELS, idx((70,))[:-1] + b"\x0a", "label 10"),
        (f"{IMAGES}.gz", gzip.compress(idx((70, 6, 5)))[:-20], "damaged gzip file"),
        (f"{IMAGES}.gz", b"not gzip at all", "damaged gzip file"),
        (f"{IMAGES}.gz", gzip.compress(idx((70, 6, 5)))[:10] + b"\xff" * 60, "damaged gzip file"),
    ],
)
def test_damaged_files_are_refused_by_name(
    folder: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name.removesuffix(".gz")).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        mnist.load_mnist(folder)
    assert str(folder / name) in str(caught.value)
    assert digits.main(["--mnist", str(folder)]) == 2
    assert capsys.readouterr().err == f"{caught.value}\n"


def test_missing_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=LABELS):
        mnist.load_mnist(folder)
    nowhere = folder / "nowhere"
    assert digits.main(["--mnist", str(nowhere)]) == 2
    assert capsys.readouterr().err == f"{nowhere}: no such folder\n"
    assert digits.main(["--mnist", str(folder / IMAGES)]) == 2
    assert capsys.readouterr().err == f"{folder / IMAGES}: not a folder\n"
    assert digits.main(["--mnist", ""]) == 2
    assert capsys.readouterr().err == "--mnist: expected a folder, got an empty name\n"
    (folder / LABELS).mkdir()
    assert digits.main(["--mnist", str(folder)]) == 2
    assert capsys.readouterr().err == f"{folder / LABELS}: a folder, expected a file\n"


def test_test_images_of_another_size_are_refused(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx((20, 5, 5)))
    with pytest.raises(ValueError, match="6 x 5 pixels, test images 5 x 5"):
        mnist.load_mnist(folder)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_command_line_trains_both_and_draws(
    folder: Path, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = folder / "curves.png"
    words = ["--mnist", str(folder), "--cell", cell, "--epochs", "2", "--hidden", "8"]
    assert digits.main([*words, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert f"{cell.upper()} of 8 units on 70 MNIST digits of 6 x 5" in printed
    assert f"backend {digits.backend_in_use()}\n" in printed
    assert "largest difference of the losses" in printed
    assert "allowed" not in printed  # the difference is judged on the 8 x 8 digits only
    assert str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plot_is_drawn_by_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    words = ["--mnist", ".", "--epochs", "1", "--hidden", "4"]
    assert digits.main([*words, "--plot", ""]) == 0
    assert not list(folder.glob("*.png"))
    assert digits.main(words) == 0
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "curves.xyz"], "--plot: curves.xyz: the name must end in one of .png, "),
        (["--plot", "curves"], "--plot: curves: the name must end in one of"),
        (["--plot", "nowhere/curves.png"], "--plot: no such folder: "),
        (["--threads", "1000000"], "argument --threads: must be from 1 to "),
        (["--threads", "0"], "argument --threads: must be from 1 to "),
        (["--epochs", "0"], "argument --epochs: must be from 1 to "),
        (["--hidden", "many"], "argument --hidden: expected a whole number, got 'many'"),
        (["--seed", "-1"], "argument --seed: must be from 0 to 9223372036854775807, got -1"),
        (["--seed", str(2**64)], "argument --seed: must be from 0 to "),
    ],
)
def test_wrong_arguments_are_refused_before_the_training(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as caught:
        digits.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_that_differ_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Drifting(torch.nn.LSTM):
        def forward(self, *arguments: object) -> tuple[torch.Tensor, object]:
            output, state = super().forward(*arguments)
            return 1.02 * output, state

    words = ["--epochs", "1", "--hidden", "8", "--plot", ""]
    monkeypatch.setattr(digits, "fastrnn", SimpleNamespace(LSTM=Drifting))
    assert digits.main(words) == 1
    printed = capsys.readouterr()
    assert "(allowed: 1e-04)" in printed.out
    assert "the losses differ by more than 1e-04" in printed.err


def test_a_loss_that_is_not_a_number_fails() -> None:
    runs = [digits.Run(name, torch.nn.Linear(1, 1)) for name in ("torch.nn", "fastrnn")]
    runs[0].losses, runs[1].losses = [1.0, 0.5], [1.0, math.nan]
    assert math.isnan(digits.largest_difference(*runs))


def test_the_default_job_reaches_95_percent() -> None:
    pytest.importorskip("sklearn")
    data = digits.load_digits()
    torch_nn, fast = digits.train_both(data, "lstm", hidden=128, epochs=10, seed=0)
    assert fast.accuracies[-1] >= 0.95
    assert digits.largest_difference(fast, torch_nn) <= digits.MAX_LOSS_DIFFERENCE
    assert all(seconds > 0 for seconds in torch_nn.seconds + fast.seconds)


def test_both_models_start_from_the_same_weights() -> None:
    models = []
    for library in (torch.nn, digits.fastrnn):
        torch.manual_seed(3)
        models.append(digits.RowClassifier(library, "gru", columns=5, hidden=7).state_dict())
    assert models[0].keys() == models[1].keys()
    for name in models[0]:
        assert torch.equal(models[0][name], models[1][name]), name
