"""What the numbers were measured on: part of every row of a result file."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fastrnn
from bench.rivals import FASTRNN, RIVALS, TORCH_NN
from fastrnn import _ops

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """Describe the machine, the versions and the commit, now."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["fastrnn"] = fastrnn.__version__
    for rival in RIVALS:
        if rival.name not in (TORCH_NN, FASTRNN) and not rival.absent():
            versions[rival.name] = version(rival.name)
    return {
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute, before the first row
        "kernels": kernels(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def announce(shared: dict[str, Any], threads: Iterable[int]) -> None:
    """Print what is measured on, which rivals are absent, and a warning on a busy machine."""
    for rival in RIVALS:
        reason = rival.absent()
        if reason is not None:
            print(f"{rival.name}: absent ({reason})")
    print(f"{shared['device']}, fastrnn {shared['versions']['fastrnn']}: {shared['kernels']}")
    if shared["load"] + max(threads) > shared["cores"] + 0.5:
        print(
            f"the machine is busy (load {shared['load']:.1f} on {shared['cores']} cores): "
            "times will be wrong, with several threads by orders of magnitude",
            file=sys.stderr,
        )


def kernels() -> str:
    """Say what fastrnn runs: "native, avx512", or "reference" with the reason."""
    backend = fastrnn.get_backend()
    if backend in ("auto", "native") and _ops.native_error is None:
        build = importlib.import_module("fastrnn._C")
        return f"native, {build.cpu_isa()}"
    return f"reference ({_ops.native_error or 'chosen'})"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(*words: str) -> str | None:
    """Return what git prints on this checkout; None without git, or if it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Return the checked-out commit, with "+changes" if files differ from it; None without git."""
    revision = git("rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if git("status", "--porcelain") else "")
