"""Choosing the backend and the CPU instruction set: functions, context manager, environment."""

from __future__ import annotations

import contextvars
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, build, states
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _backend, _ops

needs_triton = pytest.mark.skipif(
    _backend.triton_error() is not None, reason=str(_backend.triton_error())
)
needs_native = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))


@pytest.fixture(autouse=True)
def _keep_backend() -> Iterator[None]:
    before = fastrnn.get_backend()
    yield
    fastrnn.set_backend(before)


class Operators(TorchDispatchMode):
    """Records the operators of fastrnn that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastrnn":
            self.seen.append(func._schema.name.removeprefix("fastrnn::"))
        return func(*args, **(kwargs or {}))


def operators(name: str = "LSTM") -> list[str]:
    """The operators that one forward and backward of a layer run."""
    layer = build(fastrnn, name, 3, 4)
    with Operators() as recorded:
        states(layer(torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)))[
            0
        ].sum().backward()
    return recorded.seen


def python(code: str, path: Path | None = None, **environment: str) -> tuple[int, str, str]:
    """Run ``code`` in a new interpreter that has none of this one's settings.

    With ``path``, fastrnn is the one in that folder. Returns exit status, output and errors.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTRNN", "TRITON"))}
    if path is not None:
        code = WITHOUT_EDITABLE_INSTALL + code
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), kept.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=path or Path(fastrnn.__file__).parent.parent,
    )
    return result.returncode, result.stdout.strip(), result.stderr.strip()


# An editable install finds the extension wherever the package itself was found.
WITHOUT_EDITABLE_INSTALL = """
import sys
sys.meta_path[:] = [
    f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
]
"""
RUN = """
import torch, fastrnn
torch.manual_seed(0)
theirs, ours = torch.nn.GRU(3, 4), fastrnn.GRU(3, 4)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(5, 2, 3)
torch.testing.assert_close(ours(x), theirs(x))
print(fastrnn.get_backend())
"""


# In this process


def test_every_backend_is_listed_with_its_reason() -> None:
    found = _backend.backends()
    assert set(found) == {"native", "triton", "reference"}
    assert found["reference"] is None
    assert found["native"] == _ops.native_error
    assert found["triton"] == _backend.triton_error()


@needs_native
@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_native_runs(name: str, backend: str) -> None:
    fastrnn.set_backend(backend)
    assert fastrnn.get_backend() == backend
    assert operators(name) == ["layer", "layer_backward"]


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_reference_runs(name: str) -> None:
    fastrnn.set_backend("reference")
    assert operators(name) == []


@needs_native
def test_backward_runs_where_its_forward_ran() -> None:
    layer, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fastrnn.use_backend("reference"):
        from_reference = layer(x)[0].sum()
    from_native = layer(x)[0].sum()
    with Operators() as recorded:
        from_reference.backward()
        assert recorded.seen == []
        with fastrnn.use_backend("reference"):
            from_native.backward()
        assert recorded.seen == ["layer_backward"]


@pytest.mark.parametrize("name", ["", "cuda", "Native", "reference "])
def test_unknown_name(name: str) -> None:
    message = f"unknown backend {name!r}, expected one of auto, native, triton, reference"
    with pytest.raises(ValueError, match=message):
        fastrnn.set_backend(name)
    with pytest.raises(ValueError, match=message), fastrnn.use_backend(name):
        pass
    assert fastrnn.get_backend() == "auto"


@pytest.mark.parametrize("name", [None, 1, ["native"]])
def test_name_of_wrong_type(name: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="backend"):
        fastrnn.set_backend(name)
    assert fastrnn.get_backend() == "auto"


def test_context_manager_nests_and_survives_errors() -> None:
    with fastrnn.use_backend("reference"):
        assert fastrnn.get_backend() == "reference"
        with fastrnn.use_backend("auto"):
            assert fastrnn.get_backend() == "auto"
        assert fastrnn.get_backend() == "reference"
        with pytest.raises(KeyError), fastrnn.use_backend("auto"):
            raise KeyError
        assert fastrnn.get_backend() == "reference"
        assert operators() == []
    assert fastrnn.get_backend() == "auto"


