"""Result files, criteria, pictures and sweeps of the benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fastrnn

pytest.importorskip("numpy", reason="the benchmarks need the extra [bench]")
pytest.importorskip("tqdm", reason="the benchmarks need the extra [bench]")

sys.path.append(str(Path(__file__).parent.parent))  # after an installed fastrnn, not before it

from bench import (
    cases,
    criteria,
    measure,
    plot,
    rivals,
    rows,
    sweep,
    sweep_layers,
    sweep_sequences,
    sweep_stream,
    sweep_transforms,
)

TINY_STREAM = cases.Case("tiny-stream", "a state is given", T=1, B=1, H=8, carried=True)


def result_row(
    cell: str, torch_nn: float | None, jax: float | None = None, **changed: Any
) -> dict[str, Any]:
    """Return a row of a result file with these speed-ups of fastrnn; red without them."""
    ratios = {name: ratio for name, ratio in (("torch.nn", torch_nn), ("jax", jax)) if ratio}
    results = {"fastrnn": {"median": 2e-5, "peak_bytes": 100, "gemm_share": 0.9}} if ratios else {}
    for name, ratio in ratios.items():
        results[name] = {"median": 2e-5 * ratio, "peak_bytes": 100, "gemm_share": 0.5}
    return {
        "device": "some CPU", "versions": {"torch": "2", "fastrnn": "1"}, "kernels": "native",
        "commit": "abc", "load": 0.25, "cores": 8,
        "date": "2026-01-02T03:04:05+00:00", "case": "tiny", "shape": "T=3", "sizes": {"B": 64},
        "mode": "training", "dtype": "float32", "threads": 1, "cell": cell, "results": results,
        "ratios": {n: {"median": r, "p20": 0.9 * r, "p80": 1.1 * r} for n, r in ratios.items()},
        "speedup": torch_nn, "speedup_p20": torch_nn, "speedup_p80": torch_nn, **changed,
    }  # fmt: skip


def test_table_shows_wins_losses_and_red() -> None:
    lost, won = result_row("gru", 0.75), result_row("gru", 3.0, case="second")
    text = plot.table([result_row("lstm", 2.5, 1.25), lost, won, result_row("rnn", None)])
    assert "| tiny | T=3 | 20.0 µs, 2.50× / 1.25× JAX | 20.0 µs, 0.75× | red |" in text
    assert "| **geometric mean** |  | 2.50× / 1.25× | 1.50× / 1.50× |" in text
    assert (
        "some CPU, torch 2, fastrnn 1 (native), commit abc, 2026-01-02, load before 0.2 on 8 cores"
        in text
    )


def test_an_earlier_fastrnn_is_no_rival() -> None:
    row = result_row("gru", 2.0, 1.5)
    row["ratios"]["base"] = {"median": 0.5}
    assert rows.best_rival(row) == "jax"
    assert (rows.ratio(row), rows.ratio(row, "base"), rows.ratio(row, "nobody")) == (1.5, 0.5, None)


def meeting_rows() -> list[dict[str, Any]]:
    """Return rows of a file that meets every criterion."""
    return [
        result_row(cell, 4.0, 2.0, mode=mode, dtype=dtype)
        for cell in cases.CELLS
        for mode in cases.MODES
        for dtype in cases.DTYPES
    ]


def judged(found: list[dict[str, Any]]) -> dict[str, bool | None]:
    return {verdict.text: verdict.ok for verdict in criteria.judge(found)}


def test_criteria_hold_or_fail_one_by_one() -> None:
    good = meeting_rows()
    assert set(judged(good).values()) == {True}

    def failing(cell: str, mode: str, dtype: str, torch_nn: float | None, *rest: Any) -> set[str]:
        changed = [r for r in good if (r["cell"], r["mode"], r["dtype"]) != (cell, mode, dtype)]
        row = result_row(cell, torch_nn, *rest, mode=mode, dtype=dtype)
        return {text for text, ok in judged([*changed, row]).items() if not ok}

    loses_inference = "fp32 inference: best rival, every case >= 0.97"
    assert loses_inference not in failing("gru", "inference", "float32", 9.0, 0.98)
    assert loses_inference in failing("gru", "inference", "float32", 9.0, 0.96)
    assert failing("lstm", "training", "float32", 1.2, 1.1) == {
        "fp32 training: LSTM over torch.nn, mean >= 1.3"
    }
    assert "fp32 training: best rival, every case >= 0.97" in failing(
        "rnn", "training", "float32", 9.0, 0.9
    )
    assert "bf16 training: RNN over torch.nn, mean >= 2.0" in failing(
        "rnn", "training", "bfloat16", 1.9
    )
    assert "bf16: torch.nn, every case >= 1" in failing("gru", "inference", "bfloat16", 0.99)
    # A red row fails all that is judged on every row.
    assert loses_inference in failing("gru", "inference", "float32", None)
    assert "peak memory at most torch.nn's, every row" in failing(
        "gru", "inference", "float32", None
    )


def test_criteria_of_memory_and_of_the_peak() -> None:
    found = meeting_rows()
    found[0]["results"]["fastrnn"]["peak_bytes"] = 101
    slow = next(r for r in found if (r["cell"], r["mode"]) == ("gru", "training"))
    slow["results"]["fastrnn"]["gemm_share"] = 0.84
    wrong = {text for text, ok in judged(found).items() if not ok}
    assert wrong == {
        "peak memory at most torch.nn's, every row",
        "fp32 training: GRU, RNN from B=32, share of the GEMM peak >= 0.85",
    }
    slow["sizes"]["B"] = 31  # below, it does not matter
    assert "GEMM" not in "".join(text for text, ok in judged(found).items() if ok is False)
    assert None in judged([]).values()


def test_criteria_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    rows.save(file, [*meeting_rows(), result_row("gru", 0.5, threads=2)])
    assert criteria.main([str(file)]) == 1
    text = capsys.readouterr().out
    assert "openvino: absent, not compared with" in text
    assert "FAILS  fp32 training: best rival, every case >= 0.97: lowest 0.50 (tiny gru" in text
    rows.save(file, meeting_rows())
    assert criteria.main([str(file)]) == 0


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    file, picture = tmp_path / "rows.json", tmp_path / "speedup.png"
    rows.save(file, [*meeting_rows(), result_row("rnn", None, case="red")])
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


@pytest.fixture
def small_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks what every sweep runs over."""
    monkeypatch.setattr(sweep_layers, "PACKED_T", (20,))
    monkeypatch.setattr(sweep_layers, "HIDDEN", range(1, 70))  # with --quick 1, 24, 47
    monkeypatch.setattr(sweep_layers, "LENGTHS_T", (1, 5))
    monkeypatch.setattr(sweep_layers, "LENGTHS_B", (2, 3))
    monkeypatch.setattr(sweep_stream, "SIZES", (8, 12))
    Kind = sweep_transforms.Kind
    small = {k: Kind(v.calls, (v.sizes[0], 3, 2, 5)) for k, v in sweep_transforms.KINDS.items()}
    monkeypatch.setattr(sweep_transforms, "KINDS", small)
    kinds = {
        k: sweep_sequences.Kind(v.calls, v.oracle, (9, 4, 5))
        for k, v in sweep_sequences.KINDS.items()
    }
    monkeypatch.setattr(sweep_sequences, "KINDS", kinds)


