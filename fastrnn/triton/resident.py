"""Kernels of a whole sequence whose programs keep W_hh: BLOCK_H >= H.

Computes  a pass of csrc/scan.h without a projection: forward the steps [first, end) from the input
          products, h' and c' by cells.py from r = W_hh h; backward all steps, dh = W_hh^T dr
Work      a program: BLOCK_B rows of one group, all units, all steps
Memory    registers and shared memory: W_hh, G BLOCK_H^2 numbers, and the states of the rows
Requires  16 | BLOCK_B, BLOCK_H a power of two, 16 at least; W_hh as [D, G, W, W], 16 | W, zero
          beyond H
Order     programs know nothing of each other; sums over h in one order: the same bits each time
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
def resident_forward(
    gates, bias, weight, h, c, output, cells, saved, offsets, lengths, first, end, begin0, begin1,
    room, T, N, B, D, direction, H, W, CELL: tl.constexpr, HAS_C: tl.constexpr, G: tl.constexpr,
    OWN: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    d, reverse, b, there, length, first, end = place_in_sequence(
        PACKED, lengths, first, end, T, B, D, direction, BLOCK_B
    )
    j = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    mask = there[:, None] & (j < H)[None, :]
    begin = tl.where(reverse, begin1, begin0)

    inside = (k < W)[:, None] & (j < W)[None, :]
    transposed = weight + d * (G * W * W) + k[:, None] + j[None, :] * W  # [BLOCK_H of k, of j]
    w = load_each(weight.dtype.element_ty, G, transposed, W * W, inside)
    state = (d * B + b)[:, None] * H + j[None, :]
    h_tile = tl.load(h + state, mask=mask, other=0.0)
    c_tile = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    if HAS_C:
        c_tile = load(COMPUTE, c + state, mask)

    for s in range(first, end):
        t = tl.where(reverse, T - 1 - s, s)
        active = mask & (t < length)[:, None] if PACKED else mask
        row = first_row(PACKED, offsets, t, B) + b
        r = ()
        for g in tl.static_range(G):
            r = r + (tl.dot(h_tile, w[g], input_precision=PRECISION),)
        h_new, c_new = step_forward(
            CELL, HAS_C, OWN, HAS_BIAS, SAVE, COMPUTE, gates, bias, cells, saved, row, row - begin,
            j, d, N, room, H, r, h_tile.to(COMPUTE), c_tile, active,
        )  # fmt: skip
        h_new = h_new.to(h.dtype.element_ty)
        tl.store(output + row[:, None] * (D * H) + d * H + j[None, :], h_new, mask=active)
        h_tile = tl.where(active, h_new, h_tile)
        c_tile = tl.where(active, c_new, c_tile)
    tl.store(h + state, h_tile, mask=mask)
    if HAS_C:
        tl.store(c + state, c_tile, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def resident_backward(
    doutput, output, cells, saved, h0, c0, weight, dh, dc, dgates, drecurrent, offsets, lengths, T,
    N, B, D, direction, H, W, CELL: tl.constexpr, HAS_C: tl.constexpr, OWN: tl.constexpr,
    G: tl.constexpr, A: tl.constexpr, HAS_DOUTPUT: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    d, reverse, b, there, length, first, end = place_in_sequence(
        PACKED, lengths, 0, T, T, B, D, direction, BLOCK_B
    )
    j = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    mask = there[:, None] & (j < H)[None, :]

    inside = (j < W)[:, None] & (k < W)[None, :]
    straight = weight + d * (G * W * W) + j[:, None] * W + k[None, :]  # [BLOCK_H of j, of k]
    w = load_each(weight.dtype.element_ty, G, straight, W * W, inside)
    state = (d * B + b)[:, None] * H + j[None, :]
    dh_tile = load(COMPUTE, dh + state, mask)
    dc_tile = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    if HAS_C:
        dc_tile = load(COMPUTE, dc + state, mask)

    for i in range(first, end):
        s = first + end - 1 - i
        t = tl.where(reverse, T - 1 - s, s)
        active = mask & (t < length)[:, None]
        row = first_row(PACKED, offsets, t, B) + b
        row_before, has_before = place_before(PACKED, offsets, length, t, b, T, B, reverse)
        dh_all = dh_tile
        if HAS_DOUTPUT:
            at = row[:, None] * (D * H) + d * H + j[None, :]
            dh_all += load(COMPUTE, doutput + at, active)
        dr, dh_new, dc_new = step_backward(
            CELL, HAS_C, OWN, A, COMPUTE, output, cells, saved, h0, c0, dgates, drecurrent, dgates,
            row, row_before, has_before, b, j, d, N, B, D, H, False, dh_all, dc_tile, active,
        )  # fmt: skip
        for g in tl.static_range(G):
            low = dr[g].to(weight.dtype.element_ty)
            dh_new = tl.dot(low, w[g], dh_new, input_precision=PRECISION)
        dh_tile = tl.where(active, dh_new, dh_tile)
        dc_tile = tl.where(active, dc_new, dc_tile)
    store(dh + state, dh_tile, mask)
    if HAS_C:
        store(dc + state, dc_tile, mask)
