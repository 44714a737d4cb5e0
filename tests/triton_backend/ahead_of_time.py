"""Compiles every Triton kernel that passes launch, for a GPU that does not have to be there.

    python tests/triton_backend/ahead_of_time.py ARCHITECTURE      # 80, 90 or 100

Passes of fastrnn.triton run on the CPU with launches that compile instead: what is compiled is what
would run, with its tiles. Prints a JSON object for each kernel. The compiler's results are kept in
build/triton.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastrnn.reference import CELLS  # noqa: E402
from fastrnn.triton import launch, passes, plan, scan  # noqa: E402

GPUS = {80: plan.GPUS["a100"], 90: plan.GPUS["h100"], 100: plan.GPUS["b200"]}
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64,
          "float16": torch.float16, "bfloat16": torch.bfloat16}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_for(architecture: int, kernel: Any, options: dict[str, Any], given: Any) -> Any:
    """As a launch with these arguments would: numbers that steps change are not specialised."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    tiles = {name: value for name, value in options.items() if name in kernel.arg_names}
    values = given | tiles
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", values[name]
        elif isinstance(values.get(name), torch.Tensor):
            signature[name] = "*" + TYPES[values[name].dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize and values[name] % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={name: value for name, value in options.items() if name not in tiles},
    )


def resources(compiled: Any) -> dict[str, Any]:
    """Registers of a thread, bytes of its stack (spilled registers), shared memory of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True,
            text=True,
        ).stdout  # fmt: skip
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return {
        "registers": int(registers), "spilled": int(stack) + int(local),
        "shared": compiled.metadata.shared, "mma": compiled.asm["ptx"].count("mma.sync"),
        "barriers": compiled.asm["ptx"].count("bar.sync"),
        "launch": f".entry {compiled.metadata.name}" in compiled.asm["ptx"],
    }  # fmt: skip


def shapes(architecture: int) -> Iterator[tuple[str, str, str, int, bool, bool]]:
    """Cell, dtype, kernel, H, projected, and whether with every option: or packed, without biases,
    a backward pass, gradients of outputs and resets."""
    gpu = GPUS[architecture]
    for cell, dtype, kernel in itertools.product(CELLS, DTYPES, plan.KERNELS):
        item, G = DTYPES[dtype].itemsize, CELLS[cell].gates
        if dtype == "tf32" and kernel == "step":
            continue  # the products are torch's
        sizes = [256, 128, 64, 32, 16] if kernel == "resident" else [200]
        for H in sizes:
            shape = plan.Shape(G, 3, H, 2, item, False, dtype == "tf32")
            if plan.why_not(kernel, shape, gpu) is None:
                yield cell, dtype, kernel, H, False, True
                break  # the largest one
        if dtype == "bfloat16":
            yield cell, dtype, kernel, 16, False, False
        if cell == "lstm" and kernel == "step":
            yield cell, dtype, kernel, 200, True, True


def compile_all(architecture: int) -> None:
    current: dict[str, Any] = {}
    seen = set()

    class Compiled(launch.Launch):
        def __call__(self, grid: Any, **numbers: int) -> None:
            name = self._kernel.__name__
            options = map(self._arguments.get, ("SAVE", "HAS_RESETS"))
            key = (name, *options, *current.values())
            if key in seen:
                return
            seen.add(key)
            compiled = compile_for(architecture, self._kernel, self._options, self._arguments)
            found = {"kernel": name, **current, **resources(compiled)}
            print(json.dumps(found), flush=True)

    passes.Launch = Compiled  # type: ignore[misc]
    passes.gpu_of = lambda _: GPUS[architecture]  # type: ignore[assignment]
    tf32 = False
    passes.allows_tf32 = lambda _: tf32  # type: ignore[assignment]
    for cell, dtype, kernel, H, projected, is_full in shapes(architecture):
        tf32 = dtype == "tf32"
        os.environ["FASTRNN_TRITON_KERNEL"] = kernel
        current = {"cell": cell, "dtype": dtype, "path": kernel, "H": H, "projected": projected}
        current["full"] = is_full
        low, info, P = DTYPES[dtype], CELLS[cell], H // 2 if projected else H
        rows = info.gates * H
        one = [torch.zeros(rows, 16), torch.zeros(rows, P), torch.zeros(rows), torch.zeros(rows)]
        own = one[: 4 if is_full else 2] + [torch.zeros(P, H)] * projected
        weights = [w.to(low) for w in own * 2]
        x, h0 = torch.zeros(2, 3, 16).to(low), torch.zeros(2, 3, P).to(low)
        call: tuple[Any, ...] = (weights, h0, None, None, 2, 2)
        if not is_full:
            x, call = x.flatten(0, 1), (weights, h0, None, torch.tensor([3, 3]), 2, 2)
            scan.layer(cell, x, *call, False)
        out, h_n, _, cells, saved = scan.layer(cell, x, *call, True)
        wanted = [1, 1, 0, *[1] * len(weights)]
        dy = out if is_full else None
        scan.layer_backward(cell, dy, h_n, None, x, out, cells, saved, *call, wanted)
        if kernel == "step" and is_full:
            resets = torch.zeros(2, 3, dtype=torch.uint8)
            call = (weights, h0.repeat(1, 2, 1), *call[2:])
            scan.layer(cell, x, *call, True, resets)
            given = (cell, dy, h_n, None, x, out, cells, saved, *call, wanted, resets)
            scan.layer_backward(*given, cells if info.has_c else None)


if __name__ == "__main__":
    assert not launch.interpreted
    compile_all(int(sys.argv[1]))
