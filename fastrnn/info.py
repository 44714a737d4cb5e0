"""`python -m fastrnn.info`: what is installed here, how it was built, and what will run.

Works in every installation, also one without the native part, and needs no compiler.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

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


def _versions() -> list[tuple[str, str]]:
    cuda = torch.version.cuda
    return [
        ("fastrnn", fastrnn.__version__),
        ("torch", torch.__version__ + (f" (CUDA {cuda})" if cuda else "")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
    ]


def _native_build() -> list[tuple[str, str]]:
    if _ops.native_error is not None:
        return [("not loaded", _ops.native_error)]
    from fastrnn import _C

    return [(str(name), _joined(value)) for name, value in _C.build_info().items()]


def _cpu() -> list[tuple[str, str]]:
    rows = [("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")]
    if _ops.native_error is None:
        from fastrnn import _C

        rows += [
            ("instruction sets", f"{_joined(_C.cpu_isas())} (built, and supported by this CPU)"),
            ("in use", _C.cpu_isa()),
        ]
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = [("selected", fastrnn.get_backend())]
    for name, reason in _ops.backends().items():
        rows.append((name, "available" if reason is None else f"not available: {reason}"))
    return rows


def _environment() -> list[tuple[str, str]]:
    names = ("FASTRNN_BACKEND", "FASTRNN_CPU_ISA")
    return [(name, os.environ.get(name, "not set")) for name in names]


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
