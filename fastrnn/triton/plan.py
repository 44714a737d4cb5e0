"""Which kernels run a pass, with which tiles, and why not the others. Pure: asks no GPU, and no
environment.

The choice is by predicted times, none of which has been measured. That of a kernel's tiles knows
neither the batch nor the length of the sequence: it is compiled for a layer once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

KERNELS = ("resident", "streamed", "step")
BLOCK_B = 16  # rows of a program, the least that tensor cores take
TILE_B, TILE_H = 8, 64  # of the kernels of one step
STREAM_H, STREAM_K = 64, {2: 64, 4: 32}  # by bytes of a number; more would spill registers

# Predicted, of an H100: microseconds of a step of two launches, of what a step of a whole-sequence
# kernel waits for (memory, barriers, gates), bytes and float32 products a multiprocessor reads from
# L2 and computes in a microsecond, and products of the whole GPU in one.
STEP_US, WAIT_US = 10.0, 1.5
L2_BYTES_PER_US, FMA_PER_US, GPU_PRODUCTS_PER_US = 70e3, 200e3, 100e6


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on."""

    multiprocessors: int
    shared_bytes: int  # of one program, at most


# CUDA C++ Programming Guide, and the data sheets; as csrc/cuda/machine.h has them.
GPUS = {
    "a100": Gpu(108, 166912), "l40s": Gpu(142, 101376), "h100": Gpu(132, 232448),
    "h200": Gpu(132, 232448), "b200": Gpu(148, 232448),
}  # fmt: skip
H100 = GPUS["h100"]  # also for the interpreter, which has no limits of its own


@dataclass(frozen=True)
class Plan:
    kernel: str
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int
    why: str
    against: tuple[str, ...] = field(default=())

    def tiles(self) -> str:
        depth = f", {self.block_k} at a time of what they sum over" if self.block_k else ""
        return f"{self.block_b} rows, {self.block_h} units{depth}"

    def options(self) -> dict[str, int]:
        """Of a launch of the kernel."""
        tiles = {"BLOCK_B": self.block_b, "BLOCK_H": self.block_h}
        if self.kernel == "streamed":
            tiles["BLOCK_K"] = self.block_k
        return tiles | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Shape:
    """Dimension key: csrc/scan.h; tf32: whether products of float32 may be those of TF32."""

    G: int
    B: int
    H: int
    D: int
    item_bytes: int
    projected: bool
    tf32: bool
    no_products: str = ""  # why kernels cannot multiply these numbers; empty if they can
    only_steps: str = ""  # what is given that only kernels of one step take; empty if nothing is


def shared_bytes(s: Shape) -> int:
    """Shared memory of a resident program: W_hh, a tile for each gate, and two more. Not less than
    what the compiler takes, which tests/triton_backend/test_triton_compile.py holds it against."""
    width = _block(s.H)
    return (s.G * width + (s.G + 2) * BLOCK_B) * width * s.item_bytes


def _block(H: int) -> int:
    return max(16, 1 << (H - 1).bit_length())


def why_not(kernel: str, s: Shape, gpu: Gpu) -> str | None:
    """Why a kernel cannot run a layer at all; None if it can."""
    if kernel == "step":
        return None
    if s.only_steps:
        return f"{kernel}: only kernels of one step take {s.only_steps}"
    if s.projected:
        return f"{kernel}: a projection is a product of its own"
    if s.item_bytes == 8:
        return f"{kernel}: the products of float64 are left to torch"
    if s.no_products:
        return f"{kernel}: {s.no_products}"
    if s.G * (s.H + 15) ** 2 >= 2**31:
        return f"{kernel}: W_hh has 2^31 numbers or more"
    if kernel == "resident" and s.item_bytes == 4 and not s.tf32:
        return "resident: products of float32 without TF32 spill registers"
    if kernel == "resident" and shared_bytes(s) > gpu.shared_bytes:
        return (
            f"resident: W_hh takes {shared_bytes(s)} bytes of shared memory, "
            f"the GPU has {gpu.shared_bytes}"
        )
    return None


def predicted_us(kernel: str, s: Shape, gpu: Gpu) -> float:
    """Of a step."""
    weights = s.G * s.H * s.H
    if kernel == "step":
        return STEP_US + s.D * s.B * weights / GPU_PRODUCTS_PER_US
    waves = -(-s.D * -(-s.B // BLOCK_B) // gpu.multiprocessors)
    time = WAIT_US
    if kernel == "streamed":
        time += weights * s.item_bytes / L2_BYTES_PER_US
    if s.item_bytes == 4 and not s.tf32:
        time += BLOCK_B * weights / FMA_PER_US
    return waves * time


@functools.lru_cache(maxsize=1024)
def make_plan(s: Shape, gpu: Gpu, asked: str) -> Plan:
    """The plan of a pass; asked: "auto", or a kernel.

    Raises:
        ValueError: why the kernel that is asked for cannot run it.
    """
    if asked != "auto":
        reason = why_not(asked, s, gpu)
        if reason is not None:
            raise ValueError(reason)
        return _tiles(asked, s, "asked for", ())
    times = {k: predicted_us(k, s, gpu) for k in KERNELS if why_not(k, s, gpu) is None}
    best = min(times, key=lambda kernel: times[kernel])
    against = [reason for k in KERNELS if (reason := why_not(k, s, gpu)) is not None]
    against += [f"{k}: {us:.1f} us a step predicted" for k, us in times.items() if k != best]
    return _tiles(best, s, f"{times[best]:.1f} us a step predicted", tuple(against))


def _tiles(kernel: str, s: Shape, why: str, against: tuple[str, ...]) -> Plan:
    if kernel == "resident":
        width = _block(s.H)
        return Plan(kernel, BLOCK_B, width, 0, 4 if width <= 64 else 8, 1, why, against)
    if kernel == "streamed":
        stages, block_k = (3 if s.item_bytes == 2 else 2), STREAM_K[s.item_bytes]
        return Plan(kernel, BLOCK_B, STREAM_H, block_k, 8, stages, why, against)
    return Plan(kernel, TILE_B, TILE_H, 0, 4, 1, why, against)
