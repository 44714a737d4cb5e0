"""The kernels of csrc/cuda as nvcc compiles them, on a machine that may have no GPU: what ptxas
says of each, and what it must not say."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn import _ops

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = ("sm_80", "sm_90a")
MOST_REGISTERS = 80  # of a thread: three blocks of 256 on a multiprocessor
# Of a step of a program, which loads all its arguments before it stores anything: two blocks.
MOST_REGISTERS_OF_PROGRAM = 65536 // (2 * 256)

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="there are no sources here"),
]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def report(source: Path, architecture: str, target: Path) -> dict[str, dict[str, int]]:
    """What ptxas says of every kernel of a file."""
    command = [
        str(NVCC), "-c", "-std=c++17", "-O3", "-fmad=false", f"-arch={architecture}",
        "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{source.parent.parent}", str(source),
        "-o", str(target),
    ]  # fmt: skip
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = {}
    for found in ENTRY.finditer(run.stdout + run.stderr):
        shared = re.search(r"(\d+) bytes smem", found["more"])
        kernels[found["name"]] = {
            "registers": int(found["registers"]),
            "spilled": int(found["spilled"]),
            "stack": int(found["stack"]),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def reports(name: str, folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Of a file of kernels, for each architecture; also written to build/ptxas-*.json."""
    source = ROOT / f"csrc/cuda/{name}.cu"
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda arch: report(source, arch, folder / f"{arch}.o"), ARCHITECTURES)
        )
    target = ROOT / "build"
    target.mkdir(exist_ok=True)
    for architecture, kernels in zip(ARCHITECTURES, found, strict=True):
        text = json.dumps(kernels, indent=1)
        (target / f"ptxas-{name}-{architecture}.json").write_text(text)
    return dict(zip(ARCHITECTURES, found, strict=True))


def wrong(kernels: dict[str, dict[str, int]], most_registers: int = MOST_REGISTERS) -> list[str]:
    """The kernels that use memory where registers were meant, or too many registers."""
    return [
        f"{name}: {facts}"
        for name, facts in kernels.items()
        if facts["spilled"] + facts["stack"] + facts["shared"] > 0
        or facts["registers"]
        > (MOST_REGISTERS_OF_PROGRAM if "OfProgram" in name else most_registers)
    ]


def test_kernels_of_a_step(tmp_path: Path) -> None:
    for kernels in reports("step_kernels", tmp_path).values():
        # Forward and backward of 4 cells, 4 dtypes, 2 widths, by itself and of a program; and
        # what goes with them.
        for name in ("Forward", "Backward"):
            cells = [kernel for kernel in kernels if re.search(rf"\d{name}I", kernel)]
            assert len(cells) == 64
            assert sum("OfProgram" in kernel for kernel in cells) == 32
        assert not wrong(kernels)


def test_kernels_of_a_block(tmp_path: Path) -> None:
    """Their weights stay in registers, of which there are 255; shared memory they ask for at the
    launch."""
    for kernels in reports("block_kernels", tmp_path).values():
        # 4 cells, 2 dtypes, 3 sizes.
        for name in ("BlockForward", "BlockBackward"):
            assert sum(f"{name}I" in kernel for kernel in kernels) == 24
        assert not wrong(kernels, 255)


def test_kernels_of_a_grid(tmp_path: Path) -> None:
    """A block has a multiprocessor for itself."""
    for kernels in reports("grid_kernels", tmp_path).values():
        # 4 cells, 4 kinds of numbers (float as it is, or TF32), 2 exchanges.
        for name in ("GridForward", "GridBackward"):
            assert sum(f"{name}I" in kernel for kernel in kernels) == 32
        assert not wrong(kernels, 255)


SPILLING = """
#include "cuda/gpu_launch.h"
namespace fastrnn::cuda {
struct Spills {
  float* data;
  FASTRNN_FN void operator()(Thread thread) const {
    float part[64];
    for (int i = 0; i < 64; ++i) part[i] = data[thread.item + i * 64];
    for (int i = 0; i < 64; ++i) data[thread.item + i] = part[static_cast<int>(part[i]) % 64];
  }
};
void spills(float* data) { launch(Spills{data}, 64, 1, nullptr); }
}  // namespace fastrnn::cuda
"""


def test_a_kernel_in_local_memory_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "cuda" / "spills.cu"
    source.parent.mkdir()
    source.write_text(SPILLING.replace('"cuda/gpu_launch.h"', f'"{ROOT}/csrc/cuda/gpu_launch.h"'))
    kernels = report(source, "sm_80", tmp_path / "spills.o")
    assert len(wrong(kernels)) == len(kernels) == 1


@pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))
def test_the_extension_has_the_operators_of_a_gpu() -> None:
    """Where it was built with CUDA, on whatever torch it was loaded."""
    info: dict[str, Any] = importlib.import_module("fastrnn._C").build_info()
    for name in ("layer", "layer_backward"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrnn::{name}", "CUDA")
        assert has == bool(info["cuda"])
