"""Recurrent layers and cells as functions.

Dimension key: see layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _backend, checks, layers, reference, sequences
from .autograd import step, step_of
from .sequences import Options


def rnn(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    **options: Any,
) -> Any:
    """Elman RNN: ``h' = act(W_ih x + b_ih + W_hh h + b_hh)``, act = tanh or relu.

    float32, float64, bfloat16 or float16, one dtype for all tensors.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, unbatched [T, I], or a PackedSequence.
        weights: for each layer and direction weight_ih [H, I] (D * H columns above layer 0),
            weight_hh [H, H], and with ``bias`` bias_ih [H] and bias_hh [H]: the parameters of
            ``torch.nn.RNN`` in their order.
        hx: initial state [L * D, B, H] ([L * D, H] unbatched), in the user's order for packed
            input; zeros by default.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        num_layers, bias, batch_first, dropout, bidirectional: as in ``torch.nn.RNN``.
        training: whether ``dropout`` applies.
        options: ``resets``, ``reset_hx``, ``lengths``, ``return_states`` and ``recompute``, as in
            the ``forward`` of :class:`fastrnn.RNN`.

    Returns:
        output [T, B, D * H] (laid out as the input) and h_n [L * D, B, H]; with ``return_states``
        also the states after every step.

    Raises:
        ValueError, RuntimeError, TypeError: arguments of wrong shape, dtype, device or type, as
            torch.nn raises them; also for a PackedSequence that contradicts itself.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return _checked_layers(
        "RNN_" + nonlinearity.upper(), input, weights, hx, num_layers, bias, batch_first, dropout,
        training, bidirectional, 0, options,
    )  # fmt: skip


def lstm(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    proj_size: int = 0,
    **options: Any,
) -> Any:
    """LSTM: with ``[i, f, g, o] = W_ih x + b_ih + W_hh h + b_hh``,
    ``c' = sigmoid(f) c + sigmoid(i) tanh(g)`` and ``h' = sigmoid(o) tanh(c')``, multiplied by
    ``W_hr`` if ``proj_size > 0``.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, unbatched [T, I], or a PackedSequence.
        weights: for each layer and direction weight_ih [4 H, I] (D * P columns above layer 0),
            weight_hh [4 H, P], with ``bias`` bias_ih [4 H] and bias_hh [4 H], with ``proj_size``
            weight_hr [P, H]: the parameters of ``torch.nn.LSTM`` in their order.
        hx: initial states h [L * D, B, P] and c [L * D, B, H]; zeros by default.
        num_layers, bias, batch_first, dropout, bidirectional, proj_size: as in ``torch.nn.LSTM``.
        training: whether ``dropout`` applies.
        options: as in :func:`rnn`.

    Returns:
        output [T, B, D * P] (laid out as the input) and (h_n [L * D, B, P], c_n [L * D, B, H]).

    Raises:
        as :func:`rnn`.
    """
    return _checked_layers(
        "LSTM", input, weights, hx, num_layers, bias, batch_first, dropout, training,
        bidirectional, proj_size, options,
    )  # fmt: skip


def gru(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    **options: Any,
) -> Any:
    """GRU: with ``x = W_ih x + b_ih`` and ``u = W_hh h + b_hh`` cut into r, z, n:
    ``r = sigmoid(x_r + u_r)``, ``z = sigmoid(x_z + u_z)``, ``n = tanh(x_n + r u_n)``,
    ``h' = (1 - z) n + z h``.

    Arguments, results and errors as :func:`rnn`, with weights of 3 H rows: the parameters of
    ``torch.nn.GRU`` in their order.
    """
    return _checked_layers(
        "GRU", input, weights, hx, num_layers, bias, batch_first, dropout, training, bidirectional,
        0, options,
    )  # fmt: skip


