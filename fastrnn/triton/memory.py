"""Where the numbers of a step lie, and a cell's step on them: what all kernels have in common.

Dimension key: csrc/scan.h. A tile is BLOCK_B rows and BLOCK_H hidden units of a group; `mask` tells
which of its elements there are. Arrays: gates [D, room, G, H], the input products of the rows of
some steps; bias [D, G + R, H]; states [D, B, H]; output and doutput [N, D, H]; cells [D, N, H];
saved [D, N, A, H]; dgates, and where R > 0 drecurrent, [D, N, G, H]. Offsets are of 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cells as cell_maths

# Numbers that change from call to call, or from step to step: no kernel is compiled for their
# values. Of the groups that run forward (0) and in reverse (1): the first row and the number of
# rows of a step (row, count), of the step that they run before it (before, count_before), and the
# first row of the chunk of gates (begin). Steps from `first` to `end`; rows of gates: room.
VARYING = (
    "row0", "row1", "count0", "count1", "before0", "before1", "count_before0", "count_before1",
    "begin0", "begin1", "first", "end", "room", "T", "N", "B", "D", "direction",
)  # fmt: skip


@triton.jit
def is_reversed(d, D, direction):
    """direction: 0 forward, 1 reverse, 2 the second half of the groups in reverse."""
    return (direction == 1) | ((direction == 2) & (2 * d >= D))


@triton.jit
def place_in_step(
    row0, row1, count0, count1, D, direction, width, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Of a program of a kernel of one step: group, whether it runs in reverse, rows of the batch,
    columns, those of both that there are, and rows of the data."""
    d = tl.program_id(2).to(tl.int64)
    reverse = is_reversed(d, D, direction)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (b < tl.where(reverse, count1, count0))[:, None] & (j < width)[None, :]
    return d, reverse, b, j, mask, tl.where(reverse, row1, row0).to(tl.int64) + b


@triton.jit
def place_in_sequence(
    PACKED: tl.constexpr, lengths, first, end, T, B, D, direction, BLOCK_B: tl.constexpr
):
    """Of a program of a kernel of a whole sequence: group, whether it runs in reverse, rows of the
    batch, those that there are, their steps, and the steps of [first, end) in which any of them, so
    the first and longest one, takes part."""
    d = tl.program_id(1).to(tl.int64)
    reverse = is_reversed(d, D, direction)
    tile = tl.program_id(0).to(tl.int64) * BLOCK_B
    b = tile + tl.arange(0, BLOCK_B)
    length = tl.zeros([BLOCK_B], tl.int64) + T
    if PACKED:
        length = tl.load(lengths + b, mask=b < B, other=0)
        longest = tl.load(lengths + tile).to(tl.int32)
        first = tl.where(reverse, tl.maximum(first, T - longest), first)
        end = tl.maximum(first, tl.where(reverse, end, tl.minimum(end, longest)))
    return d, reverse, b, b < B, length, first, end


@triton.jit
def first_row(PACKED: tl.constexpr, offsets, t, B):
    """Of the rows of step t."""
    if PACKED:
        row = tl.load(offsets + t)
    else:
        row = t.to(tl.int64) * B
    return row


@triton.jit
def place_of_entry(
    resets, reverse, b, row, count0, count1, before0, before1, count_before0, count_before1, B
):
    """With resets: rows of the step before, whether their states enter this step, and otherwise the
    rows of h0 and c0 whose states do. Codes above 2 count as 2."""
    row_before = tl.where(reverse, before1, before0).to(tl.int64) + b
    has_before = b < tl.where(reverse, count_before1, count_before0)
    has_code = tl.where(reverse, has_before, b < tl.where(reverse, count1, count0))
    at = tl.where(reverse, row_before, row)
    reset = tl.load(resets + at, mask=has_code, other=0)
    return row_before, has_before & (reset == 0), tl.where(reset == 1, B + b, b)


