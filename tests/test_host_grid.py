"""The host that runs blocks at the same time, with weak memory (tests/cpp/host_grid.h): litmus
tests of what it keeps, and of what it breaks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["tests/cpp/host_grid_test.cpp", "tests/cpp/host_memory_test.cpp"]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no C++ sources beside the tests")
def test_host_grid(tmp_path: Path) -> None:
    program = tmp_path / "host_grid_test"
    command = [str(COMPILER), "-O1", "-std=c++17", "-Wall", "-Wextra", "-Icsrc", "-Itests/cpp"]
    subprocess.run([*command, *SOURCES, "-o", str(program)], check=True, cwd=ROOT)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout
