"""examples/char_lm.py: one process and two, with DDP and with FSDP2, learn the same."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tqdm")
pytest.importorskip("numpy")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import char_lm

EXAMPLE = Path(char_lm.__file__)
WORDS = ["--hidden-size", "16", "--batch-size", "8", "--sequence-length", "32", "--device", "cpu"]


def losses(printed: str) -> tuple[float, float]:
    """The training and the held-out loss of a report."""
    found = re.findall(r"^(training|held-out) loss +(\d+\.\d{6})\b", printed, re.MULTILINE)
    assert [name for name, _ in found] == ["training", "held-out"], printed
    return float(found[0][1]), float(found[1][1])


def run_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[float, float]:
    assert char_lm.main([*WORDS, *words]) == 0
    return losses(capsys.readouterr().out)


def run_two(words: list[str]) -> tuple[float, float]:
    """As torchrun would: two processes that find each other at a store of their parent."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in "01":
        environment = os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, str(EXAMPLE), *WORDS, *words]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        printed = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed[1][0] == ""  # rank 0 reports
    return losses(printed[0][0])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("lstm", ["--parallel", "ddp", "--accumulate", "2"]),
        ("gru", ["--parallel", "fsdp", "--layers", "2"]),
    ],
)
def test_two_processes_learn_what_one_learns(
    cell: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from the weights that the two have saved."""
    pytest.importorskip("safetensors")
    words = ["--cell", cell, "--learning-rate", "1e-2", *words]
    saved = str(tmp_path / "model.safetensors")
    alone = run_alone([*words, "--steps", "20"], capsys)
    two = run_two([*words, "--steps", "20", "--save", saved])
    assert two == pytest.approx(alone, abs=1e-4)
    assert alone[0] < 3.8  # ln 96 is 4.56: before the first update
    further, _ = run_alone([*words, "--steps", "1", "--load", saved], capsys)
    assert further < 3.8
    assert char_lm.main([*WORDS, "--cell", "rnn", "--load", saved]) == 2
    assert capsys.readouterr().err.startswith(f"{saved}: Error(s) in loading state_dict")


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    words = [*WORDS, "--cell", "rnn", "--steps", "3", "--threads", "1", "--plot", str(picture)]
    assert char_lm.main(words) == 0
    printed = capsys.readouterr().out
    _, loss = losses(printed)
    for words, value in (
        ("perplexity", math.exp(loss)),
        ("bits per character", loss / math.log(2)),
    ):
        assert float(printed.split(words)[1].split()[0]) == pytest.approx(value, rel=1e-3)
    assert f"backend {char_lm.backend_in_use()}\n" in printed
    assert len(printed.split(f"\n\n{char_lm.PROMPT}", 1)[1]) == char_lm.SAMPLE + 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_rows_of_two_processes_are_those_of_one() -> None:
    text = torch.arange(50)
    alone = char_lm.rows_of(text, 6, char_lm.Process(0, 0, torch.device("cpu")))
    shares = [char_lm.rows_of(text, 6, char_lm.Process(r, 2, torch.device("cpu"))) for r in (0, 1)]
    assert alone.shape == (6, 8)
    assert torch.equal(torch.cat(shares), alone)
    assert not set(shares[0].flatten().tolist()) & set(shares[1].flatten().tolist())


def test_the_texts_do_not_overlap() -> None:
    train, held_out = ("".join(char_lm.SYMBOLS[i] for i in text) for text in char_lm.load_text())
    assert (len(train), len(held_out)) == (char_lm.TEXT, char_lm.HELD_OUT)
    assert "import" in held_out
    assert held_out[:500] not in train
    assert held_out[-500:] not in train


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "6", "--accumulate", "4"], "a multiple of processes * accumulate = 4"),
        (["--batch-size", "1000", "--sequence-length", "50"], "too large for 50000 held-out"),
        (["--save", "/nowhere/model"], "--save: /nowhere/model: cannot be written"),
        (["--save", "/"], "--save: /: cannot be written"),
        (["--plot", "loss.xyz"], "--plot: loss.xyz: the name must end in one of"),
        (["--steps", "0"], "argument --steps: must be from 1 to"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(SystemExit) as caught:
        char_lm.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file"])
def test_files_that_cannot_be_loaded(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    assert char_lm.main([*WORDS, "--load", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
