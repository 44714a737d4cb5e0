"""Kernels of one step, beside a product of torch: any shape, dtype and projection.

Computes  a step of csrc/scan.h's passes, but for its products
Work      a program: BLOCK_B rows, BLOCK_H units of one group
Memory    nothing is kept
Requires  BLOCK_B and BLOCK_H powers of two
Order     each element once: the same bits each time

Beside the arrays of memory.py there are product [D, B, G, H] (backward: [D, B, P]), with a
projection inner [D, B, H] (its input; backward: the gradient of that) and projected [D, B, P]; with
resets [N] (csrc/scan.h) h0, c0, dh0 and dc0 have 2 B rows, and before is [D, N, P].
What is written over what was read follows from it, or there is a barrier: layouts of loads and
stores may differ, so that another thread may still have to read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    VARYING,
    load,
    load_each,
    place_in_step,
    place_of_entry,
    states_before,
    step_backward,
    step_forward,
    store,
)


@triton.jit(do_not_specialize=VARYING)
def enter_forward(
    resets, h0, c0, h, c, row0, row1, count0, count1, before0, before1, count_before0,
    count_before1, B, D, direction, P, H, HAS_C: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """With resets, before the product: states of h0 and c0 in place of those of the step before."""
    d, reverse, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, P, BLOCK_B, BLOCK_H
    )
    _, carries, k = place_of_entry(
        resets, reverse, b, row, count0, count1, before0, before1, count_before0, count_before1, B
    )
    enters = (carries == 0)[:, None]
    at, source = (d * B + b)[:, None], (d * 2 * B + k)[:, None]
    mask = mask & enters
    store(h + at * P + j[None, :], load(COMPUTE, h0 + source * P + j[None, :], mask), mask)
    if HAS_C:
        mask = enters & (b < tl.where(reverse, count1, count0))[:, None] & (j < H)[None, :]
        store(c + at * H + j[None, :], load(COMPUTE, c0 + source * H + j[None, :], mask), mask)


@triton.jit(do_not_specialize=VARYING)
def gates_forward(
    gates, bias, product, h, c, output, cells, saved, inner, row0, row1, count0, count1, begin0,
    begin1, room, N, B, D, direction, H, CELL: tl.constexpr, HAS_C: tl.constexpr, G: tl.constexpr,
    OWN: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PROJECTED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The new c, and h; with a projection what is to be projected."""
    d, reverse, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, H, BLOCK_B, BLOCK_H
    )
    at = (d * B + b)[:, None]
    r = load_each(COMPUTE, G, product + at * (G * H) + j[None, :], H, mask)
    state = at * H + j[None, :]
    h_old = r[0]
    c_old = r[0]
    if CELL == "gru":
        h_old = load(COMPUTE, h + state, mask)
    if HAS_C:
        c_old = load(COMPUTE, c + state, mask)
    h_new, c_new = step_forward(
        CELL, HAS_C, OWN, HAS_BIAS, SAVE, COMPUTE, gates, bias, cells, saved, row,
        row - tl.where(reverse, begin1, begin0), j, d, N, room, H, r, h_old, c_old, mask,
    )  # fmt: skip
    if HAS_C:
        store(c + state, c_new, mask)
    if PROJECTED:
        store(inner + state, h_new, mask)
    else:
        store(h + state, h_new, mask)
        store(output + row[:, None] * (D * H) + d * H + j[None, :], h_new, mask)


