"""The kernels of a grid on the host (tests/cpp/host_grid.h): where the numbers of their products
lie, what blocks tell each other under schedules and memory that mean ill, and that exchanges which
are broken are caught. FASTRNN_GRID_SEEDS sets for how many seeds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
SEEDS = os.environ.get("FASTRNN_GRID_SEEDS", "2")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no C++ sources beside the tests"),
]


@pytest.mark.parametrize("name", ["fragments_test", "grid_protocol_test"])
def test_program(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    command = [str(COMPILER), "-O1", "-std=c++17", "-Wall", "-Wextra", "-Icsrc", "-Itests/cpp"]
    command += ["-DFASTRNN_MOST_SPINS=3000", f"tests/cpp/{name}.cpp", "-o", str(program)]
    subprocess.run(command, check=True, cwd=ROOT)
    run = subprocess.run([str(program), SEEDS], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout
