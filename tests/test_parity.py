"""`python -m fastrnn.parity`, and the tolerance rule itself: it must fail on wrong numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastrnn
from compare import check
from fastrnn import _backend, _ops, parity
from fastrnn.parity import EPS, Sampler, compare, error, run_case


def test_report_passes(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float32", "bfloat16", "--backend", fastrnn.get_backend()]
    assert parity.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(r"(RNN|LSTM|GRU) .* (output|[hc]_n|d \w+)$", line)]
    assert len(rows) == 5 * 2 * 4
    assert "40 configurations, 0 outside the rule" in "\n".join(lines)


def test_report_fails_when_a_gradient_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = parity.run_layer

    def wrong(module: torch.nn.Module, *arguments: object) -> dict[str, Tensor]:
        result = original(module, *arguments)
        if isinstance(module, fastrnn.GRU):
            result["d weight_hh_l0"] = result["d weight_hh_l0"] * 1.01
        return result

    monkeypatch.setattr(parity, "run_layer", wrong)
    assert parity.main(["--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 4
    assert all("weight_hh_l0" in line for line in printed.splitlines() if "FAIL" in line)


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backend", "nonsense"], "error: unknown backend 'nonsense', expected one of"),
        (["--device", "nowhere"], "error: --device nowhere: Expected one of cpu"),
        (["--device", "meta"], "error: --device meta: it holds no numbers to compare"),
    ):
        with pytest.raises(SystemExit) as caught:
            parity.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_ops, "native_error", "built for the test without it")
    with pytest.raises(SystemExit):
        parity.main(["--backend", "native"])
    assert "backend 'native' is not available: built for the test" in capsys.readouterr().err


def test_fallback_to_the_reference_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other warnings than torch.nn's own about projections are let through."""
    monkeypatch.setattr(_ops, "native_error", "built for the test without it")
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(parity, "_CELLS", {"LSTM proj": parity._CELLS["LSTM proj"]})
    with pytest.warns(UserWarning, match="slow reference .* built for the test") as caught:
        assert parity.main(["--dtype", "float32"]) == 0
    assert len(caught) == 1
    assert capsys.readouterr().out.splitlines()[0].endswith("backend auto (reference)")


def test_header_and_footer_name_what_was_compared(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "_CASES", {"one step": parity._CASES["one step"]})
    assert parity.main(["--dtype", "float64", "float16"]) == 0
    printed = capsys.readouterr().out
    backend, _, isa = engine.partition("-")
    words = f"backend {backend} ({isa})" if isa else f"backend {backend}"
    assert printed.splitlines()[0].endswith(words)
    assert "k = 64 (float64), 4 (float16)." in printed


MISTAKES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "a scaled gradient": lambda r: r["d weight_ih_l0"].mul_(1.01),
    "a scaled state gradient": lambda r: r["d c_0"].mul_(1.01),
    "a missing gradient": lambda r: r.__delitem__("d h_0"),
    "a dropped contribution": lambda r: r["d input"][0].zero_(),
    "swapped gates": lambda r: r["d bias_hh_l0"].copy_(r["d bias_hh_l0"].roll(37)),
    "one wrong element": lambda r: r["output"][3, 1, 2].add_(1e-3),
    "a NaN": lambda r: r["h_n"][0, 0, 0].fill_(float("nan")),
    "an infinity": lambda r: r["c_n"][0, 0, 0].fill_(float("inf")),
    "another dtype": lambda r: r.update(output=r["output"].double()),
    "another shape": lambda r: r.update(h_n=r["h_n"][:, :2]),
    "an extra gradient": lambda r: r.update({"d extra": r["d h_0"]}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_rule_sees(mistake: str) -> None:
    same = run_case(torch.nn, "LSTM", "no bias", torch.float32, "cpu", torch.float32)
    ref64 = run_case(torch.nn, "LSTM", "no bias", torch.float32, "cpu", torch.float64)
    same["d bias_hh_l0"] = ref64["d bias_hh_l0"] = torch.arange(148.0)
    got = {name: value.clone() for name, value in same.items()}
    check(got, same, ref64)
    MISTAKES[mistake](got)
    with pytest.raises(AssertionError):
        check(got, same, ref64)


def test_error_is_relative_to_the_largest_element() -> None:
    y64 = torch.tensor([1.0, -3.0], dtype=torch.float64)
    assert error(torch.tensor([1.5, -3.0]), y64) == pytest.approx(0.5 / 4)
    assert error(torch.empty(0), torch.empty(0)) == 0.0


def test_allowance_is_twice_the_error_of_torch_and_eps() -> None:
    y64 = torch.zeros(2, dtype=torch.float64)
    torch_same = {"y": torch.tensor([1e-3, 0.0])}

    def ok(value: float) -> bool:
        return compare({"y": torch.tensor([0.0, value])}, torch_same, {"y": y64})[0].ok

    eps = EPS[torch.float32]
    assert ok(2e-3 + 0.9 * eps)
    assert not ok(2e-3 + 1.2 * eps)


def test_infinity_may_stand_where_float64_or_torch_has_it() -> None:
    inf = float("inf")
    overflowed, finite = torch.tensor([inf, 1.0]), torch.tensor([7e4, 1.0])

    def ok(got: Tensor) -> bool:
        return compare({"y": got}, {"y": overflowed}, {"y": finite.double()})[0].ok

    assert ok(overflowed)
    assert ok(finite)
    assert not ok(torch.tensor([-inf, 1.0]))
    assert not ok(torch.tensor([inf, inf]))
    assert not ok(torch.tensor([inf, 1.1]))


def test_integer_problems_need_no_rounding() -> None:
    """ReLU problems are drawn so that a product is exact in the narrowest dtype."""
    sampler = Sampler(0, torch.bfloat16, integers=True)
    weight, data = sampler.parameter((60, 20), 60), sampler.data((50, 20))
    exact = data @ weight.T
    assert weight.unique().tolist() == [-1.0, 0.0, 1.0]
    assert exact.abs().max() > 1
    assert torch.equal((data.bfloat16() @ weight.bfloat16().T).double(), exact)
