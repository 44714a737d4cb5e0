"""The activation functions of csrc/math.h: accuracy, limits, NaN, for every instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from compare import engines

SOURCE = Path(__file__).parent / "cpp/math_test.cpp"
FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
MAX_ULP = 3.0  # the bound that csrc/math.h states
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", FLAGS)
def test_activation_accuracy(isa: str, tmp_path: Path) -> None:
    if f"native-{isa}" not in engines():
        pytest.skip(f"this CPU cannot run {isa}")
    program = tmp_path / "math_test"
    command = [str(COMPILER), "-std=c++17", "-O2", "-ffp-contract=off", f"-DFASTRNN_ISA=isa_{isa}"]
    subprocess.run([*command, *FLAGS[isa], str(SOURCE), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == ["float", "double", "Vec<float>", "Vec<double>"]
    for name, sigmoid, tanh, failures in lines:
        assert int(failures) == 0, f"{name}: wrong limits or NaN"
        assert float(sigmoid) <= MAX_ULP, f"{name}: sigmoid off by {sigmoid} ulp"
        assert float(tanh) <= MAX_ULP, f"{name}: tanh off by {tanh} ulp"


# log2 of the largest errors, as csrc/cuda/quick.h states them.
QUICK = {"sigmoid_relative": -19, "sigmoid_absolute": -38, "tanh_relative": -19}


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_quick_activations(tmp_path: Path) -> None:
    program = tmp_path / "quick_test"
    source = SOURCE.parent / "quick_test.cpp"
    command = [str(COMPILER), "-std=c++17", "-O2", "-ffp-contract=off", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    run = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found.pop("failures") == "0"
    assert found.keys() == QUICK.keys()
    for name, most in QUICK.items():
        assert float(found[name]) <= most, f"{name}: 2^{found[name]}"
