"""bench/: the cases are well formed, the measurements mean what they say, red rows stay untimed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).parent.parent))  # after an installed fastrnn, not before it

from bench import (
    base,
    cases,
    check,
    environment,
    measure,
    onnx_rivals,
    rivals,
    rows,
    run,
)

TINY = cases.Case("tiny", "fast enough for a test", T=3, B=2, H=8, input_size=5)
TINY_PACKED = cases.Case("tiny-packed", "packed", T=4, B=2, H=8, lengths=(4, 2))
TINY_STACK = cases.Case("tiny-stack", "both directions", 3, 2, 8, 5, layers=2, bidirectional=True)
TINY_STREAM = cases.Case("tiny-stream", "a state is given", T=1, B=1, H=8, carried=True)
OWN = [rival for rival in rivals.RIVALS if rival.name in ("torch.nn", "fastrnn")]


@pytest.fixture
def wrong_fastrnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fastrnn's entry compute with one weight changed."""

    def make(workload: cases.Workload) -> measure.Call:
        call = rivals.make_fastrnn(workload)
        return lambda: [result + 1e-3 for result in call()]

    changed = [replace(r, make=make) if r.name == "fastrnn" else r for r in OWN]
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


def test_traffic_of_a_case_counted_by_hand() -> None:
    input, recurrent = 4 * 2 * 3 * 4 * 5, 4 * 2 * 3 * 4 * 4  # bytes, both directions of a GRU
    case = cases.Case("x", "x", T=10, B=1, H=4, input_size=5, bidirectional=True)
    assert cases.weight_bytes(case, "gru") == (input, recurrent)
    assert cases.traffic(case, "gru", "inference") == input + 9 * recurrent
    assert cases.traffic(case, "gru", "training") == 3 * input + 19 * recurrent
    assert cases.traffic(replace(case, carried=True), "gru", "inference") == input + 10 * recurrent
    half = cases.twin(case, "bfloat16")
    assert 2 * cases.traffic(half, "gru", "training") == cases.traffic(case, "gru", "training")
    assert cases.working_set(case, "gru") == recurrent // 2
    assert cases.working_set(replace(case, T=1), "gru") == input + recurrent


@pytest.mark.parametrize("case", [TINY, TINY_PACKED, TINY_STREAM, cases.twin(TINY, "bfloat16")])
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_row(case: cases.Case, cell: str, mode: str) -> None:
    row = run.measure(case, cell, mode, quick=True, rivals=OWN)
    assert row["parity"]["fastrnn"]["ok"], row["parity"]
    ours, theirs = row["results"]["fastrnn"], row["results"]["torch.nn"]
    arithmetic = cases.flops(case, cell, mode) / row["gemm_peak"]
    moving = cases.traffic(case, cell, mode) / row["bandwidth"]
    assert row["floor"] == max(arithmetic, moving) > 0
    assert row["bound"] == ("GEMM" if arithmetic > moving else "memory")
    for result in (ours, theirs):
        assert 0 < result["p20"] <= result["median"] <= result["p80"]
        assert result["rounds"] >= 3
        assert result["cpus"] < 1.5  # on one thread
        # At least the output is held.
        assert result["peak_bytes"] >= case.rows * case.H * (2 if case.dtype == "bfloat16" else 4)
        assert result["gemm_share"] == pytest.approx(arithmetic / result["median"])
        assert result["floor_share"] == pytest.approx(row["floor"] / result["median"])
    assert row["speedup"] == pytest.approx(theirs["median"] / ours["median"])
    assert row["ratios"]["torch.nn"]["median"] == row["speedup"]
    assert row["speedup_p20"] <= row["speedup_p80"]
    assert json.loads(json.dumps(row)) == row


def test_training_computes_every_gradient() -> None:
    workload = cases.build_workload(TINY, "lstm", "training")
    results = cases.bind(workload.module, workload)()
    assert list(check.named(results, workload))[3] == "d input"
    output, h_n, c_n, *gradients = results
    assert (output.shape, h_n.shape, c_n.shape) == ((3, 2, 8), (1, 2, 8), (1, 2, 8))
    leaves = [workload.input, *workload.module.parameters()]
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert all(g.abs().max() > 0 for g in gradients)


