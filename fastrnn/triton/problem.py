"""What both operators learn from their arguments, checked: sizes, weights, rows of steps.

Dimension key and layouts: csrc/scan.h, reference.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import (
    CELLS,
    compute_dtype,
    reversed_group,
    stacked_groups,
    weights_of_groups,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _expect(holds: bool, text: str) -> None:
    if not holds:
        raise RuntimeError(f"fastrnn: {text}")


class Problem:
    """A layer over some rows of data."""

    def __init__(
        self, cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
        batch_sizes: Tensor | None, groups: int, direction: int, resets: Tensor | None = None,
    ) -> None:  # fmt: skip
        _expect(cell in CELLS, f"unknown cell {cell!r}")
        self.cell, self.info, self.D, self.direction = cell, CELLS[cell], groups, direction
        self.G, self.A, self.R = self.info.gates, self.info.saved, self.info.own
        count, self.stacked = len(weights), stacked_groups(weights)
        members = 1 if not weights or weights[0].dim() != 3 else self.stacked
        _expect(
            groups > 0 and members > 0 and groups % members == 0,
            f"weights of {members} groups at a time do not make {groups} groups",
        )
        entries = groups // members
        _expect(
            count % entries == 0 and 2 <= count // entries <= 5,
            f"{count} weights are not 2 to 5 for each of {entries} groups",
        )
        for given in weights if self.stacked else ():
            _expect(
                given.dim() > 1 and given.shape[0] == members,
                f"a weight must be one of {members} groups at a time, got {list(given.shape)}",
            )
        _expect(direction in (0, 1, 2), f"direction must be 0, 1 or 2, got {direction}")
        _expect(
            direction != 2 or groups % 2 == 0,
            f"direction 2 needs an even number of groups, got {groups}",
        )
        self.dtype, self.device = input.dtype, input.device
        self.compute = compute_dtype(input.dtype)
        _expect(
            input.dtype in DTYPES,
            f"the input must be float32, float64, bfloat16 or float16, got {input.dtype}",
        )
        dims = 3 if batch_sizes is None else 2
        _expect(
            input.dim() == dims, f"the input must have {dims} dimensions, got {input.dim()}"
        )
        self.check_storage(input, "the input")
        self.leading = list(input.shape[:-1])
        self.I, self.M = self._inputs(input.shape[-1], weights[0])
        self._take_weights(weights, groups)
        self._take_rows(batch_sizes, h0)
        self.check(resets, "resets", self.leading, torch.uint8)
        self.resets = None if resets is None else resets.contiguous()
        self.K = self.B if resets is None else 2 * self.B  # rows of h0 and c0
        self.orders = sorted({reversed_group(d, groups, direction) for d in range(groups)})

    def _inputs(self, width: int, weight_ih: Tensor) -> tuple[int, int]:
        """The features of an input, and M, the inputs side by side: one for all groups, or one for
        each member of an ensemble."""
        own = weight_ih.shape[-1] if weight_ih.dim() in (2, 3) else 0
        if own in (0, width) or width == 0 or width % own:
            return width, 1  # what is wrong is said of weight_ih
        groups = self.D // 2 if self.direction == 2 else self.D
        _expect(
            groups % (width // own) == 0,
            f"the input has {width // own} times the {own} features of weight_ih, which does not "
            f"divide the {groups} groups of a direction",
        )
        return own, width // own

    def _take_weights(self, weights: Sequence[Tensor], groups: int) -> None:
        for given in weights:
            self.check_storage(given, "a weight")
        self.groups = weights_of_groups([w.contiguous() for w in weights], groups)
        weight_hh = self.groups[0].hh
        _expect(
            weight_hh.dim() == 2,
            f"weight_hh must have 2 dimensions [G * H, P], got {weight_hh.dim()}",
        )
        self.H, self.P = weight_hh.shape[0] // self.G, weight_hh.shape[1]
        self.projected = self.groups[0].hr is not None
        self.has_bias = self.groups[0].b_ih is not None
        shape = list(weight_hh.shape)
        _expect(self.H > 0 and self.P > 0, f"weight_hh must not be empty, got {shape}")
        _expect(
            not self.projected or self.info.has_c, f"weight_hr needs an LSTM, got {self.cell}"
        )
        _expect(
            self.projected or self.P == self.H, f"weight_hh must have shape [G * H, H], got {shape}"
        )
        rows = self.G * self.H
        shapes = [[rows, self.I], [rows, self.P], [rows], [rows], [self.P, self.H]]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        for own in self.groups:
            for name, weight, expected in zip(names, own, shapes, strict=True):
                self.check(weight, name, expected)

    def _take_rows(self, batch_sizes: Tensor | None, h0: Tensor | None) -> None:
        if batch_sizes is None:
            self.T, self.B = self.leading
            self.N = self.T * self.B
            self.counts = [self.B] * self.T
        else:
            _expect(
                batch_sizes.dim() == 1 and batch_sizes.dtype == torch.int64 and batch_sizes.is_cpu
                and len(batch_sizes) > 0,
                "batch_sizes must be an int64 tensor [T] on the CPU, T > 0",
            )  # fmt: skip
            self.check_storage(batch_sizes, "batch_sizes")
            _expect(h0 is not None, "packed data needs h0")
            self.counts = batch_sizes.tolist()
            self.T, self.B, self.N = len(self.counts), self.counts[0], self.leading[0]
            for t, (n, before) in enumerate(zip(self.counts, [self.N, *self.counts])):  # noqa: B905
                if not 0 < n <= before:
                    text = "batch_sizes must be positive and must not increase"
                    _expect(False, f"{text}, got {n} at step {t}")
            total = sum(self.counts)
            _expect(
                total == self.N, f"batch_sizes sum to {total} rows, the data has {self.N}"
            )
        _expect(self.T > 0, "Expected sequence length to be larger than 0 in RNN")
        _expect(self.N < 2**31, f"the data must have less than 2^31 rows, got {self.N}")
        self.packed = batch_sizes is not None
        self.offsets = [0, *itertools.accumulate(self.counts)]
        # First row and number of rows of each step of the groups that run forward, and of those in
        # reverse; zeros behind the last step are those of the one before the first, too.
        first = self.offsets[:-1]
        self.first_rows = ([*first, 0], [*reversed(first), 0])
        self.numbers = ([*self.counts, 0], [*reversed(self.counts), 0])

    def check(
        self, tensor: Tensor | None, name: str, shape: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """That a tensor is of this shape, and of the dtype and device of the layer."""
        if tensor is None:
            return
        dtype = dtype or self.dtype
        if tensor.shape != torch.Size(shape):
            _expect(False, f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != self.device:
            _expect(
                False,
                f"{name} must have dtype {dtype} and be on {self.device}, got {tensor.dtype} on "
                f"{tensor.device}",
            )
        self.check_storage(tensor, name)

    @staticmethod
    def check_storage(tensor: Tensor, name: str) -> None:
        """That its elements lie in its storage, which may have been resized: to nothing by FSDP."""
        if tensor.numel() == 0:
            return
        places = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + 1 + sum((n - 1) * stride for n, stride in places)
        held = tensor.untyped_storage().nbytes()
        if end * tensor.itemsize > held:
            text = f"the storage of {name} holds {held} bytes"
            _expect(False, f"{text}, fewer than its {end} elements")

    def check_c(self, *given: Tensor | None) -> None:
        """That no state c, and no gradient of one, is given to a cell that has none."""
        has = any(t is not None for t in given)
        _expect(self.info.has_c or not has, f"{self.cell} has no cell state, but one was given")

    def check_wanted(self, wanted: Sequence[int], count: int) -> None:
        """The flags of a backward pass: of the input, h0, c0 and each weight."""
        _expect(
            len(wanted) == count + 3, f"wanted must hold {count + 3} flags, got {len(wanted)}"
        )
        _expect(self.info.has_c or not wanted[2], f"{self.cell} has no cell state")
        for i, n in enumerate(wanted):
            _expect(
                n in (0, 1) or (i > 2 and n > 1 and not self.packed and self.B % n == 0),
                "wanted must hold 0, 1 or, of a weight, a number of parts of the batch of "
                f"{self.B} rows of dense data, got {n}",
            )

    def state(
        self, tensor: Tensor | None, name: str, width: int, dtype: torch.dtype,
        rows: int | None = None,
    ) -> Tensor:  # fmt: skip
        """A copy of a state [D, B or so many rows, width] in a dtype, checked; zeros where there is
        none."""
        shape = [self.D, self.B if rows is None else rows, width]
        self.check(tensor, name, shape)
        if tensor is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype, device=self.device).copy_(tensor)

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def count(self, step: int, reverse: bool) -> int:
        """Rows of a step of the groups of this order."""
        return self.numbers[reverse][step]

    def row(self, step: int, reverse: bool) -> int:
        """First row of a step of the groups of this order."""
        return self.first_rows[reverse][step]

    def reverse(self, d: int) -> bool:
        return reversed_group(d, self.D, self.direction)

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Packed data: the first row of each step [T], and the steps of each row [B]."""
        if not self.packed:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return nothing, nothing
        counts = torch.tensor(self.counts)
        lengths = torch.bincount(counts, minlength=self.B + 1).flip(0).cumsum(0).flip(0)[1:]
        return torch.tensor(self.offsets[:-1]).to(self.device), lengths.to(self.device)
