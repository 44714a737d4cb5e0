"""A whole net over its input: layers, directions, packing and dropout around ``autograd.layer``.

Dimension key: T time, B batch, N rows of packed data, I input, H hidden, P size of h (H, or
proj_size), G gates, L layers, D directions.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _backend, checks
from .autograd import layer, layer_of
from .checks import LayerSpec


def run(
    spec: LayerSpec, input: Any, weights: Sequence[Tensor], hx: Any, batch_first: bool,
    dropout: float, training: bool,
) -> Any:  # fmt: skip
    """Checks the arguments of a call, brings the data into [T, B, I] or packed rows [N, I], runs
    the layers and brings the results back into the shape of the input."""
    failure = None
    if _is_plain(spec, input, weights, hx):
        try:
            return _plain_layer(spec, input, weights, hx, batch_first)
        except RuntimeError as error:
            failure = error  # raised below, unless the checks name an argument
    checks.layer_weights(spec, weights)
    if isinstance(input, PackedSequence):
        return _packed(spec, input, weights, hx, dropout, training)
    checks.layer_dims(spec, input, hx)
    batched = input.dim() == 3
    if batched and batch_first:
        data = input.transpose(0, 1)
    else:
        data = input if batched else input.unsqueeze(1)
    checks.layer_input(spec, data, weights, packed=False)
    if hx is not None:
        if not batched:
            hx = tuple(s.unsqueeze(1) for s in hx) if spec.has_c else hx.unsqueeze(1)
        checks.layer_state(spec, hx, data.shape[1], data)
    if data.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if failure is not None:
        raise failure
    output, h_n, c_n = _stack(
        spec, data, None, weights, hx, dropout, training, batched and batch_first
    )
    if not batched:
        output, h_n, c_n = output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if spec.has_c else c_n
    return output, (h_n, c_n) if spec.has_c else h_n


def _is_plain(spec: LayerSpec, input: Any, weights: Sequence[Tensor], hx: Any) -> bool:
    """Whether a call is of the simplest kind, one layer over a dense batch on the native kernels,
    whose operator checks the rest."""
    states = () if hx is None else hx if spec.has_c else (hx,)
    return (
        spec.num_layers == 1
        and type(input) is Tensor
        and input.dim() == 3
        and isinstance(states, tuple)
        and len(states) == (0 if hx is None else 1 + spec.has_c)
        and _backend.is_plain_native_on(input, *states, *weights)
        and tuple(map(_SHAPE, weights)) == spec.weight_shapes
    )


_SHAPE = operator.attrgetter("shape")


def _plain_layer(
    spec: LayerSpec, input: Tensor, weights: Sequence[Tensor], hx: Any, batch_first: bool
) -> Any:
    """A call that is plain, without the work of the general path."""
    data = input.transpose(0, 1) if batch_first else input
    h0, c0 = (hx or (None, None)) if spec.has_c else (hx, None)
    direction = 2 if spec.directions == 2 else 0
    output, h_n, c_n = layer_of(
        "native", spec.cell, data, weights, h0, c0, None, spec.directions, direction, batch_first
    )
    return output, (h_n, c_n) if spec.has_c else h_n


def _packed(
    spec: LayerSpec, input: PackedSequence, weights: Sequence[Tensor], hx: Any, dropout: float,
    training: bool,
) -> Any:  # fmt: skip
    data, batch_sizes, sorted_indices, unsorted_indices = input
    checks.packed_batches(spec, input)
    checks.layer_input(spec, data, weights, packed=True)
    batch = _packed_batch(spec, input, hx)
    rows = spec.num_layers * spec.directions
    if hx is None:
        h = data.new_zeros(rows, batch, spec.output_size)
        hx = (h, data.new_zeros(rows, batch, spec.hidden_size)) if spec.has_c else h
    else:
        checks.layer_state(spec, hx, batch, data)
        if sorted_indices is not None:
            states = [s.index_select(1, sorted_indices) for s in (hx if spec.has_c else [hx])]
            hx = tuple(states) if spec.has_c else states[0]
    output, h_n, c_n = _stack(spec, data, batch_sizes, weights, hx, dropout, training)
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
        c_n = c_n.index_select(1, unsorted_indices) if spec.has_c else c_n
    packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return packed, (h_n, c_n) if spec.has_c else h_n


def _packed_batch(spec: LayerSpec, input: PackedSequence, hx: Any) -> int:
    """Rows of the first step. While compiling, values are not there yet: a shape that says the same
    is taken, which the operators compare with ``batch_sizes``."""
    if torch.compiler.is_compiling():
        if input.sorted_indices is not None:
            return input.sorted_indices.shape[0]
        first = hx[0] if spec.has_c and hx is not None else hx
        if isinstance(first, Tensor) and first.dim() == 3:
            return first.shape[1]
    return typing.cast(int, input.batch_sizes[0].item())


def _stack(
    spec: LayerSpec, data: Tensor, batch_sizes: Tensor | None, weights: Sequence[Tensor], hx: Any,
    dropout: float, training: bool, batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All layers over [T, B, I], or [N, I] with ``batch_sizes``: output, h_n, c_n; with
    ``batch_first`` the output is [B, T, D * P], the data is not."""
    cell = spec.cell
    h0, c0 = hx if spec.has_c and hx is not None else (hx, None)
    state_dtype = c_dtype = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(data.device.type):
        # As torch.nn: on a GPU everything takes the autocast dtype. On the CPU GRU and the packed
        # LSTM without projection keep the dtype of their state (without hx: of the input), the
        # others take the autocast dtype; with a projection c_n keeps its own.
        keeps = cell == "gru" or (
            cell == "lstm" and batch_sizes is not None and not spec.proj_size
        )
        if keeps and not data.is_cuda:
            state_dtype = autocast_promoted(data if h0 is None else h0)
        else:
            if spec.proj_size and not data.is_cuda:
                c_dtype = (data if c0 is None else c0).dtype
            state_dtype = autocast_dtype(data)
    if state_dtype is not None:
        data, weights, h0, c0 = cast(state_dtype, data, weights, h0, c0)
    D, L = spec.directions, spec.num_layers
    per_layer = len(weights) // L
    h_n, c_n = [], []
    for i in range(L):
        h, c = (s if s is None or L == 1 else s[i * D : (i + 1) * D] for s in (h0, c0))
        own = weights[i * per_layer : (i + 1) * per_layer]
        direction, last = 2 if D == 2 else 0, i == L - 1
        data, h, c = layer(
            cell, data, own, h, c, batch_sizes, D, direction, batch_first and last
        )
        h_n.append(h)
        c_n.append(c)
        if dropout and training and not last:
            data = F.dropout(data, dropout, True)
    h, c = h_n[0], c_n[0]
    if spec.num_layers > 1:
        h, c = torch.cat(h_n), torch.cat(c_n) if spec.has_c else c
    return data, h, c if c_dtype is None else c.to(c_dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of a tensor: float64 it leaves alone."""
    if tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def autocast_promoted(state: Tensor) -> torch.dtype:
    """The dtype of a state that is combined with products in autocast's dtype."""
    return torch.promote_types(state.dtype, autocast_dtype(state))


def cast(
    dtype: torch.dtype, data: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor], Tensor | None, Tensor | None]:  # fmt: skip
    h0, c0 = (s if s is None else s.to(dtype) for s in (h0, c0))
    return data.to(dtype), [w.to(dtype) for w in weights], h0, c0


__all__ = ["autocast_dtype", "autocast_promoted", "cast", "run"]
