"""The derivative of ``scan``, of any order.

Forward and backward run the operators. A backward pass that is itself differentiated
(``create_graph=True``), or that brings gradients for the saved activations (the backward of such a
pass), runs ``reference.scan_backward``, which is plain PyTorch and differentiable in everything.
The gradients of the weights are products over all time steps at once, after the scan.

Dimension key: see reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops, reference


def scan(
    cell: str,
    gates: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n of ``reference.scan``, on the backend that the tensors and the user's
    choice give, with derivatives."""
    tensors = (gates, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, batch_sizes)
    if torch.compiler.is_compiling():
        return _scan_uncompiled(cell, tensors, direction)
    return _scan(cell, tensors, direction)


def _scan(cell: str, tensors: tuple[Any, ...], direction: int) -> tuple[Tensor, Tensor, Tensor]:
    if _ops.resolve(tensors) == "reference":
        return reference.scan(cell, *tensors, direction)[:3]
    # The kernels read contiguous arrays; these calls return the tensor itself where it is.
    ready = [t if t is None else t.contiguous() for t in tensors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in ready):
        return Scan.apply(cell, *ready, direction)[:3]
    return torch.ops.fastrnn.scan(cell, *ready, direction, False)[:3]


# torch.compile breaks the graph here, as it does at torch.nn's layers.
_scan_uncompiled = torch._disable_dynamo(_scan)


class Scan(Function):
    """``scan`` on the native kernels. Its results c and saved of every step are differentiable
    too, so that a second derivative finds its way back through them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        cell, _, weight_hh, _, _, weight_hr, h0, c0, batch_sizes, direction = arguments
        results = torch.ops.fastrnn.scan(*arguments, True)
        output, _, _, cells, saved = results
        ctx.save_for_backward(weight_hh, weight_hr, h0, c0, batch_sizes, output, cells, saved)
        ctx.cell, ctx.direction = cell, direction
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * 10
        if all(g is None for g in grads):
            return none
        return (*_gradients(ctx, *grads), None, None)


def _gradients(
    ctx: Any,
    doutput: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    dsaved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of cell (None), gates, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0."""
    weight_hh, weight_hr, h0, c0, batch_sizes, output, cells, saved = ctx.saved_tensors
    _, _, for_w_hh, for_b_ih, for_b_hh, for_w_hr, for_h0, for_c0 = ctx.needs_input_grad[:8]
    results = (output, cells, saved, weight_hh, weight_hr, h0, c0, batch_sizes, ctx.direction)
    if torch.is_grad_enabled() or dcells is not None or dsaved is not None:
        computed = reference.scan_backward(ctx.cell, doutput, dh_n, dc_n, dcells, dsaved, *results)
    else:
        incoming = (g if g is None else g.contiguous() for g in (doutput, dh_n, dc_n))
        computed = torch.ops.fastrnn.scan_backward(ctx.cell, *incoming, *results, for_h0, for_c0)
    dgates, drecurrent, dprojected, hidden, dh0, dc0 = computed

    dw_hh = dw_hr = db_ih = db_hh = None
    if for_w_hh:
        dw_hh = _dweight_hh(ctx.cell, dgates, drecurrent, output, h0, batch_sizes, ctx.direction)
    if for_w_hr:  # dW_hr = sum over time of dh (o tanh c)^T
        dw_hr = torch.stack([
            _rows(dprojected, d).T @ _rows(hidden, d) for d in range(dprojected.shape[-2])
        ])  # fmt: skip
    if for_b_ih or for_b_hh:  # db = sum over time and rows of dx, for b_hh of dr
        db_ih = dgates.flatten(0, -3).sum(0)
        db_hh = db_ih
        if drecurrent.shape[-1]:
            own = drecurrent.flatten(0, -3).sum(0)
            db_hh = torch.cat([db_ih[:, : -own.shape[1]], own], 1)
    return (
        None,
        dgates,
        dw_hh,
        db_ih if for_b_ih else None,
        db_hh if for_b_hh else None,
        dw_hr,
        dh0 if for_h0 else None,
        dc0 if for_c0 else None,
    )


def _rows(t: Tensor, d: int) -> Tensor:
    """Group d of [T, B, D, width] or [N, D, width] as [N, width]."""
    return t.select(-2, d).flatten(0, -2)


def _dweight_hh(
    cell: str,
    dgates: Tensor,
    drecurrent: Tensor,
    output: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    direction: int,
) -> Tensor:
    """dW_hh [D, G * H, P] = sum over time of dr_t h_{t-1}^T, where dr is ``drecurrent`` for the
    last R gates and ``dgates`` for the others."""
    shared = dgates.shape[-1] - drecurrent.shape[-1]
    parts = [dgates[..., :shared], drecurrent] if drecurrent.shape[-1] else [dgates]
    groups = dgates.shape[-2]
    gradients = []
    for d in range(groups):
        reverse = reference.reversed_group(d, groups, direction)
        pairs = []  # rows of dr with the rows of h that entered their step
        if batch_sizes is not None and h0 is not None:
            states = torch.cat([_rows(output, d), h0[d]])
            before = states.index_select(0, _rows_before(batch_sizes, reverse).to(states.device))
            pairs.append((slice(None), before))
        else:
            steps = output.shape[0]
            later, earlier = slice(1, None), slice(None, steps - 1)
            if steps > 1 and reverse:
                pairs.append((earlier, _rows(output[later], d)))
            elif steps > 1:
                pairs.append((later, _rows(output[earlier], d)))
            if h0 is not None:
                first = slice(steps - 1, None) if reverse else slice(0, 1)
                pairs.append((first, h0[d]))
        by_gate = []
        for part in parts:
            products = [_rows(part[steps_], d).T @ h for steps_, h in pairs]
            total = products[0] if products else part.new_zeros(part.shape[-1], output.shape[-1])
            by_gate.append(total + products[1] if len(products) > 1 else total)
        gradients.append(torch.cat(by_gate) if len(by_gate) > 1 else by_gate[0])
    return torch.stack(gradients) if groups > 1 else gradients[0].unsqueeze(0)


def _rows_before(batch_sizes: Tensor, reverse: bool) -> Tensor:
    """For each row of packed data, where in [output rows, h0 rows] the h that entered it lies."""
    steps, total = len(batch_sizes), int(batch_sizes.sum())
    offsets = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
    t = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    b = torch.arange(total) - offsets[t]
    t_before = t + 1 if reverse else t - 1
    inside = (t_before >= 0) & (t_before < steps)
    t_before = t_before.clamp(0, steps - 1)
    kept = inside & (b < batch_sizes[t_before])
    return torch.where(kept, offsets[t_before] + b, total + b)


__all__ = ["scan"]
