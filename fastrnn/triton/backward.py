"""The backward pass of a layer, and the gradients that products over all steps give. Dimension key,
and the arrays of a pass: csrc/scan.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import resident, steps, streamed
from .launch import multiply
from .passes import Heads, Pass
from .problem import Problem

KERNELS = {"resident": resident.resident_backward, "streamed": streamed.streamed_backward}


class BackwardPass(Pass):
    """The gradients of the products along time, and of the initial states."""

    def __init__(
        self, p: Problem, grads: Sequence[Tensor | None], kept: Sequence[Tensor],
        h0: Tensor | None, c0: Tensor | None,
    ) -> None:  # fmt: skip
        doutput, dh_n, dc_n, dcells = grads
        super().__init__(p, dcells is not None)
        output, cells, saved = kept
        p.check(doutput, "doutput", [*p.leading, p.D * p.P])
        p.check(output, "output", [*p.leading, p.D * p.P])
        p.check(cells, "cells", [p.D, p.N, p.H] if p.info.has_c else [0], p.compute)
        p.check(saved, "saved", [p.D, p.N, p.A * p.H])
        p.check(dcells, "dcells", [p.D, p.N, p.H], p.compute)
        self.doutput = None if doutput is None else doutput.contiguous()
        self.dcells = None if dcells is None else dcells.contiguous()
        self.output, self.cells, self.saved = (t.contiguous() for t in kept)
        self.h0 = p.state(h0, "h0", p.P, p.dtype, p.K)
        self.c0 = p.state(c0, "c0", p.H, p.dtype, p.K) if p.info.has_c else self.h0
        self.dh = p.state(dh_n, "dh_n", p.P, p.compute)
        self.dc = p.state(dc_n, "dc_n", p.H, p.compute) if p.info.has_c else self.dh
        self.dh0, self.dc0 = self.dh, self.dc
        if p.resets is not None:
            self.dh0, self.dc0 = (s.new_zeros(p.D, p.K, s.shape[-1]) for s in (self.dh, self.dc))
            self.before = p.make(p.D, p.N, p.P)  # the h that entered each step
        self.dgates = p.make(p.D, p.N, p.G * p.H)
        self.drecurrent = p.make(p.D, p.N, p.G * p.H) if p.R else self.dgates
        self.dprojected = p.make(p.D, p.N, p.P) if p.projected else self.dgates
        self.unprojected = p.make(p.D, p.N, p.H) if p.projected else self.dgates

    def run(self, wants_states: bool) -> None:
        if self.p.N > 0:
            self.run_steps(wants_states) if self.plan.kernel == "step" else self.run_sequence()

    def common(self) -> dict[str, Any]:
        p = self.p
        return {
            "doutput": self.output if self.doutput is None else self.doutput, "cells": self.cells,
            "output": self.output, "saved": self.saved, "h0": self.h0, "c0": self.c0,
            "dh": self.dh, "dc": self.dc, "dgates": self.dgates, "drecurrent": self.drecurrent,
            "A": p.A, "HAS_DOUTPUT": self.doutput is not None, **self.of_cell(),
        }  # fmt: skip

    def run_sequence(self) -> None:
        given = self.common() | self.sequence_arguments()
        self.launch(KERNELS[self.plan.kernel], **given)(self.sequence_grid())

    def run_steps(self, wants_states: bool) -> None:
        p = self.p
        product = torch.zeros_like(self.dh)
        inner, projected = product, product
        if p.projected:
            inner = p.make(p.D, p.B, p.H, dtype=p.compute)
            projected = p.make(p.D, p.B, p.P, dtype=p.compute)
            projections = [own.hr.to(p.compute) for own in p.groups if own.hr is not None]
        given = self.common()
        gates = self.launch(
            steps.gates_backward, product=product, inner=inner, unprojected=self.unprojected,
            dcells=self.cells if self.dcells is None else self.dcells,
            resets=self.h0 if p.resets is None else p.resets,
            HAS_DCELLS=self.dcells is not None, HAS_RESETS=p.resets is not None,
            N=p.N, H=p.H, PROJECTED=p.projected, **given,
        )  # fmt: skip
        project = self.launch(
            steps.project_backward, doutput=given["doutput"], product=product, dh=self.dh,
            projected=projected, dprojected=self.dprojected, N=p.N, P=p.P,
            HAS_DOUTPUT=self.doutput is not None,
        )  # fmt: skip
        enter = None
        if p.resets is not None:
            enter = self.launch(
                steps.enter_backward, resets=p.resets, output=self.output, h0=self.h0,
                product=product, dh=self.dh, dc=self.dc, dh0=self.dh0, dc0=self.dc0,
                before=self.before, N=p.N, P=p.P, H=p.H, HAS_C=p.info.has_c,
            )  # fmt: skip
        products, inner_heads, projected_heads = Heads(product), Heads(inner), Heads(projected)
        for s in reversed(range(p.T)):
            rows, before, counts = self.rows(s), self.rows_before(s), self.counts(s)
            if p.projected:
                project(self.step_grid(max(counts), p.P), **rows)
                for d, result in enumerate(inner_heads(counts)):
                    multiply(result, projected_heads(counts)[d], projections[d])
            gates(self.step_grid(max(counts), p.H), **rows, **before)
            if s > 0 or wants_states:
                for d, result in enumerate(products(counts)):
                    row = p.row(s, self.reverse[d])
                    multiply(result, self.drecurrent[d, row : row + counts[d]], p.groups[d].hh)
            if enter is not None:
                enter(self.step_grid(max(counts), max(p.P, p.H)), **rows, **before)
        if enter is None:
            self.dh += product

    # The gradients of group d, from those of its products along time; of a weight, where parts > 1,
    # one for each of so many equal parts of the batch [parts, ...].

    def dweight(self, d: int, kind: int, input: Tensor, parts: int) -> Tensor:
        """Of the weight of this place in the list of a group."""
        if kind == 0:
            return self.dweight_ih(d, input, parts)
        if kind == 1:
            return self.dweight_hh(d, parts)
        if self.p.has_bias and kind < 4:
            return self.dbias(d, kind == 3, parts)
        return self.dweight_hr(d, parts)

    def dweight_ih(self, d: int, input: Tensor, parts: int) -> Tensor:
        """dW_ih [G * H, I] = sum over time of dx_t input_t^T, input [N, M, I]"""
        return self.outer_product(self.dgates[d], input[:, d % self.p.M], parts)

    def dweight_hh(self, d: int, parts: int) -> Tensor:
        """dW_hh [G * H, P] = sum over time of dr_t h_{t-1}^T"""
        return self.outer_product(self.drecurrent[d], self.states_before(d), parts)

    def dbias(self, d: int, recurrent: bool, parts: int) -> Tensor:
        """db_ih [G * H] = sum over time of dx_t; db_hh that of dr_t"""
        p = self.p
        terms = self.drecurrent[d] if recurrent else self.dgates[d]
        if parts > 1:
            terms = terms.view(p.T, parts, p.B // parts, terms.shape[-1])
            terms = terms.transpose(1, 2).flatten(0, 1)
        return terms.sum(0, dtype=p.compute).to(p.dtype)

    def dweight_hr(self, d: int, parts: int) -> Tensor:
        """dW_hr [P, H] = sum over time of dh_t (o tanh c)_t^T"""
        return self.outer_product(self.dprojected[d], self.unprojected[d], parts)

    def outer_product(self, a: Tensor, b: Tensor, parts: int) -> Tensor:
        """The sum over time of a_t b_t^T, of arrays [N, width]."""
        if parts == 1:
            return a.t() @ b
        p = self.p
        a, b = (
            t.reshape(p.T, parts, p.B // parts, t.shape[-1]).transpose(0, 1).flatten(1, 2)
            for t in (a, b)
        )
        return a.mT @ b

    def dinput(self) -> Tensor:
        """dinput [N, M, I]: of each input the sum of dx W_ih over its groups"""
        p = self.p
        sums = p.make(p.N, p.M, p.I, dtype=p.compute)
        part = p.make(p.N, p.I, dtype=p.compute)
        for d, own in enumerate(p.groups):
            multiply(part, self.dgates[d], own.ih)
            if d < p.M:
                sums[:, d] = part
            else:
                sums[:, d % p.M] += part
        return sums.to(p.dtype)

    def states_before(self, d: int) -> Tensor:
        """The h that entered each row of data [N, P]."""
        if self.p.resets is not None:
            return self.before[d]
        p, h = self.p, self.output.view(self.p.N, self.p.D, self.p.P)[:, d]
        reverse = p.reverse(d)
        if not p.packed:
            rest = p.N - p.B
            return torch.cat([h[p.B :], self.h0[d]] if reverse else [self.h0[d], h[:rest]])
        rows = torch.arange(p.N)
        step = torch.repeat_interleave(torch.arange(p.T), torch.tensor(p.counts))
        offsets = torch.tensor(p.offsets)
        b = rows - offsets[step]
        other = step + 1 if reverse else step - 1
        counts = torch.tensor([*p.counts, 0])  # of the steps behind the last and before the first
        source = torch.where(b < counts[other], offsets[other] + b, p.N + b)
        return torch.cat([h, self.h0[d]]).index_select(0, source.to(p.device))
