"""What a forward and a backward pass have in common: the plan, and how kernels are launched.

Dimension key: csrc/scan.h.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import Launch, allows_tf32, compute_type
from .plan import H100, Gpu, Plan, Shape, asked_kernel, make_plan
from .problem import Problem


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return H100
    facts: Any = torch.cuda.get_device_properties(device)
    return Gpu(facts.multi_processor_count, facts.shared_memory_per_block_optin)


def plan_of(p: Problem) -> Plan:
    item = p.dtype.itemsize
    tf32 = item == 4 and allows_tf32(p.device)
    shape = Shape(p.G, p.B, p.H, p.D, item, p.projected, tf32)
    return make_plan(shape, gpu_of(p.device), asked_kernel())


class Pass:
    """What a forward and a backward pass have in common."""

    def __init__(self, p: Problem) -> None:
        self.p, self.plan = p, plan_of(p)
        self.type = compute_type(p.compute)

    def launch(self, kernel: Any, **arguments: Any) -> Launch:
        options = self.plan.options()
        p = self.p
        shared = {"B": p.B, "D": p.D, "direction": p.direction, "COMPUTE": self.type}
        return Launch(kernel, options, **shared, **arguments)

    def sequence_arguments(self) -> dict[str, Any]:
        """What only the kernels of a whole sequence are given."""
        p = self.p
        offsets, lengths = p.places
        weight = self.aligned_weights()
        return {
            "weight": weight, "offsets": offsets, "lengths": lengths, "T": p.T, "N": p.N,
            "H": p.H, "W": weight.shape[-1], "CELL": p.cell, "G": p.G, "PACKED": p.packed,
            "PRECISION": "tf32" if allows_tf32(p.device) else "ieee",
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
        return triton.cdiv(rows, self.plan.block_b), triton.cdiv(width, self.plan.block_h), self.p.D

    def rows(self, step: int) -> dict[str, int]:
        """The rows of a step, as the kernels are given them."""
        p = self.p
        return {
            "row0": p.row(step, False), "row1": p.row(step, True),
            "count0": p.count(step, False), "count1": p.count(step, True),
        }  # fmt: skip

    def most(self, step: int) -> int:
        return max(self.p.count(step, reverse) for reverse in self.p.orders)
