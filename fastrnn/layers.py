"""A whole net over its input: layers, directions, packing and dropout around ``autograd.layer``.

Dimension key: T time, B batch, N rows of packed data, I input, H hidden, P size of h (H, or
proj_size), G gates, L layers, D directions.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _backend, checks, lengths, sequences
from .autograd import layer, layer_of
from .checks import LayerSpec
from .sequences import Boundaries, Options, States


def run(
    spec: LayerSpec, input: Any, weights: Sequence[Tensor], hx: Any, batch_first: bool,
    dropout: float, training: bool, options: Options | None = None,
) -> Any:  # fmt: skip
    """Checks the arguments of a call, brings the data into [T, B, I] or packed rows [N, I], runs
    the layers and brings the results back into the shape of the input."""
    failure = None
    if options is None and _is_plain(spec, input, weights, hx):
        try:
            return _plain_layer(spec, input, weights, hx, batch_first)
        except RuntimeError as error:
            failure = error  # raised below, unless the checks name an argument
    options = options or Options()
    checks.layer_weights(spec, weights)
    recompute = sequences.recompute_of(spec, options)
    net = Net(spec, weights, dropout, training, options.return_states, recompute)
    if isinstance(input, PackedSequence):
        return _packed(net, input, hx, options)
    checks.layer_dims(spec, input, hx)
    batched = input.dim() == 3
    if batched and batch_first:
        data = input.transpose(0, 1)
    else:
        data = input if batched else input.unsqueeze(1)
    checks.layer_input(spec, data, weights, packed=False)
    if not batched:
        hx, options = batched_state(spec, hx), sequences.batched(spec, options)
    if hx is not None:
        checks.layer_state(spec, hx, data.shape[1], data)
    if data.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if failure is not None:
        raise failure
    batch_first = batched and batch_first
    boundaries = sequences.boundaries_of(spec, options, data, data.shape[1], batch_first)
    if options.lengths is not None:
        output, h_n, c_n, states = lengths.run(net, data, hx, boundaries, options.lengths)
        output = output.transpose(0, 1) if batch_first else output
    else:
        output, h_n, c_n, states = net.run(data, None, hx, boundaries, batch_first)
    if states is not None and batch_first:
        states = states.map(lambda s: s.transpose(1, 2))
    if not batched:
        output, h_n, c_n = output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if spec.has_c else c_n
        states = states and states.map(lambda s: s.squeeze(2))
    return results_of(spec, output, h_n, c_n, states)


def batched_state(spec: LayerSpec, hx: Any) -> Any:
    """The state of an unbatched call as that of a batch of one row."""
    if hx is None:
        return None
    return tuple(s.unsqueeze(1) for s in hx) if spec.has_c else hx.unsqueeze(1)


def results_of(
    spec: LayerSpec, output: Any, h_n: Tensor, c_n: Tensor, states: States | None
) -> Any:
    """What ``forward`` returns."""
    hx = (h_n, c_n) if spec.has_c else h_n
    return (output, hx) if states is None else (output, hx, states)


def _is_plain(spec: LayerSpec, input: Any, weights: Sequence[Tensor], hx: Any) -> bool:
    """Whether a call is of the simplest kind, one layer over a dense batch on the native kernels,
    whose operator checks the rest."""
    states = () if hx is None else hx if spec.has_c else (hx,)
    return (
        spec.num_layers == 1
        and type(input) is Tensor
        and input.dim() == 3
        and input.shape[-1] == spec.input_size
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


def _packed(net: Net, input: PackedSequence, hx: Any, options: Options) -> Any:
    spec = net.spec
    data, batch_sizes, sorted_indices, unsorted_indices = input
    checks.packed_batches(spec, input)
    checks.layer_input(spec, data, net.weights, packed=True)
    if options.lengths is not None:
        raise ValueError(f"{spec.name}: lengths were given beside those of a PackedSequence")
    batch = _packed_batch(spec, input, hx)
    boundaries = sequences.boundaries_of(spec, options, data, batch, batch_first=False)
    rows = spec.num_layers * spec.directions
    if hx is None:
        h = data.new_zeros(rows, batch, spec.output_size)
        hx = (h, data.new_zeros(rows, batch, spec.hidden_size)) if spec.has_c else h
    else:
        checks.layer_state(spec, hx, batch, data)
    if sorted_indices is not None:
        states = [s.index_select(1, sorted_indices) for s in (hx if spec.has_c else [hx])]
        hx = tuple(states) if spec.has_c else states[0]
        if boundaries is not None:
            boundaries = boundaries.of_rows(sorted_indices)
    output, h_n, c_n, kept = net.run(data, batch_sizes, hx, boundaries)
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
        c_n = c_n.index_select(1, unsorted_indices) if spec.has_c else c_n
    packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return results_of(spec, packed, h_n, c_n, kept)


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


class Net(NamedTuple):
    """All layers of a call."""

    spec: LayerSpec
    weights: Sequence[Tensor]
    dropout: float
    training: bool
    return_states: bool = False
    recompute: bool | int = False

    def run(
        self, data: Tensor, batch_sizes: Tensor | None, hx: Any,
        boundaries: Boundaries | None = None, batch_first: bool = False, is_padded: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, States | None]:  # fmt: skip
        """Over [T, B, I], or [N, I] with ``batch_sizes``: output, h_n, c_n and the states if they
        are returned; with ``batch_first`` the output is [B, T, D * P], the data and the states are
        not. ``is_padded``: the user gave packed data as [T, B, I]."""
        spec, weights = self.spec, self.weights
        h0, c0 = hx if spec.has_c and hx is not None else (hx, None)
        is_packed = batch_sizes is not None and not is_padded
        state_dtype, c_dtype = self.autocast_dtypes(data, is_packed, h0, c0)
        if state_dtype is not None:
            data, weights, h0, c0 = cast(state_dtype, data, weights, h0, c0)
            boundaries = boundaries and boundaries.to(state_dtype)
        D, L = spec.directions, spec.num_layers
        direction = 2 if D == 2 else 0
        keep_cells = self.return_states and spec.has_c
        codes = None if boundaries is None else boundaries.codes
        per_layer = len(weights) // L
        h_n, c_n, h_all, c_all = [], [], [], []
        for i in range(L):
            h, c = sequences.entering(boundaries, (h0, c0), i * D, (i + 1) * D)
            own = weights[i * per_layer : (i + 1) * per_layer]
            last = i == L - 1
            data, h, c, *cells = layer(
                spec.cell, data, own, h, c, batch_sizes, D, direction,
                batch_first and last, codes, keep_cells, self.recompute,
            )  # fmt: skip
            h_n.append(h)
            c_n.append(c)
            if self.return_states:
                output = data.transpose(0, 1) if batch_first and last else data
                h_all.append(output)
                c_all += [sequences.states_over_time(t, output, D) for t in cells]
            if self.dropout and self.training and not last:
                data = F.dropout(data, self.dropout, True)
        h, c = h_n[0], c_n[0]
        if L > 1:
            h, c = torch.cat(h_n), torch.cat(c_n) if spec.has_c else c
        states = None
        if self.return_states:
            states = States(torch.stack(h_all), torch.stack(c_all) if keep_cells else None)
        return data, h, c if c_dtype is None else c.to(c_dtype), states

    def autocast_dtypes(
        self, data: Tensor, is_packed: bool, h0: Tensor | None, c0: Tensor | None = None
    ) -> tuple[torch.dtype | None, torch.dtype | None]:
        """The dtype of the layers under autocast, and that of c_n where it is another; None, None
        without autocast.

        As torch.nn: on a GPU everything takes the autocast dtype. On the CPU GRU and the packed
        LSTM without projection keep the dtype of their state (without hx: of the input), the others
        take the autocast dtype; with a projection c_n keeps its own."""
        if not torch._C._is_any_autocast_enabled():
            return None, None
        if not torch.is_autocast_enabled(data.device.type):
            return None, None
        spec = self.spec
        keeps = spec.cell == "gru" or (spec.cell == "lstm" and is_packed and not spec.proj_size)
        if keeps and not data.is_cuda:
            return autocast_promoted(data if h0 is None else h0), None
        of_c = (data if c0 is None else c0).dtype if spec.proj_size and not data.is_cuda else None
        return autocast_dtype(data), of_c


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


__all__ = ["Net", "autocast_dtype", "autocast_promoted", "cast", "run"]