@triton.jit
def load(COMPUTE: tl.constexpr, pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_each(COMPUTE: tl.constexpr, COUNT: tl.constexpr, pointers, H, mask):
    """Tiles that lie H elements apart."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (load(COMPUTE, pointers + k * H, mask),)
    return tiles


@triton.jit
def store(pointers, tile, mask):
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_each(pointers, tiles, H, mask):
    for k in tl.static_range(len(tiles)):
        store(pointers + k * H, tiles[k], mask)


@triton.jit
def add_bias(COMPUTE: tl.constexpr, OWN: tl.constexpr, x, r, bias, H, mask):
    """The first G biases belong to x, the others to the last OWN of r."""
    G: tl.constexpr = len(x)
    b = load_each(COMPUTE, G + OWN, bias, H, mask)
    xs = ()
    for k in tl.static_range(G):
        xs = xs + (x[k] + b[k][None, :],)
    rs = ()
    for k in tl.static_range(G - OWN):
        rs = rs + (r[k],)
    for k in tl.static_range(OWN):
        rs = rs + (r[G - OWN + k] + b[G + k][None, :],)
    return xs, rs


@triton.jit
def step_forward(
    CELL: tl.constexpr, HAS_C: tl.constexpr, OWN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr, COMPUTE: tl.constexpr, gates, bias, cells, saved, row, gates_row, j, d, N,
    room, H, r, h, c, mask,
):  # fmt: skip
    """A step of the units j of a group's rows `row` [BLOCK_B], from the recurrent products and the
    states: h' and c'. Keeps what the backward step needs."""
    G: tl.constexpr = len(r)
    at = (d * room + gates_row)[:, None] * (G * H) + j[None, :]
    x = load_each(COMPUTE, G, gates + at, H, mask)
    if HAS_BIAS:
        x, r = add_bias(COMPUTE, OWN, x, r, bias + d * ((G + OWN) * H) + j, H, j < H)
    h, c, activations = cell_maths.forward(CELL, x, r, h, c)
    if SAVE:
        A: tl.constexpr = len(activations)
        at = (d * N + row)[:, None]
        store_each(saved + at * (A * H) + j[None, :], activations, H, mask)
        if HAS_C:
            store(cells + at * H + j[None, :], c, mask)
    return h, c


@triton.jit
def states_before(
    COMPUTE: tl.constexpr, output, states, stride, offset, row, has_before, b, j, d, B, H, mask
):
    """The states that entered a step: of the rows `row` of the step before in an array over time,
    row r of which begins at r * stride + offset; of rows that begin with this step the initial
    ones."""
    at = row[:, None] * stride + offset + j[None, :]
    earlier = load(COMPUTE, output + at, mask & (has_before != 0)[:, None])
    at = (d * B + b)[:, None] * H + j[None, :]
    initial = load(COMPUTE, states + at, mask & (has_before == 0)[:, None])
    return tl.where((has_before != 0)[:, None], earlier, initial)


@triton.jit
def step_backward(
    CELL: tl.constexpr, HAS_C: tl.constexpr, OWN: tl.constexpr, A: tl.constexpr,
    COMPUTE: tl.constexpr, output, cells, saved, h0, c0, dgates, drecurrent, unprojected, row,
    row_before, has_before, b, j, d, N, B, D, H, PROJECTED: tl.constexpr, dh, dc, mask,
):  # fmt: skip
    """A backward step of the units j of a group's rows `row`, from the gradients of h and c after
    it: dr, and dh and dc before it, without what passes through the recurrent product. Writes the
    gradients of both products, and with a projection the h that went into it."""
    at = (d * N + row)[:, None]
    activations = load_each(COMPUTE, A, saved + at * (A * H) + j[None, :], H, mask)
    h_after = dh
    h_before = dh
    c_after = dc
    c_before = dc
    if HAS_C:
        c_after = load(COMPUTE, cells + at * H + j[None, :], mask)
        c_before = states_before(
            COMPUTE, cells, c0, H, d * N * H, row_before, has_before, b, j, d, B, H, mask
        )
        if PROJECTED:
            hidden = cell_maths.lstm_hidden(activations, c_after)
            store(unprojected + at * H + j[None, :], hidden, mask)
    elif CELL == "gru":
        h_before = states_before(
            COMPUTE, output, h0, D * H, d * H, row_before, has_before, b, j, d, B, H, mask
        )
    else:
        h_after = load(COMPUTE, output + row[:, None] * (D * H) + d * H + j[None, :], mask)
    dx, dr, dh, dc = cell_maths.backward(
        CELL, activations, h_before, c_before, h_after, c_after, dh, dc
    )
    G: tl.constexpr = len(dx)
    store_each(dgates + at * (G * H) + j[None, :], dx, H, mask)
    if OWN > 0:
        store_each(drecurrent + at * (G * H) + j[None, :], dr, H, mask)
    return dr, dh, dc


@triton.jit
def place_before(PACKED: tl.constexpr, offsets, length, t, b, T, B, reverse):
    """The rows of the step that a group runs before step t, and which of them there are."""
    before = tl.where(reverse, t + 1, t - 1)
    has_before = (before >= 0) & (before < length)
    inside = tl.minimum(tl.maximum(before, 0), T - 1)
    return first_row(PACKED, offsets, inside, B) + b, has_before
