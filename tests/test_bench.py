"""bench/: the cases are well formed, the measurements mean what they say, red rows stay untimed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).parent.parent))  # after an installed fastrnn, not before it

from bench import cases, measure, plot, rivals, run

TINY = cases.Case("tiny", "fast enough for a test", T=3, B=2, H=8, input_size=5)
TINY_PACKED = cases.Case("tiny-packed", "packed", T=4, B=2, H=8, lengths=(4, 2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices on two threads of a busy machine take longer than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrong_fastrnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fastrnn's entry compute with one weight changed."""

    def make(workload: cases.Workload) -> measure.Call:
        call = rivals.make_fastrnn(workload)
        return lambda: [result + 1e-3 for result in call()]

    changed = [replace(r, make=make) if r.name == "fastrnn" else r for r in rivals.RIVALS]
    monkeypatch.setattr(run, "RIVALS", changed)


def test_cases_are_distinct_and_explained() -> None:
    ids = [case.id for case in cases.CASES]
    assert len(set(ids)) == len(ids)
    for case in cases.CASES:
        assert case.reason
        if case.lengths:
            assert (len(case.lengths), max(case.lengths)) == (case.B, case.T)


def test_flops_of_a_case_counted_by_hand() -> None:
    case = cases.Case("x", "x", T=3, B=2, H=4, input_size=5, layers=2, bidirectional=True)
    first, second = 4 * (5 + 4), 4 * (8 + 4)  # multiplications per gate, row and direction
    assert cases.flops(case, "gru", "inference") == 2 * 3 * 2 * (first + second) * 6
    assert cases.flops(case, "rnn", "training") == 3 * 2 * 2 * (first + second) * 6
    assert cases.flops(TINY_PACKED, "lstm", "inference") == 2 * 4 * 8 * (8 + 8) * 6


@pytest.mark.parametrize("case", [TINY, TINY_PACKED, cases.twin(TINY, "bfloat16")])
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_row(case: cases.Case, cell: str, mode: str) -> None:
    row = run.measure(case, cell, mode, peak=1e11, quick=True)
    assert row["parity"]["fastrnn"]["ok"], row["parity"]
    ours, theirs = row["results"]["fastrnn"], row["results"]["torch.nn"]
    for result in (ours, theirs):
        assert 0 < result["p20"] <= result["median"] <= result["p80"]
        assert result["rounds"] >= 3
        # At least the output is held.
        assert result["peak_bytes"] >= case.rows * case.H * (2 if case.dtype == "bfloat16" else 4)
        share = cases.flops(case, cell, mode) / result["median"] / 1e11
        assert result["gemm_share"] == pytest.approx(share)
    assert row["speedup"] == pytest.approx(theirs["median"] / ours["median"])
    assert row["speedup_p20"] <= row["speedup_p80"]
    json.dumps(row)


def test_training_computes_every_gradient() -> None:
    workload = cases.build_workload(TINY, "lstm", "training")
    results = cases.bind(workload.module, workload)()
    output, h_n, c_n, *gradients = results
    assert (output.shape, h_n.shape, c_n.shape) == ((3, 2, 8), (1, 2, 8), (1, 2, 8))
    leaves = [workload.input, *workload.module.parameters()]
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert all(g.abs().max() > 0 for g in gradients)


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or () for name in "ab"}
    samples = measure.time_paired(calls, seconds=0, min_rounds=4)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "abba" * 3


def test_peak_memory_counts_what_is_held_at_once() -> None:
    kept = torch.empty(1000)

    def call() -> tuple[torch.Tensor, ...]:
        first = torch.empty(5000)
        second = torch.empty(3000)
        del first
        return (second, torch.empty(1000), kept)

    assert measure.peak_memory(call) == 4 * 8000


def test_percentiles_are_ranks() -> None:
    timing = measure.Timing.of([float(x) for x in (5, 3, 1, 2, 4, 6)])
    assert (timing.p20, timing.median, timing.p80, timing.rounds) == (2, 3.5, 5, 6)


