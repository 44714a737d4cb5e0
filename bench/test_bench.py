"""The cases of bench.cases for pytest-benchmark: pytest bench/ --benchmark-json=FILE.

torch.nn and fastrnn run one after the other here, not in turns: for a comparison of the two use
bench.run, for a history of either use this.  A case whose numbers are wrong fails untimed.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import CASES, CELLS, MODES, Case, build_workload
from bench.rivals import FASTRNN, TORCH_NN, make_fastrnn, make_torch_nn
from bench.run import check

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("library", [TORCH_NN, FASTRNN])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(benchmark: Any, case: Case, cell: str, mode: str, library: str) -> None:
    benchmark.group = f"{case.id} {cell} {mode}"
    workload = build_workload(case, cell, mode)
    calls = {TORCH_NN: make_torch_nn(workload), FASTRNN: make_fastrnn(workload)}
    verdict = check(workload, calls)[FASTRNN]
    assert verdict["ok"], verdict
    benchmark(calls[library])