def _checked_layers(
    mode: str, input: Any, weights: Sequence[Tensor], hx: Any, num_layers: int, bias: bool,
    batch_first: bool, dropout: float, training: bool, bidirectional: bool, proj_size: int,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """``layers.run`` for weights that do not come from a module."""
    weights = list(weights)
    if num_layers < 1 or not 0 <= dropout <= 1 or proj_size < 0:
        raise ValueError(
            "expected num_layers > 0, 0 <= dropout <= 1 and proj_size >= 0, "
            f"got {num_layers}, {dropout} and {proj_size}"
        )
    if not weights or any(not isinstance(w, Tensor) for w in weights) or weights[0].dim() != 2:
        raise ValueError(f"{mode}: weights must be a sequence of tensors, a matrix first")
    rows, input_size = weights[0].shape
    gates = checks.layer_spec(mode, 1, 1, 0, 1, False, True).gates
    spec = checks.layer_spec(
        mode, input_size, rows // gates, proj_size, num_layers, bidirectional, bool(bias)
    )
    unknown = [name for name in options if name not in Options._fields]
    if unknown:
        raise TypeError(f"{spec.cell}: unexpected keyword argument '{unknown[0]}'")
    return layers.run(
        spec, input, weights, hx, batch_first, dropout, training,
        Options(**options) if options else None,
    )


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
    reset_hx: Tensor | None = None,
) -> Tensor:
    """One step of :func:`rnn`, ``h' = act(W_ih x + b_ih + W_hh h + b_hh)``: input [B, I] or [I],
    hx [B, H] or [H] (None: zeros) -> h'; weight_ih [H, I], weight_hh [H, H], biases [H]. ``reset``,
    bool [B] or []: rows of hx that those of ``reset_hx`` (as hx; zeros by default) replace first.

    Raises:
        ValueError, RuntimeError: arguments of wrong shape, dtype or device, as torch.nn raises.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    cell = "rnn_" + nonlinearity
    hx = sequences.entering_cell("RNNCell", input, hx, reset, reset_hx)
    return _cell("RNNCell", cell, input, hx, weight_ih, weight_hh, bias_ih, bias_hh)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reset_hx: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`, by its formula: input [B, I] or [I], hx (h, c) [B, H] or [H] (None:
    zeros) -> (h', c'); weight_ih [4 H, I], weight_hh [4 H, H], biases [4 H]. ``reset`` and
    ``reset_hx``: as of :func:`rnn_cell`.

    Raises:
        ValueError, RuntimeError, TypeError: arguments of wrong shape, dtype, device or type, as
            torch.nn raises.
    """
    hx = sequences.entering_cell("LSTMCell", input, hx, reset, reset_hx)
    return _cell("LSTMCell", "lstm", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reset_hx: Tensor | None = None,
) -> Tensor:
    """One step of :func:`gru`, by its formula: input [B, I] or [I], hx [B, H] or [H] (None: zeros)
    -> h'; weight_ih [3 H, I], weight_hh [3 H, H], biases [3 H]. ``reset`` and ``reset_hx``: as of
    :func:`rnn_cell`.

    Raises:
        ValueError, RuntimeError: arguments of wrong shape, dtype or device, as torch.nn raises.
    """
    hx = sequences.entering_cell("GRUCell", input, hx, reset, reset_hx)
    return _cell("GRUCell", "gru", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)[0]


def _cell(
    name: str, cell: str, input: Tensor, hx: Any, weight_ih: Tensor, weight_hh: Tensor,
    bias_ih: Tensor | None, bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer over one step: h' and c'."""
    lstm_like = name == "LSTMCell"
    biases = [bias_ih, bias_hh]
    weights: Sequence[Any] = [weight_ih, weight_hh, *(b for b in biases if b is not None)]
    own = hx if lstm_like else (hx,)
    failure = None
    if (
        isinstance(own, tuple)
        and len(own) == 1 + lstm_like
        and len(weights) != 3
        and _backend.is_plain_native_on(input, *own, *weights)
        and input.dim() == 2
    ):
        try:
            return step_of("native", cell, input, weights, *(*own, None)[:2])
        except RuntimeError as error:
            failure = error  # raised below, unless the checks name an argument
    if lstm_like and isinstance(hx, Tensor):
        raise TypeError("LSTMCell: hx must be a tuple (h, c) of Tensors, not a Tensor")
    checks.cell_dims(name, input, hx)
    if lstm_like and hx is not None and len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states, got {len(hx)}")
    states: list[Tensor | None] = [None, None] if hx is None else [*hx] if lstm_like else [hx, None]
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        states = [s if s is None else s.unsqueeze(0) for s in states]
    gates = reference.CELLS[cell].gates
    checks.cell_arguments(name, input, states, weight_ih, weight_hh, biases, gates)
    if failure is not None:
        raise failure
    state_dtype = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
        state_dtype = layers.autocast_promoted(input if states[0] is None else states[0])
        if name == "RNNCell" or input.is_cuda:
            state_dtype = layers.autocast_dtype(input)
    h, c = states
    if state_dtype is not None:
        input, weights, h, c = layers.cast(state_dtype, input, weights, h, c)
    h, c = step(cell, input, weights, h, c)
    return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]
