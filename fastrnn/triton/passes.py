"""What a forward and a backward pass have in common: the plan, and how kernels are launched.

Dimension key: csrc/scan.h.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Launch, allows_tf32, compute_type, interpreted
from .plan import H100, KERNELS, Gpu, Plan, Shape, make_plan
from .problem import Problem


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return H100
    facts: Any = torch.cuda.get_device_properties(device)
    return Gpu(facts.multi_processor_count, facts.shared_memory_per_block_optin)


def plan_of(p: Problem, has_dcells: bool = False) -> Plan:
    item = p.dtype.itemsize
    no_products = ""
    if interpreted and p.dtype == torch.bfloat16:
        no_products = "Triton's interpreter does not support products of bfloat16"
    tf32 = p.dtype == torch.float32 and allows_tf32(p.device)
    only_steps = "resets" if p.resets is not None else "gradients of cells" * has_dcells
    shape = Shape(p.G, p.B, p.H, p.D, item, p.projected, tf32, no_products, only_steps)
    asked = asked_kernel()
    try:
        return make_plan(shape, gpu_of(p.device), asked)
    except ValueError as error:
        raise RuntimeError(
            f"fastrnn: FASTRNN_TRITON_KERNEL={asked} cannot be met: {error}"
        ) from None


def asked_kernel() -> str:
    """FASTRNN_TRITON_KERNEL: auto, or the kernel that is to run everything.

    Raises:
        RuntimeError: there is no such kernel.
    """
    asked = os.environ.get("FASTRNN_TRITON_KERNEL") or "auto"
    if asked not in ("auto", *KERNELS):
        names = ", ".join(("auto", *KERNELS))
        raise RuntimeError(
            f"fastrnn: FASTRNN_TRITON_KERNEL must be one of {names}, and is {asked!r}"
        )
    return asked


class Pass:
    """What a forward and a backward pass have in common."""

    def __init__(self, p: Problem, has_dcells: bool = False) -> None:
        self.p, self.plan = p, plan_of(p, has_dcells)
        self.reverse = [p.reverse(d) for d in range(p.D)]
        self.tf32 = p.dtype == torch.float32 and allows_tf32(p.device)
        self.type = compute_type(p.compute)

    def launch(self, kernel: Any, **arguments: Any) -> Launch:
        options = self.plan.options()
        p = self.p
        shared = {"B": p.B, "D": p.D, "direction": p.direction, "COMPUTE": self.type}
        return Launch(kernel, options, **shared, **arguments)

    def of_cell(self) -> dict[str, Any]:
        """What the kernels of a cell are compiled for."""
        p = self.p
        return {"CELL": p.cell, "HAS_C": p.info.has_c, "OWN": p.R}

    def sequence_arguments(self) -> dict[str, Any]:
        """What only the kernels of a whole sequence are given."""
        p = self.p
        offsets, lengths = p.places
        weight = self.aligned_weights()
        return {
            "weight": weight, "offsets": offsets, "lengths": lengths, "T": p.T, "N": p.N,
            "H": p.H, "W": weight.shape[-1], "G": p.G, "PACKED": p.packed,
            "PRECISION": "tf32" if self.tf32 else "ieee",
        }  # fmt: skip

    def aligned_weights(self) -> Tensor:
        """W_hh of all groups [D, G, W, W]: whose rows can be read 16 numbers at a time."""
        p = self.p
        width = triton.cdiv(p.H, 16) * 16
        if p.D == 1 and width == p.H:
            return p.groups[0].hh.view(1, p.G, p.H, p.H)
        weight = torch.zeros(p.D, p.G, width, width, dtype=p.dtype, device=p.device)
        for d, own in enumerate(p.groups):
            weight[d, :, : p.H, : p.H] = own.hh.view(p.G, p.H, p.H)
        return weight

    def sequence_grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.p.B, self.plan.block_b), self.p.D, 1

    def step_grid(self, rows: int, width: int) -> tuple[int, int, int]:
        return -(-rows // self.plan.block_b), -(-width // self.plan.block_h), self.p.D

    def rows(self, step: int) -> dict[str, int]:
        """The rows of a step, as the kernels are given them."""
        forward, reverse = self.p.first_rows
        counts, reverse_counts = self.p.numbers
        return {
            "row0": forward[step], "row1": reverse[step],
            "count0": counts[step], "count1": reverse_counts[step],
        }  # fmt: skip

    def rows_before(self, step: int) -> dict[str, int]:
        """Those of the step before it."""
        rows = self.rows(step - 1)
        return {
            "before0": rows["row0"], "before1": rows["row1"],
            "count_before0": rows["count0"], "count_before1": rows["count1"],
        }  # fmt: skip

    def counts(self, step: int) -> list[int]:
        """The rows of a step in each group."""
        return [self.p.numbers[reverse][step] for reverse in self.reverse]


class Heads:
    """The first rows of each group of an array [D, B, width]: views that are made anew where their
    number changes."""

    def __init__(self, array: Tensor) -> None:
        self._array = array
        self._counts: list[int] = []
        self._views: list[Tensor] = []

    def __call__(self, counts: list[int]) -> list[Tensor]:
        if counts != self._counts:
            self._counts = counts
            self._views = [self._array[d, :n] for d, n in enumerate(counts)]
        return self._views