def test_a_carried_state_reaches_the_layer() -> None:
    workload = cases.build_workload(TINY_STREAM, "lstm", "inference")
    given = cases.bind(workload.module, workload)()
    without = cases.bind(workload.module, replace(workload, state=None))()
    assert not any(torch.equal(a, b) for a, b in zip(given, without, strict=True))


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or () for name in "ab"}
    samples = measure.time_paired(calls, seconds=0, min_rounds=4, burst=0)
    assert {name: len(sample.seconds) for name, sample in samples.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "abba" * 3


def test_short_calls_are_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> tuple[()]:
        nonlocal now
        now += 1e-3
        return ()

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    sample = measure.time_paired({"a": call}, seconds=0, min_rounds=2, burst=0.0105)["a"]
    assert now == pytest.approx(1e-3 * (2 + 2 * 10))  # two to warm up, then two turns of ten
    assert sample.seconds == pytest.approx([1e-3, 1e-3])


def test_bandwidth_and_peak_are_of_a_real_machine() -> None:
    for size in (8, 2**16, 2**22):
        assert 1e8 < measure.bandwidth(size, 0.02) < 1e13
    peak = measure.gemm_peak(torch.float32, 0.02)
    assert 1e8 < peak < 1e13
    assert measure.gemm_peak(torch.bfloat16, 0.02) > 0.2 * peak  # a layer may compute in float32


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_one_thread_is_held_on_one_cpu() -> None:
    before = os.sched_getaffinity(0)
    with measure.pinned(2):
        assert os.sched_getaffinity(0) == before
    with measure.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


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
    monkeypatch.setattr(run, "RIVALS", [*OWN, missing])
    monkeypatch.setattr(environment, "RIVALS", [*OWN, missing])
    monkeypatch.setattr(run, "CASES", [TINY])
    file = tmp_path / "rows.json"
    words = ["--quick", "--cell", "gru", "--threads", "1", "2", "--json", str(file)]
    assert run.main(words) == 0
    written = rows.load(file)
    assert [(r["cell"], r["mode"], r["threads"]) for r in written] == [
        ("gru", mode, threads) for threads in (1, 2) for mode in cases.MODES
    ]
    for row in written:
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
    row = run.measure(TINY, "rnn", "training", quick=True)
    assert row["results"] == row["ratios"] == {}
    assert row["speedup"] is None


def test_nan_and_missing_results_are_red() -> None:
    workload = cases.build_workload(TINY, "rnn", "inference")
    good = cases.bind(workload.module, workload)
    output, h_n = good()
    calls = {"torch.nn": good, "fastrnn": lambda: (output * torch.nan, h_n)}
    calls["other"] = calls["fastrnn"]
    assert not any(verdict["ok"] for verdict in check.check(workload, calls).values())
    calls["fastrnn"] = calls["other"] = lambda: (output,)
    assert not any(verdict["ok"] for verdict in check.check(workload, calls).values())


def test_unknown_case_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--case", "odd", "nosuch"])
    assert caught.value.code == 2
    assert "no case is called nosuch" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "jax"])
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (TINY_STACK, "inference"),
        (TINY_STREAM, "inference"),
        (TINY_STACK, "training"),
        (cases.twin(TINY, "bfloat16"), "training"),
        (cases.twin(TINY, "bfloat16"), "inference"),
    ],
)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_rivals_compute_the_same(name: str, case: cases.Case, cell: str, mode: str) -> None:
    rival = next(rival for rival in rivals.RIVALS if rival.name == name)
    if rival.absent():
        pytest.skip(rival.absent() or "")
    workload = cases.build_workload(case, cell, mode)
    calls, skipped = run.bind_all([*OWN, rival], workload)
    if name != "jax" and (mode == "training" or case.dtype == "bfloat16"):
        assert "only" in skipped[name]
        return
    results = check.named(calls[name](), workload)
    expected = check.named(calls["torch.nn"](), workload)
    assert results.keys() == expected.keys()
    tolerance = 1e-5 if case.dtype == "float32" else 0.05
    for key, y in expected.items():
        difference = (results[key].double() - y.double()).abs().max()
        assert difference < tolerance * (1 + y.abs().max()), key
    assert check.check(workload, calls)[name]["ok"]


def test_jax_follows_the_number_of_threads() -> None:
    pytest.importorskip("jax")
    workload = cases.build_workload(TINY, "rnn", "inference")
    for threads in (2, 1):
        torch.set_num_threads(threads)
        output = rivals.make_jax(workload)()[0]
        assert os.environ["NPROC"] == str(threads)
        assert output.shape == (3, 2, 8)


def test_what_a_rival_cannot_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    workload = cases.build_workload(TINY_PACKED, "gru", "inference")
    with pytest.raises(cases.Unsupported, match="packed"):
        onnx_rivals.onnx_feed(workload)

    def refuse(_: cases.Workload) -> measure.Call:
        raise cases.Unsupported("no time to")

    picky = rivals.Rival("picky", refuse, lambda: None)
    row = run.measure(TINY, "gru", "inference", quick=True, rivals=[*OWN, picky])
    assert row["skipped"] == {"picky": "no time to"}
    assert "picky: no time to" in "\n".join(run.lines(row))


def test_unknown_base_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--base", "no-such-revision"])
    assert caught.value.code == 2
    assert "no-such-revision" in capsys.readouterr().err


def test_base_is_renamed_everywhere(tmp_path: Path) -> None:
    (tmp_path / "fastrnn").mkdir()
    (tmp_path / "fastrnn" / "ops.py").write_text("torch.ops.fastrnn.scan('fastrnn::scan')")
    (tmp_path / "ops.cpp").write_text("STABLE_TORCH_LIBRARY(fastrnn, m) { FASTRNN_CELLS }")
    base.rename(tmp_path)
    renamed = (tmp_path / "fastrnn_base" / "ops.py").read_text()
    assert renamed == "torch.ops.fastrnn_base.scan('fastrnn_base::scan')"
    assert "(fastrnn_base, m) { FASTRNN_CELLS }" in (tmp_path / "ops.cpp").read_text()


@pytest.mark.install
@pytest.mark.skipif(environment.git("rev-parse", "HEAD") is None, reason="not a git checkout")
def test_base_is_timed_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" not in environment.kernels():
        pytest.skip("fastrnn was built without its native part")
    monkeypatch.setenv("CXXFLAGS", "-O0")  # compiles in half the time; its speed does not matter
    with base.base_rival("HEAD") as earlier:
        row = run.measure(TINY, "lstm", "training", quick=True, rivals=[*OWN, earlier])
    assert row["parity"]["base"]["ok"], row["parity"]
    assert row["results"]["base"]["peak_bytes"] > 0
    assert rows.rivals_in(row) == ["torch.nn"]
    assert "fastrnn_base" not in (environment.git("worktree", "list") or "")
    assert sys.modules["fastrnn_base._C"] is not sys.modules["fastrnn._C"]
