"""`python -m bench.gpu`, rehearsed: the stages on kernels that run on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_on_host
from bench import gpu, gpu_cells

pytestmark = pytest.mark.skipif(
    cuda_on_host.why_not() is not None, reason=str(cuda_on_host.why_not())
)


def test_cells_are_timed_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--rehearse", "--stage", "time", "--json", str(file)]
    assert gpu.main(arguments) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == len(gpu_cells.cells(rehearse=True))
    for row in rows:
        assert row["rehearsal"]
        assert row["parity"]["ok"]
        # Of 16 bits, H of 8; Triton's interpreter does not multiply bfloat16.
        refused = {"fastrnn triton streamed", "fastrnn triton resident"}
        assert set(row["results"]) == {"torch.nn", *gpu_cells.OURS} - refused
        assert set(row["skipped"]) == {"haste", "flashrnn", "torchrl"} | refused
    assert gpu.main(arguments) == 0  # goes on with the file: nothing is left to measure
    assert json.loads(file.read_text()) == rows
    assert "us a step" in capsys.readouterr().out


def test_a_wrong_cell_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(self: gpu_cells.Workload) -> dict[str, Any]:
        found = call(self)
        if type(self.layer).__module__.startswith("fastrnn"):
            found["output"] = found["output"] + 0.1
        return found

    call = gpu_cells.Workload.__call__
    monkeypatch.setattr(gpu_cells.Workload, "__call__", wrong)
    file = tmp_path / "rows.json"
    assert gpu.main(["--rehearse", "--stage", "time", "--json", str(file)]) == 1
    assert all(not row["results"] for row in json.loads(file.read_text()))


def test_grids_are_tuned(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert gpu.main(["--rehearse", "--stage", "tune", "--json", str(file)]) == 0
    for row in json.loads(file.read_text()):
        assert row["stage"] == "tune"
        assert set(row["results"]) == {"torch.nn", *gpu_cells.TUNED}


def test_the_deadline_ends_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--rehearse", "--stage", "time", "--deadline", "1", "--json", str(file)]
    assert gpu.main(arguments) == 0
    assert not file.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--rehearse" in capsys.readouterr().err


def test_the_grid_covers_what_is_claimed() -> None:
    cells = gpu_cells.cells(rehearse=False)
    assert len(cells) == len({json.dumps(cell) for cell in cells})
    assert {cell["H"] for cell in cells} == {64, 128, 256, 512, 1024, 2048}
    assert any(cell["packed"] for cell in cells)
    assert {cell["dtype"] for cell in cells} == set(gpu_cells.DTYPES)
    assert any(cell["bidirectional"] for cell in cells)
