"""Rows of different lengths in padded data [T, B, I], in any order.

On the CPU the steps that exist are packed, so that no others are computed. Elsewhere, and where
values cannot be looked at (torch.compile, torch.func), all steps run, padding as zeros; a boundary
at each row's end lets the reverse direction begin there, and the states of the forward direction
are taken from the steps in which the rows end. Nothing waits for the device.

Dimension key: see layers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import _backend, _ops, modes
from .checks import LayerSpec
from .reference import RESTART
from .sequences import Boundaries, States

if TYPE_CHECKING:
    from .layers import Net

Results = tuple[Tensor, Tensor, Tensor, States | None]


def run(
    net: Net, data: Tensor, hx: Any, boundaries: Boundaries | None, lengths: Tensor
) -> Results:
    """``net.run`` over rows of these lengths: output [T, B, D * P], zeros behind each row's end."""
    _check(net.spec, data, lengths)
    if data.is_cpu and not _is_symbolic(data):
        _check_values(net.spec, data, lengths)
        return _packed(net, data, hx, boundaries, lengths.cpu())
    return _masked(net, data, hx, boundaries, lengths.to(data.device))


def lengths_of_mask(
    name: str, input: Any, mask: Tensor, lengths: Tensor | None, batch_first: bool
) -> Tensor:
    """The lengths of rows whose steps a mask marks, bool [T, B] or [B, T]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: mask must be a bool tensor, got {kind}")
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise ValueError(f"{name}: mask needs an input of 3 dimensions")
    if mask.shape != input.shape[:2]:
        raise ValueError(
            f"{name}: mask must have shape {tuple(input.shape[:2])}, got {tuple(mask.shape)}"
        )
    if lengths is not None:
        raise ValueError(f"{name}: lengths and mask were given")
    over_time = mask.transpose(0, 1) if batch_first else mask
    if mask.is_cpu and not _is_symbolic(mask) and (over_time[1:] & ~over_time[:-1]).any():
        raise ValueError(f"{name}: mask must mark the first steps of each row, without gaps")
    return over_time.sum(0)


def _is_symbolic(tensor: Tensor) -> bool:
    """Whether there are no values to look at."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or modes.is_traced()
        or isinstance(tensor, FakeTensor)
        or get_proxy_mode() is not None  # make_fx
    )


def _check(spec: LayerSpec, data: Tensor, lengths: Any) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{spec.name}: lengths must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{spec.name}: lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (data.shape[1],):
        raise ValueError(
            f"{spec.name}: lengths must have shape ({data.shape[1]},), got {tuple(lengths.shape)}"
        )


def _check_values(spec: LayerSpec, data: Tensor, lengths: Tensor) -> None:
    if lengths.numel() == 0:
        return
    least, most = map(int, lengths.aminmax())
    if least < 0 or most > data.shape[0]:
        raise ValueError(
            f"{spec.name}: lengths must be 0 to {data.shape[0]}, the steps of the input, "
            f"got {least} to {most}"
        )


