"""`python -m fastrnn.info`: what is installed here, how it was built, and what will run.

Works in every installation, also one without the native part, and needs no compiler. A setting that
cannot be met is reported where other programs stop.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import fastrnn
from fastrnn import _ops


def report() -> str:
    """The text that `python -m fastrnn.info` prints.

    Example:
        >>> print(fastrnn.info.report())  # doctest: +SKIP
    """
    sections = [
        ("versions", _versions()),
        ("native build", _native_build()),
        ("CPU", _cpu()),
        ("backends", _backends()),
        ("environment", _environment()),
    ]
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections)


def backend_in_use(device: str = "cpu") -> str:
    """What runs a layer on `device` here, for example `auto (native, avx2)`.

    Raises:
        RuntimeError: the backend asked for cannot run there.
    """
    asked = fastrnn.get_backend()
    used = _ops.resolve([torch.empty(0, device=device)])
    words = [used] if used != asked else []
    if used == "native" and torch.device(device).type == "cpu":
        words.append(importlib.import_module("fastrnn._C").cpu_isa())
    return f"{asked} ({', '.join(words)})" if words else asked


def _versions() -> list[tuple[str, str]]:
    cuda = torch.version.cuda
    return [
        ("fastrnn", fastrnn.__version__),
        ("imported from", str(Path(fastrnn.__file__).resolve().parent)),
        ("torch", torch.__version__ + (f" (CUDA {cuda})" if cuda else "")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
    ]


def _native_build() -> list[tuple[str, str]]:
    if _ops.native_error is None:
        build = importlib.import_module("fastrnn._C").build_info()
        return [(str(name), _joined(value)) for name, value in build.items()]
    rows = [("not loaded", _ops.native_error)]
    if importlib.util.find_spec("fastrnn._build"):  # written where there was a reason to
        rows.append(("remedy", "mend that, then run `FASTRNN_BUILD=1 pip install .` once more"))
    return rows


def _cpu() -> list[tuple[str, str]]:
    rows = [("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")]
    if _ops.native_error is None:
        native = importlib.import_module("fastrnn._C")
        isas = f"{_joined(native.cpu_isas())} (built, and supported by this CPU)"
        rows.append(("instruction sets", isas))
        try:
            rows.append(("in use", native.cpu_isa()))
        except ValueError as error:
            rows.append(("in use", f"none: {error}"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = [("selected", fastrnn.get_backend())]
    for name, reason in _ops.backends().items():
        rows.append((name, "available" if reason is None else f"not available: {reason}"))
    return rows


def _environment() -> list[tuple[str, str]]:
    mistakes, rows = _ops.environment_errors, []
    for name in ("FASTRNN_BACKEND", "FASTRNN_CPU_ISA"):
        value = os.environ.get(name, "not set")
        rows.append((name, f"{value}; {mistakes[name]}" if name in mistakes else value))
    return rows


def _joined(value: object) -> str:
    """Lists as words, everything else as it prints."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return " ".join(str(item) for item in value)
    return str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    print(report())
