"""The time loops of the persistent kernels as machine code: the products that are meant, one
barrier, nothing in local memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
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

KERNEL = re.compile(
    r"Block(?:Forward|Backward)I.*?(?P<cell>Rnn|Lstm|Gru)Cell.*?ELi(?P<tiles>\d)E"
)
GATES = {"Rnn": 1, "Lstm": 4, "Gru": 3}


def time_loop(code: str) -> Counter[str]:
    """How often each instruction stands in the shortest loop with products."""
    loops, labels, instructions = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
            if target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1]):
                begin = labels.get(target[1], len(instructions))
                body = [re.sub(r"^@!?\w+\s+", "", text) for text in instructions[begin:]]
                loops.append(Counter(re.split(r"[. ]", text)[0] for text in body))
    return min((loop for loop in loops if loop["HMMA"]), key=lambda loop: loop.total())


def test_time_loops(tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    source = str(ROOT / "csrc/cuda/block_kernels.cu")
    options = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-cubin"]
    subprocess.run([str(NVCC), *options, source, "-o", str(cubin)], check=True)
    run = subprocess.run(
        [str(NVDISASM), "-c", str(cubin)], check=True, capture_output=True, text=True
    )
    seen = 0
    for code in run.stdout.split("\n.text.")[1:]:
        kernel = KERNEL.search(code.split("\n", 1)[0])
        if kernel is None:
            continue
        seen += 1
        loop = time_loop(code)
        assert loop["HMMA"] == GATES[kernel["cell"]] * int(kernel["tiles"]), kernel[0]
        assert loop["BAR"] == 1, kernel[0]
        assert loop["LDL"] + loop["STL"] == 0, kernel[0]
    assert seen == 48