def _packed(
    net: Net, data: Tensor, hx: Any, boundaries: Boundaries | None, lengths: Tensor
) -> Results:
    spec, (steps, batch) = net.spec, data.shape[:2]
    by_row = data.stride(0) < data.stride(1)  # as it lies in memory, [B, T, I]
    hx = initial(spec, data, hx)
    lengths, order = lengths.long().sort(descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    if len(order) == 0:
        return _nothing(net, data, hx)
    t = torch.arange(int(lengths[0]), device=data.device)[:, None]
    exists = lengths[: len(order)] > t
    rows = (order * steps + t if by_row else t * batch + order)[exists]
    places = rows.new_full([steps * batch], len(rows))
    places[rows] = torch.arange(len(rows), device=data.device)

    def flat(padded: Tensor) -> Tensor:
        return (padded.transpose(0, 1) if by_row else padded).flatten(0, 1)

    def padded(packed: Tensor) -> Tensor:
        whole: Tensor = _SelectedRows.apply(packed, places, rows)
        if by_row:
            return whole.unflatten(-2, (batch, steps)).transpose(-2, -3)
        return whole.unflatten(-2, (steps, batch))

    if boundaries is not None:
        codes = flat(boundaries.codes).index_select(0, rows)
        boundaries = Boundaries(codes, boundaries.states).of_rows(order)
    own = tuple(s.index_select(1, order) for s in hx)
    output, h_n, c_n, states = net.run(
        _SelectedRows.apply(flat(data), rows, places), exists.sum(1),
        own if spec.has_c else own[0], boundaries, is_padded=True,
    )  # fmt: skip

    if states is not None:
        states = states.map(padded)
    last = [
        s.to(n.dtype).index_copy(1, order, n)
        for s, n in zip(hx, (h_n, c_n), strict=False)
    ]
    return padded(output), last[0], last[1] if spec.has_c else c_n, states


class _SelectedRows(Function):
    """Arguments: t [..., n, width], the rows of t in their new order, and which rows of the result
    those of t are. Rows that do not exist are zeros, their index is the number of those that do.

    Each row is there at most once: its gradient is read where a sum over an index would add."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.save_for_forward(index)
        return _select_rows(t, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _select_rows(grad, ctx.saved_tensors[1]), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _select_rows(tangent, ctx.saved_tensors[0])


def _select_rows(t: Tensor, index: Tensor) -> Tensor:
    is_plain = not torch.is_grad_enabled() and not modes.is_transformed([t])
    if is_plain and _backend.is_plain_native_on(t):
        made: Tensor | None = _ops.select_rows(_ops.python_tensors, t.contiguous(), index)
        if made is not None:
            return made
    if len(index) > t.shape[-2]:  # only then are there rows that do not exist
        t = F.pad(t, (0, 0, 0, 1))
    return t.index_select(-2, index)


def initial(spec: LayerSpec, data: Tensor, hx: Any) -> tuple[Tensor, ...]:
    """hx, or zeros: (h [L * D, B, P],) or (h, c [L * D, B, H])."""
    if hx is not None:
        return tuple(hx) if spec.has_c else (hx,)
    sizes = (spec.output_size, spec.hidden_size)[: 1 + spec.has_c]
    rows = spec.num_layers * spec.directions
    return tuple(data.new_zeros(rows, data.shape[1], size) for size in sizes)


def _nothing(net: Net, data: Tensor, hx: tuple[Tensor, ...]) -> Results:
    """No row has a step."""
    spec = net.spec
    lead, D = data.shape[:2], spec.directions
    dtype, c_dtype = net.autocast_dtypes(data, False, *hx)
    # Part of the graph nevertheless, as if rows had run: the gradients are zeros.
    zero = torch.stack([t.reshape(-1)[:0].sum() for t in (data, *net.weights)]).sum()
    zero = zero.to(dtype or data.dtype)
    output = zero.expand(*lead, D * spec.output_size).clone()
    h_n = hx[0].to(zero.dtype) + zero
    c_n = hx[1].to(c_dtype or zero.dtype) + zero if spec.has_c else data.new_empty(0)
    states = None
    if net.return_states:
        c = zero.expand(spec.num_layers, *lead, D * spec.hidden_size).clone()
        states = States(output.expand(spec.num_layers, *output.shape).clone(), None)
        states = states._replace(c=c) if spec.has_c else states
    return output, h_n, c_n, states


def _masked(
    net: Net, data: Tensor, hx: Any, boundaries: Boundaries | None, lengths: Tensor
) -> Results:
    spec, steps = net.spec, data.shape[0]
    if net.recompute:  # a segment does not know the initial state, which a boundary restarts from
        raise RuntimeError(
            f"{spec.name}: recompute beside lengths is possible on the CPU only, "
            f"got data on {data.device.type}: pack the sequences"
        )
    lengths = lengths.long()  # before they are compared: 8 bits do not hold every T
    is_wrong = (lengths < 0) | (lengths > steps)
    lengths = lengths.clamp(0, steps)
    t = torch.arange(steps, device=data.device)[:, None]
    exists = (t < lengths)[..., None]
    hx = initial(spec, data, hx)
    codes = torch.where(t == lengths, RESTART, 0 if boundaries is None else boundaries.codes)
    boundaries = Boundaries(codes.to(torch.uint8), boundaries and boundaries.states)
    keeping = net._replace(return_states=True)
    output, h_n, c_n, states = keeping.run(
        data.masked_fill(~exists, 0), None, hx if spec.has_c else hx[0], boundaries
    )
    assert states is not None
    wrong = is_wrong[:, None]

    def ended(state: Tensor, last: Tensor, over_time: Tensor) -> Tensor:
        """At each row's end: of the forward direction the state of its last step."""
        D = spec.directions
        width = last.shape[-1]
        forward = over_time.unflatten(-1, (D, width))[..., 0, :]  # [L, T, B, width]
        at = (lengths - 1).clamp(min=0)[None, None, :, None].expand(len(forward), 1, -1, width)
        found = last.unflatten(0, (-1, D))
        own = torch.cat([forward.gather(1, at), found[:, 1:]], 1).flatten(0, 1)
        own = torch.where((lengths > 0)[:, None], own, state.to(own.dtype))
        return own.masked_fill(wrong, float("nan"))

    last = [
        ended(s, n, over)
        for s, n, over in zip(hx, (h_n, c_n), [s for s in states if s is not None], strict=False)
    ]
    kept = None
    if net.return_states:
        kept = states.map(lambda s: _zeros_behind(s, exists, wrong))
    output = _zeros_behind(output, exists, wrong)
    return output, last[0], last[1] if spec.has_c else c_n, kept


def _zeros_behind(states: Tensor, exists: Tensor, is_wrong: Tensor) -> Tensor:
    """[..., T, B, width]: zeros behind each row's end, NaN in rows of impossible lengths."""
    return states.masked_fill(~exists, 0).masked_fill(is_wrong, float("nan"))
