"""`fastrnn.info`: the report names what is installed, built and chosen, with or without kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backends import python

import fastrnn
from fastrnn import _backend, _ops, info

needs_native = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))


def value_of(section: str, name: str, text: str) -> str:
    """What the report says under the heading `section`, in the row called `name`."""
    (rows,) = [part.splitlines()[1:] for part in text.split("\n\n") if part.startswith(section)]
    (row,) = [row.strip() for row in rows if row.strip().split("  ")[0] == name]
    return row[len(name) :].strip()


def test_report_names_the_versions():
    text = info.report()
    assert value_of("versions", "fastrnn", text) == fastrnn.__version__
    assert value_of("versions", "torch", text).startswith(torch.__version__)
    assert value_of("CPU", "threads", text).startswith(f"{torch.get_num_threads()} ")


def test_report_lists_every_backend_and_why_one_is_missing():
    text = info.report()
    for name, reason in _backend.backends().items():
        expected = "available" if reason is None else f"not available: {reason}"
        assert value_of("backends", name, text).startswith(expected)


def test_report_follows_the_selected_backend():
    with fastrnn.use_backend("reference"):
        assert value_of("backends", "selected", info.report()) == "reference"
    assert value_of("backends", "selected", info.report()) == fastrnn.get_backend()


def test_report_describes_the_native_build():
    native = pytest.importorskip("fastrnn._C", reason="pure-Python install")
    text = info.report()
    for name, value in native.build_info().items():
        if isinstance(value, str):
            assert value_of("native build", name, text) == value
    assert value_of("CPU", "in use", text) == native.cpu_isa()
    assert value_of("CPU", "instruction sets", text).split(" (")[0].split() == native.cpu_isas()


def test_report_follows_the_instruction_set():
    native = pytest.importorskip("fastrnn._C", reason="pure-Python install")
    before = native.cpu_isa()
    try:
        for isa in native.cpu_isas():
            native.set_cpu_isa(isa)
            assert value_of("CPU", "in use", info.report()) == isa
    finally:
        native.set_cpu_isa(before)


def test_report_without_the_native_part_says_why(monkeypatch):
    reason = "No module named 'fastrnn._C'"
    monkeypatch.setattr(_ops, "native_error", reason)
    text = info.report()
    assert value_of("native build", "not loaded", text) == reason
    assert "instruction sets" not in text


def test_command_line():
    command = [sys.executable, "-m", "fastrnn.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert value_of("versions", "fastrnn", done.stdout) == fastrnn.__version__
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("FASTRNN_BACKEND", "unknown backend 'mmx', expected one of auto"),
        pytest.param(
            "FASTRNN_CPU_ISA", "'mmx' is not available here. Available: base", marks=needs_native
        ),
    ],
)
def test_command_line_reports_what_stops_other_programs(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "mmx")
    command = [sys.executable, "-m", "fastrnn.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert message in value_of("environment", variable, done.stdout)
    command = [sys.executable, "-c", "import fastrnn"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"setup.py": ""}, "imported from the source tree at {}, which is not built: run `make"),
        ({}, "installed without its native extension (pure-Python install)"),
        (
            {"fastrnn/_build.py": "PURE_PYTHON = 'no C++ compiler was found'"},
            "(pure-Python install: no C++ compiler was found)",
        ),
    ],
    ids=["source tree", "no reason", "reason"],
)
def test_report_says_why_there_is_no_native_part(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    package = Path(fastrnn.__file__).parent
    shutil.copytree(package, tmp_path / "fastrnn", ignore=shutil.ignore_patterns("*.so", "_build*"))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, text, errors = python("import fastrnn.info as i; print(i.report())", tmp_path)
    assert (code, errors) == (0, "")
    assert value_of("versions", "imported from", text) == str(tmp_path / "fastrnn")
    assert message.format(tmp_path) in value_of("native build", "not loaded", text)
    assert ("FASTRNN_BUILD=1 pip install" in text) == ("fastrnn/_build.py" in files)
