"""The time loops of the persistent kernels as machine code: the products that are meant, one
barrier, nothing in local memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cuda_build import NVCC, ROOT


def disassembler() -> str | None:
    """nvdisasm of a CUDA toolkit, of the package nvidia-cuda-nvdisasm, or of Triton."""
    found = shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm")
    for package, place in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found = found or shutil.which(f"{folder}/{place}/nvdisasm")
    return found


NVDISASM = disassembler()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(
        NVDISASM is None, reason="nvdisasm is not installed: pip install nvidia-cuda-nvdisasm"
    ),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="there are no sources here"),
]

GATES = {"Rnn": 1, "Lstm": 4, "Gru": 3}


def time_loop(code: str) -> Counter[str]:
    """How often each instruction stands in the longest loop with products and a barrier, which is
    that over the steps; "poll" is what reads a mailbox."""
    loops, labels, instructions = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
            if target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1]):
                begin = labels.get(target[1], len(instructions))
                body = [re.sub(r"^@!?\w+\s+", "", text) for text in instructions[begin:]]
                count = Counter(re.split(r"[. ]", text)[0] for text in body)
                count["poll"] = sum(text.startswith("LDG.E.128.STRONG.GPU") for text in body)
                loops.append(count)
    wanted = [loop for loop in loops if loop["HMMA"] + loop["FFMA"] and loop["BAR"]]
    return max(wanted, key=lambda loop: loop.total())


def time_loops(
    name: str, kernel: str, folder: Path
) -> Iterator[tuple[re.Match[str], Counter[str]]]:
    """Of the kernels of a file whose names match."""
    cubin = folder / "kernels.cubin"
    source = str(ROOT / f"csrc/cuda/{name}.cu")
    options = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-cubin"]
    subprocess.run([str(NVCC), *options, source, "-o", str(cubin)], check=True)
    run = subprocess.run(
        [str(NVDISASM), "-c", str(cubin)], check=True, capture_output=True, text=True
    )
    for code in run.stdout.split("\n.text.")[1:]:
        if found := re.search(kernel, code.split("\n", 1)[0]):
            yield found, time_loop(code)


def test_blocks(tmp_path: Path) -> None:
    seen = 0
    pattern = r"Block(?:Forward|Backward)I.*?(?P<cell>Rnn|Lstm|Gru)Cell.*?ELi(?P<tiles>\d)E"
    for kernel, loop in time_loops("block_kernels", pattern, tmp_path):
        seen += 1
        assert loop["HMMA"] == GATES[kernel["cell"]] * int(kernel["tiles"]), kernel[0]
        assert loop["BAR"] == 1, kernel[0]
        assert loop["LDL"] + loop["STL"] == 0, kernel[0]
    assert seen == 48


def test_grids(tmp_path: Path) -> None:
    """Products with weights in registers, then those of a batch with weights in shared memory; the
    reads of all operands, and again where they were not there."""
    seen = exact_seen = 0
    pattern = (
        r"Grid(?P<way>For|Back)wardI.*?(?P<cell>Rnn|Lstm|Gru)Cell.*?(?P<exact>5Exact)?E?NS0_12"
        r"(?P<exchange>Word|Flag)Ex"
    )
    for kernel, loop in time_loops("grid_kernels", pattern, tmp_path):
        seen += 1
        gates = GATES[kernel["cell"]]
        outputs = gates if kernel["way"] == "For" else 1
        resident = 2 if kernel["exact"] else 4  # grid_blocks of csrc/cuda/sizes.h
        resident *= 1 if kernel["way"] == "For" else gates
        batch = 2 if kernel["exact"] or resident > 12 else 4
        products = outputs * (resident + batch)
        exact_seen += bool(kernel["exact"])
        if kernel["exact"]:  # 16 rows, 8 columns and k of 16, by 32 threads; and the cell
            assert 0 <= loop["FFMA"] - 64 * products < 100, kernel[0]
        assert loop["HMMA"] == (0 if kernel["exact"] else 2 * products), kernel[0]
        assert loop["BAR"] == (1 if kernel["exchange"] == "Word" else 2), kernel[0]
        assert loop["LDL"] + loop["STL"] == 0, kernel[0]
        reads = resident + 2 * batch  # the batch behind those of the registers is read twice
        again = resident + batch if kernel["exchange"] == "Word" else 0
        assert reads - batch <= loop["poll"] - again <= reads, kernel[0]
    assert (seen, exact_seen) == (64, 16)
