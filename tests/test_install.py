"""Installing fastrnn in throw-away environments: every way a user may install it, and every way
in which building the native part may not be possible.

The environments see the torch of the environment that runs the tests instead of installing
another one. The native part is compiled without optimisation: it is built to be loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).resolve().parent
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "results"
)
SETTINGS = ("FASTRNN", "CXX", "LDFLAGS", "MAX_JOBS", "PYTHON", "LD_PRELOAD")  # not inherited

pytestmark = [
    pytest.mark.install,
    pytest.mark.skipif(sys.platform != "linux", reason="the native part is built on Linux only"),
]

# Run outside the source tree. Prints the backend that "auto" means here and the warnings seen.
CHECK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastrnn
    from fastrnn import _ops
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    ours = fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 2, 3)
    for _ in range(2):
        for got, expected in zip(ours(x)[1], theirs(x)[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
print("native" if _ops.native_error is None else "pure", fastrnn.__file__)
for warning in caught:
    if "fastrnn" in str(warning.message):
        print("warning:", warning.message)
"""


def environment(**settings: str) -> dict[str, str]:
    """The environment variables of a build: this process's, less what would change the build."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {**kept, "CXXFLAGS": "-O0", "MAX_JOBS": "2", "FASTRNN_CUDA": "0", **settings}


def run(*command: object, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; stdout and stderr are collected together in `.stdout`."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def succeed(*command: object, cwd: Path, **settings: str) -> str:
    done = run(*command, cwd=cwd, **settings)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(source: Path, out: Path, python: object = sys.executable, **settings: str):
    """Builds a wheel, verbosely; in the environment of `python` itself, without isolation."""
    flags = ["--no-deps", "--no-build-isolation", "--verbose"]
    command = [python, "-m", "pip", "wheel", *flags, "--wheel-dir", out, source]
    return run(*command, cwd=out.parent, **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree without anything that was built in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "fastrnn", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def visible_packages(tmp_path_factory) -> Path:
    """A folder with links to the packages installed here, fastrnn excepted."""
    folder = tmp_path_factory.mktemp("visible")
    for entry in TORCH.parent.iterdir():
        if "fastrnn" not in entry.name and entry.name != "__pycache__":
            (folder / entry.name).symlink_to(entry)
    return folder


class Venv:
    """A fresh virtual environment, with pip from the `visible` packages or with Python's own."""

    def __init__(self, folder: Path, visible: Path | None = None):
        pip = ["--without-pip"] if visible else []
        succeed(sys.executable, "-m", "venv", *pip, folder, cwd=folder.parent)
        self.folder = folder
        self.visible = visible
        self.python = folder / "bin" / "python"
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.purelib = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
        if visible:
            (self.purelib / "visible.pth").write_text(f"{visible}\n")

    def install(self, *arguments: object, **settings: str) -> str:
        command = [self.python, "-m", "pip", "install", "--verbose", *arguments]
        return succeed(*command, cwd=self.folder, **settings)

    def check(self) -> list[str]:
        """The lines that CHECK prints: `native FILE` or `pure FILE`, then one per warning."""
        return succeed(self.python, "-c", CHECK, cwd=self.folder).splitlines()


@pytest.fixture
def venv(tmp_path, visible_packages) -> Venv:
    return Venv(tmp_path / "venv", visible_packages)


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory) -> Venv:
    """An environment without torch, as is a build environment that hides the installed packages."""
    return Venv(tmp_path_factory.mktemp("bare") / "venv")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="isolated"),
        pytest.param(["--editable"], id="isolated-editable"),
        pytest.param(["--no-build-isolation"], id="not-isolated"),
        pytest.param(["--no-build-isolation", "--editable"], id="not-isolated-editable"),
    ],
)
def test_native_install(arguments, source, venv):
    output = venv.install(*arguments, source)
    assert "Collecting torch" not in output
    assert not (venv.purelib / "torch").exists()
    (line,) = venv.check()  # and no warning
    kind, file = line.split(" ", 1)
    assert kind == "native"
    home = source / "fastrnn" if "--editable" in arguments else venv.purelib / "fastrnn"
    assert Path(file).parent == home
    (library,) = home.glob("_C*.so")
    content = library.read_bytes()
    assert b"libtorch_cpu.so\0" in content
    # Nothing of this machine is baked in.
    for place in (source, venv.visible, TORCH.parent, venv.folder):
        assert str(place).encode() not in content


