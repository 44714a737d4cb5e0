"""examples/recurrent_ppo.py: both ways compute the same, advantages are those of their definition,
and the agent learns to remember."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import compare
import fastrnn

pytest.importorskip("numpy")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import recurrent_ppo as ppo


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_resets_are_rows_split_and_padded(cell: str) -> None:
    torch.manual_seed(0)
    steps, batch = 11, 5
    x = torch.randn(steps, batch, 3)
    starts = torch.rand(steps, batch) < 0.3
    starts[0] = torch.tensor([True, False, True, False, False])
    starts[:, 4] = False
    h, c = torch.randn(2, 1, batch, 6)
    state = (h, c) if cell == "lstm" else h
    found = {}
    for name, library, dtype in (
        ("fast", fastrnn, torch.float32), ("torch", nn, torch.float32), ("right", nn, torch.double)
    ):  # fmt: skip
        torch.manual_seed(1)
        layer = getattr(library, cell.upper())(3, 6).to(dtype)
        own = x.clone().to(dtype).requires_grad_()
        entered = ppo.map_state(lambda s, dtype=dtype: s.to(dtype), state)
        way = ppo.with_resets if library is fastrnn else ppo.split_and_padded
        output = way(layer, own, entered, starts)
        output.square().sum().backward()
        found[name] = {"output": output.detach(), "input": own.grad}
        found[name] |= {n: p.grad for n, p in layer.named_parameters()}
    compare.check(found["fast"], found["torch"], found["right"])


def test_advantages_are_sums_of_discounted_errors_until_the_end() -> None:
    torch.manual_seed(0)
    rewards, values, after = torch.randn(3, 7, 2)
    dones = torch.rand(7, 2) < 0.3
    found = ppo.advantages_of(rewards, values, after, dones)
    for b in range(2):
        for t in range(7):
            total, factor = 0.0, 1.0
            for k in range(t, 7):
                ends = bool(dones[k, b])
                next_value = 0.0 if ends else ppo.DISCOUNT * after[k, b].item()
                total += factor * (rewards[k, b].item() + next_value - values[k, b].item())
                factor *= ppo.DISCOUNT * ppo.LAMBDA
                if ends:
                    break
            assert found[t, b].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_the_environments_reward_the_cue_only() -> None:
    recall = ppo.Recall(32, 0)
    length = torch.zeros(32, dtype=torch.long)
    for _ in range(100):
        seen = recall.observe()
        shown, asked, cue = seen[:, : ppo.CUES], seen[:, ppo.CUES] == 1, recall.cue.clone()
        assert torch.equal(shown.sum(1) == 1, recall.starts)
        assert (shown.argmax(1) == cue)[recall.starts].all()
        length = torch.where(recall.starts, 0, length + 1)
        answers = torch.where(torch.rand(32) < 0.5, cue, (cue + 1) % ppo.CUES)
        rewards = recall.step(answers)
        assert torch.equal(rewards == 1, asked & (answers == cue))
        assert torch.equal(recall.starts, asked)
        assert length[asked].ge(ppo.SHORTEST).all()
        assert length.le(ppo.LONGEST).all()


def test_the_agent_learns_to_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "LONGEST", 8)
    options = ppo.parse(["--cell", "gru", "--hidden", "32", "--environments", "32", "--plot", ""])
    run = ppo.start(options)[1]
    for _ in range(25):
        run.learn(run.collect(64))
    assert run.returns[0] < 0.4
    assert run.returns[-1] > 0.9


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_command_line_compares_and_draws(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ppo.png"
    words = ["--cell", cell, "--hidden", "8", "--environments", "5", "--steps", "40"]
    assert ppo.main([*words, "--updates", "2", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert f"{cell.upper()} of 8 units, 5 environments, 40 steps per update" in printed
    assert "times as fast as with rows split and padded" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_that_differ_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = staticmethod(lambda layer, x, state, starts: layer(x, state)[0])
    monkeypatch.setattr(ppo, "with_resets", without)
    words = ["--hidden", "8", "--environments", "4", "--steps", "60", "--updates", "1"]
    assert ppo.main([*words, "--plot", ""]) == 1
    assert "the losses differ by more than 1e-04" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--environments", "3"], "--environments: expected at least 4, got 3"),
        (["--updates", "0"], "argument --updates: must be from 1 to "),
        (["--plot", "curves.xyz"], "--plot: curves.xyz: the name must end in one of .png, "),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as caught:
        ppo.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
