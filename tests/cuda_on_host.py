"""Builds the operators on kernels of csrc/cuda that run on the host, and loads them: as
torch.ops.fastrnn_cuda_on_host."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastrnn
from fastrnn import _ops, stream

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "csrc/ops.cpp", "csrc/cuda/device.cpp", "csrc/cuda/program.cpp",
    "csrc/cuda/scan_forward.cpp", "csrc/cuda/scan_backward.cpp",
    "tests/cpp/cuda_on_host.cpp", "tests/cpp/cuda_blocks_on_host.cpp",
    "tests/cpp/cuda_grid_on_host.cpp",
]  # fmt: skip


def why_not() -> str | None:
    """Why it cannot be built here."""
    if _ops.native_error is not None:
        return _ops.native_error
    return None if (ROOT / "csrc").is_dir() else "there are no C++ sources beside the tests"


def _flags() -> list[str]:
    """Those of the extension, but for the optimisation."""
    info = importlib.import_module("fastrnn._C").build_info()
    sanitizers = [flag for flag in shlex.split(info["flags"]) if flag.startswith("-fsanitize")]
    include = Path(torch.__file__).parent / "include"
    return [
        "g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
        "-Wextra", *sanitizers, f"-I{ROOT / 'csrc'}", "-isystem", str(include),
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DFASTRNN_LIBRARY=fastrnn_cuda_on_host",
        # So that a pass has several chunks, and chunks several programs.
        "-DFASTRNN_CHUNK_BYTES=2000", "-DFASTRNN_PROGRAM_STEPS=3",
        "-DFASTRNN_MOST_SPINS=100000",
    ]  # fmt: skip


@functools.cache
def build() -> Path:
    """The library, compiled where a source has changed."""
    flags = _flags()
    headers = sorted(
        path
        for folder in ("csrc", "tests/cpp")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".inl")
    )
    text = repr(flags).encode() + b"".join(path.read_bytes() for path in headers)
    folder = ROOT / "build" / "cuda_on_host"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        digest = hashlib.sha256(text + (ROOT / source).read_bytes()).hexdigest()[:16]
        target = folder / f"{Path(source).stem}-{digest}.o"
        if not target.exists():
            unfinished = target.with_suffix(".part")
            subprocess.run([*flags, "-c", str(ROOT / source), "-o", str(unfinished)], check=True)
            unfinished.rename(target)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, reversed(SOURCES)))
    digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = folder / f"fastrnn_cuda_on_host-{digest}.so"
    if not library.exists():
        unfinished = library.with_suffix(".part")
        torch_lib = Path(torch.__file__).parent / "lib"
        link = [*flags, "-shared", *objects, f"-L{torch_lib}", "-ltorch_cpu", "-o", str(unfinished)]
        subprocess.run(link, check=True)
        unfinished.rename(library)
    return library


@functools.cache
def load() -> Any:
    """The operators."""
    torch.ops.load_library(str(build()))
    return torch.ops.fastrnn_cuda_on_host


class Programs(NamedTuple):
    """What csrc/cuda has done in this process: programs recorded, programs run, memories of
    programs that are kept."""

    recorded: int
    run: int
    kept: int
    blocks: int  # that csrc/cuda/block_kernels.h has run
    grids: int  # that csrc/cuda/grid_kernels.h has run


def programs() -> Programs:
    load()
    counts = (ctypes.c_int64 * 5)()
    ctypes.CDLL(str(build())).fastrnn_programs(counts)
    return Programs(*counts)


def allow_programs(allowed: bool) -> None:
    """Whether steps can be recorded: as on a GPU whose stream somebody else records."""
    ctypes.CDLL(str(build())).fastrnn_allow_programs(int(allowed))


def allow_tf32(allowed: bool) -> None:
    """Whether torch's products of float32 may be those of TF32, as its flags say on a GPU."""
    ctypes.CDLL(str(build())).fastrnn_allow_tf32(int(allowed))


def schedule(seed: int) -> None:
    """How the blocks of the next grids take turns."""
    ctypes.CDLL(str(build())).fastrnn_schedule(ctypes.c_int64(seed))


def report(word: int) -> None:
    """As a kernel that gives up does: step + 1, times two, and 1 of a backward pass."""
    ctypes.CDLL(str(build())).fastrnn_report(ctypes.c_int64(word))


def release_programs() -> None:
    ctypes.CDLL(str(build())).fastrnn_release_programs()


@contextlib.contextmanager
def on_host_kernels() -> Iterator[None]:
    """Layers run on them inside the block."""
    operators = load()
    before = _ops.layer, _ops.layer_backward, stream.run
    _ops.layer, _ops.layer_backward = operators.layer.default, operators.layer_backward.default
    stream.run = lambda *_: None  # it is for the CPU
    try:
        with fastrnn.use_backend("native"):
            yield
    finally:
        _ops.layer, _ops.layer_backward, stream.run = before
