"""The forward pass of a layer. Dimension key, and the arrays of a pass: csrc/scan.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import resident, steps, streamed
from .launch import multiply
from .passes import Heads, Pass
from .problem import Problem

GATES_BYTES = 64 << 20  # of input products at a time, about
KERNELS = {"resident": resident.resident_forward, "streamed": streamed.streamed_forward}


class ForwardPass(Pass):
    """Output, h_n, c_n, cells and saved of ``reference.layer``."""

    def __init__(
        self, p: Problem, input: Tensor, h0: Tensor | None, c0: Tensor | None, save: bool
    ) -> None:
        super().__init__(p)
        self.input, self.save = input.contiguous().view(p.N, p.M, p.I), save
        self.output = p.make(*p.leading, p.D * p.P)
        self.h0 = p.state(h0, "h0", p.P, p.dtype, p.K)
        keeps = save and p.info.has_c
        self.c0 = p.state(c0, "c0", p.H, p.compute, p.K) if p.info.has_c else p.make(0)
        self.h, self.c = self.h0, self.c0
        if p.resets is not None:  # what h0 and c0 hold enters with each step
            self.h = p.make(p.D, p.B, p.P)
            self.c = p.make(p.D, p.B, p.H, dtype=p.compute) if p.info.has_c else self.c0
        self.cells = p.make(*((p.D, p.N, p.H) if keeps else (0,)), dtype=p.compute)
        self.saved = p.make(*((p.D, p.N, p.A * p.H) if save else (0,)))
        row_bytes = p.D * p.G * p.H * p.compute.itemsize
        self.room = min(p.N, max(p.B, GATES_BYTES // row_bytes))
        self.gates = p.make(p.D, self.room, p.G * p.H, dtype=p.compute)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        p = self.p
        if p.N > 0:
            self.run_steps() if self.plan.kernel == "step" else self.run_sequence()
        c_n = self.c.to(p.dtype)
        return self.output, self.h, c_n, self.cells, self.saved

    def common(self) -> dict[str, Any]:
        p = self.p
        return {
            "gates": self.gates, "bias": self.bias(), "h": self.h, "c": self.c,
            "output": self.output, "cells": self.cells, "saved": self.saved, "N": p.N,
            "room": self.room, "HAS_BIAS": p.has_bias, "SAVE": self.save, **self.of_cell(),
        }  # fmt: skip

    def bias(self) -> Tensor:
        """[D, G + R, H]: what is added to the input products, and to the last R recurrent ones;
        some array, which nobody reads, where there is no bias."""
        p = self.p
        parts = []
        for own in p.groups:
            if own.b_ih is None or own.b_hh is None:
                return self.gates
            b_ih, b_hh = own.b_ih.to(p.compute), own.b_hh.to(p.compute)
            shared = (p.G - p.R) * p.H
            parts += [b_ih[:shared] + b_hh[:shared], b_ih[shared:], b_hh[shared:]]
        return torch.cat(parts)

    def run_sequence(self) -> None:
        given = self.common() | self.sequence_arguments()
        if self.plan.kernel == "streamed":
            given["h_next"] = torch.empty_like(self.h)
        launch = self.launch(KERNELS[self.plan.kernel], **given)
        first = 0
        while first < self.p.T:
            end, begins = self.input_products(first)
            launch(self.sequence_grid(), first=first, end=end, **begins)
            first = end

    def run_steps(self) -> None:
        p = self.p
        product = p.make(p.D, p.B, p.G * p.H, dtype=p.compute)
        inner, projected = product, product
        if p.projected:
            inner = p.make(p.D, p.B, p.H, dtype=p.compute)
            projected = p.make(p.D, p.B, p.P, dtype=p.compute)
            projections = [own.hr.to(p.compute).t() for own in p.groups if own.hr is not None]
        weights = [own.hh.t() for own in p.groups]
        gates = self.launch(
            steps.gates_forward, product=product, inner=inner, H=p.H, G=p.G,
            PROJECTED=p.projected, **self.common(),
        )  # fmt: skip
        project = self.launch(
            steps.project_forward, projected=projected, h=self.h, output=self.output, P=p.P
        )
        enter = None
        if p.resets is not None:
            enter = self.launch(
                steps.enter_forward, resets=p.resets, h0=self.h0, c0=self.c0, h=self.h, c=self.c,
                P=p.P, H=p.H, HAS_C=p.info.has_c,
            )  # fmt: skip
        products, states = Heads(product), Heads(self.h)
        inner_heads, projected_heads = Heads(inner), Heads(projected)
        chunk_end = 0
        begins: dict[str, int] = {}
        for s in range(p.T):
            if s == chunk_end:
                chunk_end, begins = self.input_products(s)
            rows, counts = self.rows(s), self.counts(s)
            if enter is not None:
                grid = self.step_grid(max(counts), max(p.P, p.H))
                enter(grid, **rows, **self.rows_before(s))
            for d, result in enumerate(products(counts)):
                multiply(result, states(counts)[d], weights[d])
            gates(self.step_grid(max(counts), p.H), **rows, **begins)
            if p.projected:
                for d, result in enumerate(projected_heads(counts)):
                    multiply(result, inner_heads(counts)[d], projections[d])
                project(self.step_grid(max(counts), p.P), **rows)

    def input_products(self, first: int) -> tuple[int, dict[str, int]]:
        """gates = W_ih x of the steps from `first` on whose rows find room. Returns the step behind
        the last of them, and the first row of gates of either order."""
        p = self.p
        end, rows = first, dict.fromkeys(p.orders, 0)
        if not p.packed:
            end = min(p.T, first + self.room // p.B)
            rows = dict.fromkeys(p.orders, (end - first) * p.B)
        while p.packed and end < p.T:
            more = {reverse: rows[reverse] + p.count(end, reverse) for reverse in p.orders}
            if max(more.values()) > self.room:
                break
            end, rows = end + 1, more
        # In memory a chunk of reversed steps begins with its last one.
        begin = {reverse: p.row(end - 1 if reverse else first, reverse) for reverse in p.orders}
        for d, own in enumerate(p.groups):
            order = p.reverse(d)
            target = self.gates[d, : rows[order]]
            own_input = self.input[begin[order] : begin[order] + rows[order], d % p.M]
            multiply(target, own_input, own.ih.t())
        return end, {"begin0": begin.get(False, 0), "begin1": begin.get(True, 0)}