@triton.jit(do_not_specialize=VARYING)
def project_forward(
    projected, h, output, row0, row1, count0, count1, B, D, direction, P, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The new h, which is `projected`, rounded."""
    d, _, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, P, BLOCK_B, BLOCK_H
    )
    at = (d * B + b)[:, None] * P + j[None, :]
    h_new = load(COMPUTE, projected + at, mask)
    store(h + at, h_new, mask)
    store(output + row[:, None] * (D * P) + d * P + j[None, :], h_new, mask)


@triton.jit(do_not_specialize=VARYING)
def gates_backward(
    doutput, dcells, output, cells, saved, resets, h0, c0, product, dh, dc, dgates, drecurrent,
    unprojected, inner, row0, row1, count0, count1, before0, before1, count_before0, count_before1,
    N, B, D, direction, H, CELL: tl.constexpr, HAS_C: tl.constexpr, OWN: tl.constexpr,
    A: tl.constexpr, HAS_DOUTPUT: tl.constexpr, HAS_DCELLS: tl.constexpr,
    HAS_RESETS: tl.constexpr, PROJECTED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradients of the products, of c before the step, and what of that of h does not pass
    through the recurrent product; dh and product make up that of h after the step."""
    d, reverse, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, H, BLOCK_B, BLOCK_H
    )
    row_before = tl.where(reverse, before1, before0).to(tl.int64) + b
    has_before = b < tl.where(reverse, count_before1, count_before0)
    state = (d * B + b)[:, None] * H + j[None, :]
    if PROJECTED:
        dh_all = load(COMPUTE, inner + state, mask)
    else:
        dh_all = load(COMPUTE, dh + state, mask) + load(COMPUTE, product + state, mask)
        if HAS_DOUTPUT:
            at = row[:, None] * (D * H) + d * H + j[None, :]
            dh_all += load(COMPUTE, doutput + at, mask)
    dc_all = dh_all
    if HAS_C:
        dc_all = load(COMPUTE, dc + state, mask)
        if HAS_DCELLS:
            dc_all += load(COMPUTE, dcells + (d * N + row)[:, None] * H + j[None, :], mask)
    k, K = b, B  # rows of h0 and c0
    if HAS_RESETS:
        _, has_before, k = place_of_entry(
            resets, reverse, b, row, count0, count1, before0, before1, count_before0,
            count_before1, B,
        )  # fmt: skip
        K = 2 * B
    _, dh_new, dc_new = step_backward(
        CELL, HAS_C, OWN, A, COMPUTE, output, cells, saved, h0, c0, dgates, drecurrent, unprojected,
        row, row_before, has_before, k, j, d, N, K, D, H, PROJECTED, dh_all, dc_all, mask,
    )  # fmt: skip
    tl.debug_barrier()  # another thread may have read what is written over
    if not PROJECTED:
        store(dh + state, dh_new, mask)
    if HAS_C:
        store(dc + state, dc_new, mask)


@triton.jit(do_not_specialize=VARYING)
def project_backward(
    doutput, product, dh, projected, dprojected, row0, row1, count0, count1, N, B, D, direction, P,
    HAS_DOUTPUT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The whole gradient of h after the step: for the product with W_hr, and for that of W_hr."""
    d, _, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, P, BLOCK_B, BLOCK_H
    )
    state = (d * B + b)[:, None] * P + j[None, :]
    dh_all = load(COMPUTE, dh + state, mask) + load(COMPUTE, product + state, mask)
    if HAS_DOUTPUT:
        at = row[:, None] * (D * P) + d * P + j[None, :]
        dh_all += load(COMPUTE, doutput + at, mask)
    store(projected + state, dh_all, mask)
    store(dprojected + (d * N + row)[:, None] * P + j[None, :], dh_all, mask)
    tl.debug_barrier()  # another thread may have read what is written over
    store(dh + state, tl.zeros_like(dh_all), mask)


@triton.jit(do_not_specialize=VARYING)
def enter_backward(
    resets, output, h0, product, dh, dc, dh0, dc0, before, row0, row1, count0, count1, before0,
    before1, count_before0, count_before1, N, B, D, direction, P, H, HAS_C: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """With resets, after the product: the gradients of states of h0 and c0 that entered the step
    move from dh, product and dc to sums in dh0 and dc0. Keeps the h that entered."""
    d, reverse, b, j, mask, row = place_in_step(
        row0, row1, count0, count1, D, direction, P, BLOCK_B, BLOCK_H
    )
    row_before, carries, k = place_of_entry(
        resets, reverse, b, row, count0, count1, before0, before1, count_before0, count_before1, B
    )
    h = states_before(
        COMPUTE, output, h0, D * P, d * P, row_before, carries, k, j, d, 2 * B, P, mask
    )
    store(before + (d * N + row)[:, None] * P + j[None, :], h, mask)
    enters = (carries == 0)[:, None]
    mask = mask & enters
    at = (d * B + b)[:, None] * P + j[None, :]
    target = (d * 2 * B + k)[:, None] * P + j[None, :]
    dh_all = load(COMPUTE, dh + at, mask) + load(COMPUTE, product + at, mask)
    dh_all = load(COMPUTE, dh0 + target, mask) + dh_all
    tl.debug_barrier()  # another thread may have read what is written over
    store(dh0 + target, dh_all, mask)
    store(dh + at, tl.zeros_like(dh_all), mask)
    store(product + at, tl.zeros_like(dh_all), mask)
    if HAS_C:
        mask = enters & (b < tl.where(reverse, count1, count0))[:, None] & (j < H)[None, :]
        at = (d * B + b)[:, None] * H + j[None, :]
        target = (d * 2 * B + k)[:, None] * H + j[None, :]
        dc_all = load(COMPUTE, dc0 + target, mask) + load(COMPUTE, dc + at, mask)
        tl.debug_barrier()
        store(dc0 + target, dc_all, mask)
        store(dc + at, tl.zeros_like(dc_all), mask)