@pytest.mark.usefixtures("small_sweeps")
@pytest.mark.parametrize(
    ("name", "points", "said"),
    [
        ("packed", 1, "packed at most 1.15 of padded"),
        ("hidden", 12, "gru inference B=16: no H above 1.5"),
        ("lengths", 8, "gru training against B"),
        ("stream", 2, "fastrnn against torch.nn cell: at least"),
        ("transforms", 5, "gru ensemble, training: "),
        ("sequences", 3, "of the padded time for each step"),
    ],
)
def test_sweep(
    name: str, points: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    file, picture = tmp_path / "points.json", tmp_path / "points.png"
    words = ["--cell", "gru", "--quick", "--json", str(file), "--out", str(picture)]
    assert sweep.main([name, *words]) == 0
    written = json.loads(file.read_text())
    assert len(written) == points
    for row in written:
        assert (row["sweep"], row["cell"], row["threads"], row["red"]) == (name, "gru", 1, None)
        assert row["device"]
        assert row["date"].endswith("+00:00")
    assert said in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_sweeps")
@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_sweep_does_not_time_wrong_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(make: Any) -> Any:
        def wrong(*arguments: Any) -> measure.Call:
            call = make(*arguments)
            return lambda: [result + 1e-3 for result in call()]

        return wrong

    monkeypatch.setattr(sweep_layers, "make_fastrnn", spoilt(rivals.make_fastrnn))
    monkeypatch.setattr(sweep_stream, "step_of", spoilt(sweep_stream.step_of))
    kinds = {
        kind: sweep_transforms.Kind(spoilt_fastrnn(own.calls, spoilt), own.sizes)
        for kind, own in sweep_transforms.KINDS.items()
    }
    monkeypatch.setattr(sweep_transforms, "KINDS", kinds)
    of_sequences = {
        kind: sweep_sequences.Kind(spoilt_fastrnn(own.calls, spoilt), own.oracle, own.sizes)
        for kind, own in sweep_sequences.KINDS.items()
    }
    monkeypatch.setattr(sweep_sequences, "KINDS", of_sequences)
    assert sweep.main([name, "--cell", "rnn", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert "RED" in out
    assert "red, not timed: rnn" in err


def spoilt_fastrnn(make: Any, spoilt: Any) -> Any:
    def wrong(problem: Any) -> sweep_transforms.Calls:
        calls: sweep_transforms.Calls = make(problem)
        if problem.fast:
            call = calls[rivals.FASTRNN]
            calls[rivals.FASTRNN] = spoilt(lambda: call)()
        return calls

    return wrong


def curve(seconds: list[float]) -> list[dict[str, Any]]:
    return [{"median": value, "flops": 10} for value in seconds]


def test_excess_finds_cliffs_and_holes() -> None:
    assert sweep_layers.excess(curve([1, 1, 1, 1])) == [1, 1, 1, 1]
    assert sweep_layers.excess(curve([1, 1, 2, 2])) == [1, 1, 2, 2]  # a cliff
    assert sweep_layers.excess(curve([3, 1, 1])) == [3, 1, 1]  # slower than the next size
    assert sweep_layers.excess(curve([1, 1, 1.2])) == pytest.approx([1, 1, 1.2])


def test_hidden_measures_a_suspicious_point_again(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"cell": "gru", "mode": "inference", "B": 1, "flops": 10, "red": None, "quick": True}
    found = [{**row, "H": H, "median": 9.0 if H == 2 else 1.0} for H in (1, 2, 3)]
    monkeypatch.setattr(sweep_layers, "measure_hidden", lambda *_: {"median": 5.0})
    text = sweep_layers.conclude_hidden(found)
    assert [row["excess"] for row in found] == [1, 5, 1]
    assert "FAILS" in text[0]
    assert "highest 5.00 (H=2), above: 2" in text[0]
    monkeypatch.setattr(sweep_layers, "measure_hidden", lambda *_: {"median": 1.0})
    assert "holds" in sweep_layers.conclude_hidden(found)[0]


def test_linear_fit() -> None:
    assert sweep_layers.linear_fit([1, 2, 10], [5, 7, 23]) == pytest.approx((3, 2))
    start, slope = sweep_layers.linear_fit([1, 2, 4], [1, 3, 9])  # would start below zero
    assert start == 0
    assert 1 < slope < 3


def test_step_is_used_where_a_layer_has_it() -> None:
    class Layer:
        def __call__(self, input: Any, state: Any) -> Any:
            return input + 1, state

    class Stepping(Layer):
        def step(self, input: Any, state: Any) -> Any:
            return input + 2, state

    workload = cases.build_workload(TINY_STREAM, "gru", "inference")
    row, state = workload.input[0], workload.state
    assert sweep_stream.step_of(Stepping(), workload)()[0].equal(row + 2)
    assert sweep_stream.step_of(Layer(), workload)()[0].equal(row[None] + 1)
    assert sweep_stream.step_of(Layer(), workload)()[1] is state


def test_stream_times_quantized_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(layer: Any, weights: str) -> None:
        if weights == "int8":  # wrong
            layer.weight_hh_l0.data.mul_(-5)

    monkeypatch.setattr(fastrnn, "quantize", quantize)
    row = sweep_stream.measure("lstm", 16, True)
    assert row["wrong"] == ["fastrnn int8"]
    assert row["results"]["fastrnn bf16"]["floor"] > 0
    assert "fastrnn int8   wrong numbers, not timed" in sweep_stream.line(row)