def test_source_distribution_is_complete(source, venv, tmp_path):
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    succeed(venv.python, "-c", script, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("fastrnn-*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    wanted = {file.relative_to(source) for file in source.glob("csrc/**/*.*")}
    wanted |= {file.relative_to(source) for file in source.glob("fastrnn/**/*.py")}
    assert {file for file in wanted if file.suffix not in (".so", ".pyc")} <= packed
    done = build_wheel(archive, tmp_path / "wheels", venv.python, FASTRNN_BUILD="1")
    assert done.returncode == 0, done.stdout
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        top = {name.split("/")[0] for name in opened.namelist()}
        libraries = [name for name in opened.namelist() if name.endswith(".so")]
    assert all(name == "fastrnn" or name.endswith(".dist-info") for name in top)
    assert len(libraries) == 1
    assert libraries[0].startswith("fastrnn/_C.")


def test_a_changed_header_is_compiled_again(source, venv, tmp_path):
    succeed(venv.python, "setup.py", "build_ext", "--build-lib", tmp_path, cwd=source)
    plan = max(source.glob("build/native-*/build.ninja"), key=lambda file: file.stat().st_mtime)
    ninja = [venv.python, "-m", "ninja", "-n", "-f", plan.relative_to(source)]
    assert "no work to do" in succeed(*ninja, cwd=source)
    (source / "csrc" / "scan.h").touch()
    assert "compile csrc/ops.cpp" in succeed(*ninja, cwd=source)


def test_pure_python_install(source, venv):
    venv.install("--no-build-isolation", source, FASTRNN_BUILD="0")
    assert not list(venv.purelib.glob("fastrnn/_C*.so"))
    (metadata,) = venv.purelib.glob("fastrnn-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in metadata.read_text()
    line, *warnings = venv.check()
    assert line.startswith("pure ")
    assert len(warnings) == 1, warnings  # however often a layer runs
    info = succeed(venv.python, "-m", "fastrnn.info", cwd=venv.folder)
    assert "not loaded" in info
    assert "FASTRNN_BUILD=0" in info
    assert str(venv.purelib / "fastrnn") in info


def test_pure_python_build_removes_the_library_of_an_earlier_one(source, tmp_path):
    copied = shutil.copytree(source, tmp_path / "copied", ignore=NOT_SOURCE)
    stale = copied / "fastrnn" / "_C.cpython-310-x86_64-linux-gnu.so"
    for settings in ({"FASTRNN_BUILD": "0"}, {"CXX": "/nonexistent/c++"}):
        stale.write_bytes(b"")
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        assert "building the pure-Python package" in succeed(*build, cwd=copied, **settings)
        assert not stale.exists()
    assert not (copied / "fastrnn" / "_build.py").exists()


RECORDER = """#!/bin/sh
words="$*"
while [ "$1" != -o ]; do shift; done
echo "$words" > "$2"
"""  # a compiler whose output is the words it was called with


def test_the_library_is_the_one_of_the_flags(source, tmp_path):
    """Also when they change back to earlier ones, whose library is the older."""
    copied = shutil.copytree(source, tmp_path / "copied", ignore=NOT_SOURCE)
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    for flag in ("-first", "-second", "-first"):
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        succeed(*build, cwd=copied, CXX=str(recorder), LDFLAGS=flag)
        (library,) = copied.glob("fastrnn/_C*.so")
        assert flag in library.read_text().split()
    assert len(list(copied.glob("build/native-*"))) == 2


def test_builds_with_other_flags_have_folders_of_their_own(source):
    script = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; "
        "setup = runpy.run_path('setup.py', run_name='__main__'); "
        "print(*(setup['build_name']([flag], []) for flag in ("
        "'-O0', '-O3', '-I/t/pip-build-env-abc/x', '-I/t/pip-build-env-xyz/x')))"
    )
    printed = succeed(sys.executable, "-c", script, cwd=source).splitlines()[-1]
    one, other, isolated, again = printed.split()
    assert one != other
    assert one.startswith("native-")
    assert isolated == again != other


NO_COMPILER = [
    pytest.param({"CXX": "/nonexistent/c++"}, "/nonexistent/c++ was not found", id="wrong-CXX"),
    pytest.param({"PATH": "/nonexistent"}, "no C++ compiler was found", id="nothing-in-PATH"),
]


@pytest.mark.parametrize(("settings", "reason"), NO_COMPILER)
def test_without_a_compiler_auto_builds_pure_python(settings, reason, source, tmp_path):
    done = build_wheel(source, tmp_path / "wheels", **settings)
    assert done.returncode == 0, done.stdout
    assert reason in done.stdout
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as opened:  # what fastrnn.info shows later
        assert reason in opened.read("fastrnn/_build.py").decode()


@pytest.mark.parametrize(("settings", "reason"), NO_COMPILER)
def test_without_a_compiler_a_native_build_fails(settings, reason, source, tmp_path):
    done = build_wheel(source, tmp_path / "wheels", **settings, FASTRNN_BUILD="1")
    assert done.returncode != 0
    assert reason in done.stdout
    assert "Traceback" not in done.stdout


def test_without_torch_auto_builds_pure_python(source, bare_venv, tmp_path):
    """Isolated: the build's own requirements come from the package index."""
    command = [bare_venv.python, "-m", "pip", "wheel", "--no-deps", "--verbose"]
    output = succeed(*command, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    assert "torch is not installed in this environment" in output
    assert "Collecting torch" not in output
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_without_torch_a_native_build_fails(source, bare_venv, tmp_path):
    command = [bare_venv.python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path]
    done = run(*command, source, cwd=tmp_path, FASTRNN_BUILD="1")
    assert done.returncode != 0
    assert "torch is not installed in this environment" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_compile_error_is_never_hidden(mode, source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken", ignore=NOT_SOURCE)
    for file in broken.glob("csrc/**/*.cpp"):
        file.write_text("#error this file does not compile\n")
    done = build_wheel(broken, tmp_path / "wheels", FASTRNN_BUILD=mode)
    assert done.returncode != 0
    assert "this file does not compile" in done.stdout
    assert not list(tmp_path.glob("wheels/*.whl"))


def test_an_old_setuptools_is_named(source):
    script = (
        "import runpy, setuptools; setuptools.__version__ = '65.5.0'; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", script, cwd=source)
    assert done.returncode != 0
    assert done.stdout.startswith("fastrnn: setuptools 65.5.0 is too old to build with")


def test_an_unknown_build_mode_is_refused(source, tmp_path):
    done = build_wheel(source, tmp_path / "wheels", FASTRNN_BUILD="yes")
    assert done.returncode != 0
    assert "FASTRNN_BUILD must be auto, 1 or 0, and is 'yes'" in done.stdout


NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
WRONG_ARCHITECTURE = {"FASTRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "Hopper"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTRNN_CUDA": "yes"}, "FASTRNN_CUDA must be auto, 1 or 0, and is 'yes'"),
        pytest.param(WRONG_ARCHITECTURE, "expected numbers as in 8.0;9.0", marks=NEEDS_NVCC),
    ],
)
def test_wrong_cuda_options_are_refused(
    source: Path, settings: dict[str, str], message: str
) -> None:
    done = run(sys.executable, "setup.py", "build_ext", cwd=source, **settings)
    assert done.returncode != 0
    assert message in done.stdout