def test_command_writes_complete_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = rivals.Rival("nobody", lambda _: None, rivals.needs("fastrnn_no_such_module"))
    monkeypatch.setattr(run, "RIVALS", [*rivals.RIVALS, missing])
    monkeypatch.setattr(run, "CASES", [TINY])
    file = tmp_path / "rows.json"
    words = ["--quick", "--cell", "gru", "--threads", "1", "2", "--json", str(file)]
    assert run.main(words) == 0
    rows = plot.load(file)
    assert [(r["cell"], r["mode"], r["threads"]) for r in rows] == [
        ("gru", mode, threads) for threads in (1, 2) for mode in cases.MODES
    ]
    for row in rows:
        assert row["device"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["date"].endswith("+00:00")
        assert row["gemm_peak"] > 0
        assert "commit" in row
        assert row["load"] >= 0
    assert "nobody: absent (fastrnn_no_such_module is not installed)" in capsys.readouterr().out


@pytest.mark.usefixtures("wrong_fastrnn")
def test_wrong_numbers_are_red_and_untimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CASES", [TINY])
    assert run.main(["--quick", "--cell", "rnn", "--mode", "inference"]) == 1
    assert "RED" in capsys.readouterr().out
    row = run.measure(TINY, "rnn", "training", peak=1e11, quick=True)
    assert row["results"] == {}
    assert row["speedup"] is None


def test_nan_and_missing_results_are_red() -> None:
    workload = cases.build_workload(TINY, "rnn", "inference")
    good = cases.bind(workload.module, workload)
    output, h_n = good()
    calls = {"torch.nn": good, "fastrnn": lambda: (output * torch.nan, h_n)}
    assert not run.check(workload, calls)["fastrnn"]["ok"]
    calls["fastrnn"] = lambda: (output,)
    assert not run.check(workload, calls)["fastrnn"]["ok"]


def test_unknown_case_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--case", "odd", "nosuch"])
    assert caught.value.code == 2
    assert "no case is called nosuch" in capsys.readouterr().err


@pytest.mark.parametrize("cell", cases.CELLS)
def test_onnxruntime_computes_the_same(cell: str) -> None:
    reason = rivals.needs("onnxruntime", "onnx")()
    if reason:
        pytest.skip(reason)
    case = replace(TINY, layers=2, bidirectional=True)
    workload = cases.build_workload(case, cell, "inference")
    call = rivals.make_onnxruntime(workload)
    assert call is not None
    expected = cases.bind(workload.module, workload)()[0]
    torch.testing.assert_close(torch.as_tensor(call()[0]), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Returns a win, a loss and a red row."""
    shared = {
        "device": "some CPU", "versions": {"torch": "2", "fastrnn": "1"}, "kernels": "native",
        "commit": "abc", "load": 0.25, "cores": 8,
        "date": "2026-01-02T03:04:05+00:00", "case": "tiny", "shape": "T=3",
        "mode": "training", "dtype": "float32", "threads": 1,
    }  # fmt: skip
    result = []
    for cell, speedup in (("lstm", 2.5), ("gru", 0.75), ("rnn", None)):
        seconds = {"fastrnn": {"median": 2e-5}} if speedup else {}
        spread = {
            "speedup_p20": speedup and 0.9 * speedup,
            "speedup_p80": speedup and 1.1 * speedup,
        }
        result.append({**shared, "cell": cell, "speedup": speedup, "results": seconds, **spread})
    return result


def test_table_shows_wins_losses_and_red(rows: list[dict[str, Any]]) -> None:
    text = plot.table(rows)
    assert "| tiny | T=3 | 20.0 µs, 2.50× | 20.0 µs, 0.75× | red |" in text
    assert (
        "some CPU, torch 2, fastrnn 1 (native), commit abc, 2026-01-02, load before 0.2 on 8 cores"
        in text
    )


def test_picture_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "rows.json", tmp_path / "speedup.png"
    rows.append({**rows[0], "dtype": "bfloat16", "mode": "inference"})
    file.write_text(json.dumps(rows))
    assert plot.main([str(file), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '[{"case": "x"}]', "[1]"])
def test_unusable_result_files_are_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    assert plot.main([str(file), "--table"]) == 2
    assert str(file) in capsys.readouterr().err