@needs_native
def test_context_manager_is_of_its_thread() -> None:
    """Two threads inside different blocks at the same time, many times over."""
    barrier, wrong = threading.Barrier(2, timeout=60), []

    def work(backend: str, expected: list[str]) -> None:
        for _ in range(20):
            with fastrnn.use_backend(backend):
                barrier.wait()
                if fastrnn.get_backend() != backend or operators() != expected:
                    wrong.append(backend)
                barrier.wait()
            if fastrnn.get_backend() != "auto":
                wrong.append("after " + backend)

    with fastrnn.use_backend("reference"):  # not seen by the threads
        threads = [
            threading.Thread(target=work, args=("native", ["layer", "layer_backward"])),
            threading.Thread(target=work, args=("reference", [])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_set_backend_reaches_every_thread_and_a_copied_context() -> None:
    fastrnn.set_backend("reference")
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(fastrnn.get_backend()))
    thread.start()
    thread.join()
    with fastrnn.use_backend("auto"):
        inherited = contextvars.copy_context()
    assert [*seen, inherited.run(fastrnn.get_backend)] == ["reference", "auto"]


# Environment


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_environment_sets_the_backend(backend: str) -> None:
    assert python(RUN, FASTRNN_BACKEND=backend)[:2] == (0, backend)


def test_environment_with_unknown_backend() -> None:
    code, _, errors = python("import fastrnn", FASTRNN_BACKEND="fast")
    assert code == 1
    assert "unknown backend 'fast', expected one of auto, native, triton, reference" in errors


@needs_native
def test_environment_sets_the_instruction_set() -> None:
    from fastrnn import _C

    show = RUN + "from fastrnn import _C\nprint(_C.cpu_isa())"
    *others, best = _C.cpu_isas()
    assert python(show, FASTRNN_BACKEND="", FASTRNN_CPU_ISA="")[:2] == (0, f"auto\n{best}")
    for isa in others:
        assert python(show, FASTRNN_CPU_ISA=isa)[:2] == (0, f"auto\n{isa}")


@needs_native
def test_environment_with_unknown_instruction_set() -> None:
    code, out, errors = python(RUN, FASTRNN_CPU_ISA="mmx")
    assert (code, out) == (1, "")
    assert "ValueError: CPU instruction set 'mmx' is not available here. Available: base" in errors


@needs_native
def test_instruction_set_can_be_changed() -> None:
    from fastrnn import _C

    before, layer, x = _C.cpu_isa(), build(fastrnn, "LSTM", 3, 33), torch.randn(5, 2, 3)
    results = []
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            assert _C.cpu_isa() == isa
            results.append(layer(x)[0])
        with pytest.raises(ValueError, match=r"'mmx' is not available here\. Available: base"):
            _C.set_cpu_isa("mmx")
        assert _C.cpu_isa() == _C.cpu_isas()[-1]
    finally:
        _C.set_cpu_isa(before)
    assert all(torch.allclose(r, results[0], atol=1e-6) for r in results)


# Without a working extension


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fastrnn's Python files alone, as a pure-Python install leaves them."""
    folder = tmp_path_factory.mktemp("pure")
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(Path(fastrnn.__file__).parent, folder / "fastrnn", ignore=ignore)
    return folder


@pytest.fixture(params=["absent", "damaged"])
def broken(request: pytest.FixtureRequest, pure: Path, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a fastrnn that has no extension, or one that cannot be loaded; the reason."""
    if request.param == "absent":
        return pure, "without its native extension"
    shutil.copytree(pure / "fastrnn", tmp_path / "fastrnn")
    suffix = EXTENSION_SUFFIXES[0]
    (tmp_path / "fastrnn" / f"_C{suffix}").write_bytes(b"not a library")
    return tmp_path, "does not load"


def test_auto_falls_back_and_native_is_refused(broken: tuple[Path, str]) -> None:
    folder, reason = broken
    again = "ours(x); fastrnn.LSTM(3, 4)(x)\n"  # the warning is not repeated
    code, out, errors = python(RUN + again + "fastrnn.set_backend('native')", folder)
    assert (code, out) == (1, "auto"), errors
    warning, error = errors.split("Traceback", 1)
    assert warning.count("fastrnn runs its slow reference") == 1
    assert reason in warning
    assert "RuntimeError: backend 'native' is not available" in error
    assert reason in error


def test_environment_asks_for_what_is_not_there(pure: Path) -> None:
    code, _, errors = python("import fastrnn", pure, FASTRNN_BACKEND="native")
    assert code == 1
    assert "backend 'native' is not available: fastrnn was installed without" in errors
    assert python(RUN, pure, FASTRNN_BACKEND="reference") == (0, "reference", "")


def test_triton_is_imported_where_it_is_wanted_only() -> None:
    seen = RUN + "import sys\nprint('triton' in sys.modules, 'fastrnn.triton' in sys.modules)"
    assert python(seen)[1].split()[-1] == "False"


@needs_triton
def test_pure_install_runs_on_triton(pure: Path) -> None:
    """In Triton's interpreter, as there is no GPU: what a pure-Python install runs on one."""
    seen = RUN + "from fastrnn import _backend\nprint(_backend.resolve([x]))"
    code, out, errors = python(seen, pure, FASTRNN_BACKEND="triton", TRITON_INTERPRET="1")
    assert (code, out) == (0, "triton\ntriton"), errors
    assert "Warning: fastrnn" not in errors


@needs_triton
def test_triton_is_not_for_the_cpu(pure: Path) -> None:
    """Chosen by itself on a GPU only, the interpreter not at all; refused where asked for."""
    code, out, errors = python(RUN, pure, TRITON_INTERPRET="1")
    assert (code, out) == (0, "auto"), errors
    assert errors.count("fastrnn runs its slow reference") == 1
    code, _, errors = python(RUN, pure, FASTRNN_BACKEND="triton")
    assert code == 1
    assert "backend 'triton' cannot run this: the Triton kernels are for GPUs" in errors


def test_without_triton(pure: Path) -> None:
    hide = "import sys; sys.modules['triton'] = None\n"
    code, _, errors = python(hide + "import fastrnn\nfastrnn.set_backend('triton')", pure)
    assert code == 1
    assert "backend 'triton' is not available: Triton is not installed" in errors
    assert python(hide + RUN, pure, FASTRNN_BACKEND="reference") == (0, "reference", "")


def test_no_warning_when_native_runs() -> None:
    if _ops.native_error is not None:
        pytest.skip(_ops.native_error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators()


@needs_native
def test_native_refuses_what_it_cannot_run() -> None:
    layer = fastrnn.GRU(3, 4)
    weights = tuple(p.detach() for p in layer.parameters())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fastrnn.functional.gru(x, weights)[0].sum()

    x = torch.randn(5, 2, 3)
    ones = torch.ones_like(x)
    with (
        fastrnn.use_backend("native"),
        pytest.raises(RuntimeError, match=r"backend 'native' cannot run this: .*forward-mode"),
    ):
        torch.func.jvp(loss, (x,), (ones,))
    with fastrnn.use_backend("reference"):
        slope = torch.func.jvp(loss, (x,), (ones,))[1]
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf)[0]
    assert torch.allclose(slope, gradient.sum(), atol=1e-5)
