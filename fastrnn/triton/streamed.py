"""Kernels of a whole sequence whose programs read W_hh again at each step, from the L2 cache.

Computes  what the kernels of resident.py do
Work      a program: BLOCK_B rows of one group, all units BLOCK_H by BLOCK_H, all steps
Memory    the states of the rows lie in memory, forward h twice: in `h`, where it begins and ends,
          and in `h_next`; a step reads G H^2 numbers of W_hh
Requires  16 | BLOCK_B; BLOCK_H and BLOCK_K powers of two, 16 at least; W_hh as [D, G, W, W],
          16 | W, zero beyond H
Order     programs know nothing of each other; in a program a barrier stands between what one thread
          writes and another reads, and the other way round where what is written does not follow
          from what was read; sums over h in one order: the same bits each time
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    VARYING,
    first_row,
    load,
    load_each,
    place_before,
    place_in_sequence,
    step_backward,
    step_forward,
    store,
)


@triton.jit(do_not_specialize=VARYING)
def streamed_forward(
    gates, bias, weight, h, h_next, c, output, cells, saved, offsets, lengths, first, end, begin0,
    begin1, room, T, N, B, D, direction, H, W, CELL: tl.constexpr, HAS_C: tl.constexpr,
    G: tl.constexpr, OWN: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    d, reverse, b, there, length, first, end = place_in_sequence(
        PACKED, lengths, first, end, T, B, D, direction, BLOCK_B
    )
    begin = tl.where(reverse, begin1, begin0)
    STORAGE: tl.constexpr = h.dtype.element_ty
    weight += d * (G * W * W)
    state = (d * B + b)[:, None] * H
    old = h
    new = h_next

    for s in range(first, end):
        t = tl.where(reverse, T - 1 - s, s)
        active = there & (t < length)
        row = first_row(PACKED, offsets, t, B) + b
        for j0 in range(0, H, BLOCK_H):
            j = j0 + tl.arange(0, BLOCK_H)
            r = ()
            for g in tl.static_range(G):
                r = r + (tl.zeros([BLOCK_B, BLOCK_H], COMPUTE),)
            for k0 in range(0, H, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                h_k = load(STORAGE, old + state + k[None, :], there[:, None] & (k < H)[None, :])
                inside = (k < W)[:, None] & (j < W)[None, :]
                w = load_each(STORAGE, G, weight + k[:, None] + j[None, :] * W, W * W, inside)
                more = ()
                for g in tl.static_range(G):
                    more = more + (tl.dot(h_k, w[g], r[g], input_precision=PRECISION),)
                r = more
            mask = there[:, None] & (j < H)[None, :]
            at = state + j[None, :]
            h_old = tl.load(old + at, mask=mask, other=0.0)
            c_old = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
            if HAS_C:
                c_old = load(COMPUTE, c + at, mask)
            taking = mask & active[:, None]
            h_new, c_new = step_forward(
                CELL, HAS_C, OWN, HAS_BIAS, SAVE, COMPUTE, gates, bias, cells, saved, row,
                row - begin, j, d, N, room, H, r, h_old.to(COMPUTE), c_old, taking,
            )  # fmt: skip
            h_new = h_new.to(STORAGE)
            tl.store(output + row[:, None] * (D * H) + d * H + j[None, :], h_new, mask=taking)
            tl.store(new + at, tl.where(taking, h_new, h_old), mask=mask)
            if HAS_C:
                tl.store(c + at, c_new, mask=taking)
        old, new = new, old
        tl.debug_barrier()
    if (end - first) % 2 == 1:
        for j0 in range(0, H, BLOCK_H):
            j = j0 + tl.arange(0, BLOCK_H)
            mask = there[:, None] & (j < H)[None, :]
            at = state + j[None, :]
            tl.store(h + at, tl.load(h_next + at, mask=mask), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def streamed_backward(
    doutput, output, cells, saved, h0, c0, weight, dh, dc, dgates, drecurrent, offsets, lengths, T,
    N, B, D, direction, H, W, CELL: tl.constexpr, HAS_C: tl.constexpr, OWN: tl.constexpr,
    G: tl.constexpr, A: tl.constexpr, HAS_DOUTPUT: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    d, reverse, b, there, length, first, end = place_in_sequence(
        PACKED, lengths, 0, T, T, B, D, direction, BLOCK_B
    )
    STORAGE: tl.constexpr = weight.dtype.element_ty
    weight += d * (G * W * W)
    state = (d * B + b)[:, None] * H
    # What the products take: dgates, where the gradient of the recurrent products is the same.
    factors = drecurrent if OWN > 0 else dgates

    for i in range(first, end):
        s = first + end - 1 - i
        t = tl.where(reverse, T - 1 - s, s)
        active = there & (t < length)
        row = first_row(PACKED, offsets, t, B) + b
        row_before, has_before = place_before(PACKED, offsets, length, t, b, T, B, reverse)
        for j0 in range(0, H, BLOCK_H):
            j = j0 + tl.arange(0, BLOCK_H)
            mask = active[:, None] & (j < H)[None, :]
            dh_all = load(COMPUTE, dh + state + j[None, :], mask)
            if HAS_DOUTPUT:
                at = row[:, None] * (D * H) + d * H + j[None, :]
                dh_all += load(COMPUTE, doutput + at, mask)
            dc_all = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
            if HAS_C:
                dc_all = load(COMPUTE, dc + state + j[None, :], mask)
            _, dh_new, dc_new = step_backward(
                CELL, HAS_C, OWN, A, COMPUTE, output, cells, saved, h0, c0, dgates, drecurrent,
                dgates, row, row_before, has_before, b, j, d, N, B, D, H, False, dh_all, dc_all,
                mask,
            )  # fmt: skip
            if CELL == "gru":
                store(dh + state + j[None, :], dh_new, mask)
            if HAS_C:
                store(dc + state + j[None, :], dc_new, mask)
        tl.debug_barrier()
        for k0 in range(0, H, BLOCK_H):
            k = k0 + tl.arange(0, BLOCK_H)
            mask = active[:, None] & (k < H)[None, :]
            dh_k = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
            if CELL == "gru":
                dh_k = load(COMPUTE, dh + state + k[None, :], mask)
            for j0 in range(0, H, BLOCK_K):
                j = j0 + tl.arange(0, BLOCK_K)
                at = factors + (d * N + row)[:, None] * (G * H) + j[None, :]
                low = load_each(STORAGE, G, at, H, active[:, None] & (j < H)[None, :])
                inside = (j < W)[:, None] & (k < W)[None, :]
                w = load_each(STORAGE, G, weight + j[:, None] * W + k[None, :], W * W, inside)
                for g in tl.static_range(G):
                    dh_k = tl.dot(low[g], w[g], dh_k, input_precision=PRECISION)
            store(dh + state + k[None, :], dh_k, mask)
        tl.debug_barrier()
