"""Random configurations against torch.nn: some of `python tests/fuzz.py`, and a search by
hypothesis, which reduces what it finds to the smallest configuration that still fails."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import fuzz
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fastrnn
from cases import CELLS, DTYPES, Case, Problem, build
from compare import check, engines, use_engine
from fastrnn.parity import NO_PROJECTIONS, run_layer


@pytest.fixture(autouse=True)
def _no_projection_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_PROJECTIONS)
        yield


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_random_configurations(first: int) -> None:
    mismatches = fuzz.worker((range(first, first + 25), engines()))
    assert not mismatches, "\n".join(
        f"--only {seed} ({name}): {'; '.join(tensors)}" for seed, name, tensors in mismatches
    )


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, Case, torch.dtype]:
    cell = draw(st.sampled_from(list(CELLS)))
    H = draw(st.integers(1 if cell != "lstm_proj" else 2, 40))
    layers = draw(st.integers(1, 3))
    lengths = draw(st.none() | st.lists(st.integers(1, 12), min_size=1, max_size=8).map(tuple))
    case = Case(
        "hypothesis", "found by search", layers=layers, lengths=lengths, H=H,
        T=draw(st.integers(1, 12)), B=draw(st.integers(0, 12)), I=draw(st.integers(1, 40)),
        P=draw(st.integers(1, H - 1)) if cell == "lstm_proj" else 0,
        bidirectional=draw(st.booleans()), bias=draw(st.booleans()),
        batch_first=draw(st.booleans()), strided=draw(st.booleans()),
        unbatched=lengths is None and draw(st.booleans()),
        hx=draw(st.sampled_from(["given", "none", "expanded", "strided"])),
        dropout=draw(st.sampled_from([0.0, 0.5])) if layers > 1 else 0.0,
        training=draw(st.booleans()),
        frozen=tuple(draw(st.sets(st.sampled_from(["weights", "input", "h_0", "c_0"])))),
    )  # fmt: skip
    return cell, case, draw(st.sampled_from(list(DTYPES.values())))


@given(configurations(), st.sampled_from(engines()), st.integers(0, 1000))
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
def test_searched_configurations(
    configuration: tuple[str, Case, torch.dtype], engine: str, seed: int
) -> None:
    problem = build(*configuration, seed)
    with use_engine(engine):
        got = problem.run(fastrnn)
    check(got, problem.run(torch.nn), problem.run(torch.nn, torch.float64))


@given(configurations(), st.sampled_from(engines()), st.data())
@settings(deadline=None, max_examples=60, derandomize=True, database=None)
def test_packed_sequences_do_not_depend_on_each_other(
    configuration: tuple[str, Case, torch.dtype], engine: str, data: st.DataObject
) -> None:
    """Each row of a packed batch gives what it gives alone, up to rounding."""
    cell, case, _ = configuration
    lengths = case.lengths or (3, 5, 1)
    case = dataclasses.replace(
        case, lengths=lengths, unbatched=False, dropout=0.0, hx="none", frozen=("weights",),
        strided=False, batch_first=False,
    )  # fmt: skip
    problem = build(cell, case, torch.float64)
    b = data.draw(st.integers(0, len(lengths) - 1))
    with use_engine(engine):
        module = problem.make(fastrnn)
        packed, _, _ = problem.arguments()
        together = run_layer(module, packed)
        alone = run_layer(module, problem.values["input"][: lengths[b], b : b + 1])
    for name in ("h_n", "c_n"):
        if name in together:
            torch.testing.assert_close(together[name][:, b : b + 1], alone[name])


def test_fuzzer_reports_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient that is off by one percent is found, named, and fails the run."""
    seed = next(s for s in range(100) if fuzz.random_case(s)[2] == torch.float32)
    assert fuzz.main(["--only", str(seed)]) == 0
    run = Problem.run

    def wrong(problem: Problem, namespace: object, *dtype: torch.dtype) -> object:
        result = run(problem, namespace, *dtype)
        if namespace is fastrnn:
            result = {name: value * 1.01 for name, value in result.items()}
        return result

    monkeypatch.setattr(Problem, "run", wrong)
    assert fuzz.main(["--only", str(seed)]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_configuration_of_a_seed_is_fixed() -> None:
    """A reproducer that was printed once stays valid on every machine."""
    assert fuzz.random_case(7) == (
        "lstm",
        Case("seed7", "random", T=1, B=6, I=6, H=4, batch_first=True, unbatched=True, hx="strided",
             strided=True),
        torch.float64,
    )  # fmt: skip
    assert fuzz.describe(17) == (
        "gru float16 T=12 B=11 I=22 H=24 layers=3 bias=False dropout=0.5 "
        "lengths=(2, 1, 4, 7, 12, 7, 5, 9, 6, 11, 11) hx='strided' "
        "frozen=('h_0', 'weight_hh_l0')"
    )
    assert len({fuzz.describe(seed) for seed in range(50)}) == 50
