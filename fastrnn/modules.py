"""``RNN``, ``LSTM`` and ``GRU``: torch.nn's layers on fastrnn's kernels.

They subclass ``torch.nn.RNNBase``, which gives them torch.nn's constructor arguments, parameter
names, initialisation, state dict, pickling and repr. What is fastrnn's own is ``forward``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import checks, layers, stream, swap
from .lengths import lengths_of_mask
from .sequences import Options

if TYPE_CHECKING:
    from ._C import DirectCall


class Layer(nn.RNNBase):
    """What the three layers share."""

    def forward(
        self, input: Any, hx: Any = None, *, resets: Tensor | None = None, reset_hx: Any = None,
        lengths: Tensor | None = None, return_states: bool = False, recompute: bool | int = False,
        mask: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Run the layer over a sequence; see the class for shapes and errors of input and hx.

        Shapes (dimension key of the class; all laid out as the input is):
            * resets bool [T, B], with ``batch_first`` [B, T], unbatched [T], for a PackedSequence
              [N], one of each row of its data
            * reset_hx as hx, of B rows or of one for all
            * lengths integers [B]
            * states.h [L, T, B, D * P] and states.c [L, T, B, D * H]; with ``batch_first``
              [L, B, T, ...], unbatched [L, T, ...], of a PackedSequence [L, N, ...]

        Args:
            resets: True at (t, b) is a boundary between steps t - 1 and t of row b, which no state
                and no gradient passes: the pieces between boundaries run as if alone. In place of
                the state before it, ``reset_hx`` enters step t, and in the reverse direction step
                t - 1. A reset at t = 0 replaces hx of the forward direction. h_n and c_n are the
                states after the last step that a direction runs.
            reset_hx: the state behind a reset, differentiable; zeros by default.
            lengths: steps of each row, 0 to T. Outputs behind them are zeros, without gradient; h_n
                and c_n are the states at each row's end, of a row without steps its hx.
            return_states: whether a third result, ``States(h, c)``, holds the states after every
                step, differentiable; c is None where there is none.
            recompute: whether backward computes again what it needs, in segments of so many steps
                (True: about the square root of T, of few rows more), in place of keeping it for all
                T: for long sequences, at the time of one more forward pass. Cannot be
                differentiated twice.
            mask: lengths as TorchRL's modules give them, bool laid out as resets: True for the
                steps of a row, which must be its first ones.

        Raises:
            TypeError, ValueError, RuntimeError: arguments of wrong type, shape, dtype or device;
                lengths out of range, on the CPU.

        Example::

            >>> layer = fastrnn.GRU(10, 20)
            >>> output, h_n = layer(torch.randn(5, 3, 10), resets=torch.rand(5, 3) < 0.1)
        """
        if mask is not None:
            lengths = lengths_of_mask(
                type(self).__name__, input, mask, lengths, self.batch_first
            )
        if (
            resets is None and reset_hx is None and lengths is None and return_states is False
            and recompute is False
        ):  # fmt: skip
            if (result := self._direct(input, hx)) is not None:
                return result
            options = None
        else:
            options = Options(resets, reset_hx, lengths, return_states, recompute)
        return layers.run(
            self._spec(), input, self._weights(), hx, self.batch_first, self.dropout, self.training,
            options,
        )  # fmt: skip

    def _direct(self, input: Any, hx: Any) -> Any:
        """The sequence without the general path's work; None where that has to run."""
        # Compiling: the operator becomes a node of the graph, in autograd.py.
        if torch.compiler.is_compiling() or self.bidirectional:
            return None
        if type(input) is not Tensor or input.dim() != 3:
            return None
        if self.num_layers > 1 and torch.is_grad_enabled():
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        data = input.transpose(0, 1) if self.batch_first else input
        return stream.run(self, data, hx, None, self.batch_first)

    def step(self, input: Tensor, state: Any = None, out: Any = None) -> tuple[Tensor, Any]:
        """One time step of a stream: the next output and state.

        The same as ``forward`` over a sequence of one step, with little more around the kernels
        than the allocation of the results; a unidirectional net of any number of layers. Call it
        under ``torch.no_grad()`` or ``inference_mode()``: with gradients enabled, on other devices
        and under autocast it runs ``forward``. Weights may change between calls in any way.
        Dropout between layers applies in training mode, as in ``forward``; hooks on ``forward`` run
        only where that does.

        Shapes (B batch, I input_size, H hidden_size, P size of h, L num_layers):
            * input [B, I], or unbatched [I]
            * state as hx of ``forward``: h [L, B, P], for an LSTM (h, c [L, B, H]); default zeros
            * output [B, P] or [P], and the new state, shaped as the state

        Args:
            out: tensors for the new state, which are then returned; may be those of ``state``.

        Raises:
            ValueError: the layer is bidirectional.
            ValueError, RuntimeError, TypeError: arguments of wrong shape, dtype, device or type.

        Example::

            >>> layer, state = fastrnn.LSTM(40, 128), None
            >>> with torch.inference_mode():
            ...     for frame in torch.randn(100, 1, 40):
            ...         output, state = layer.step(frame, state)
        """
        plain = _is_frame(input) and type(self).forward is Layer.forward
        plain = plain and "forward" not in self.__dict__
        result = stream.run(self, input, state, out) if plain else None
        return stream.step(self, self._spec(), input, state, out) if result is None else result

    def _new_direct_call(self) -> DirectCall | None:
        spec, names = self._spec(), self._flat_weights_names
        if spec.directions == 2 or any(name not in self._parameters for name in names):
            return None
        if not stream.can_step(spec, self._weights()):
            return None
        return stream.direct_call(self, spec, names)

    def _spec(self) -> checks.LayerSpec:
        return checks.layer_spec(
            self.mode, self.input_size, self.hidden_size, self.proj_size, self.num_layers,
            self.bidirectional, self.bias,
        )  # fmt: skip

    def _weights(self) -> list[Tensor]:
        """The weights as they are now: Parameters, or what stands in their place (parametrizations,
        functional_call, plain tensors set as attributes)."""
        parameters, names = self._parameters, self._flat_weights_names
        try:
            return [cast(Tensor, parameters[name]) for name in names]
        except KeyError:
            # Kept, as torch.nn keeps them: tensors of an earlier call, with its graph, would stop
            # copy.deepcopy of a parametrized layer.
            self._flat_weights = [getattr(self, name) for name in names]
            return cast(list[Tensor], self._flat_weights)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take the parameters where they are."""

    def to_torch(self) -> nn.Module:
        """An independent ``torch.nn`` layer with equal parameters; see :func:`fastrnn.restore` for
        the change in place."""
        return swap.to_torch(self)


class RNN(Layer):
    r"""Elman RNN, a drop-in for ``torch.nn.RNN``.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    (or ReLU in place of tanh), for each layer and direction.

    Shapes (T time, B batch, I input_size, H hidden_size, L num_layers, D directions):
        * input [T, B, I], with ``batch_first`` [B, T, I], unbatched [T, I], or a PackedSequence
        * hx [L * D, B, H] (unbatched [L * D, H]); zeros by default
        * output [T, B, D * H], laid out as the input; h_n [L * D, B, H]

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
        bidirectional, device, dtype: as in ``torch.nn.RNN``, in its order (``nonlinearity`` is
        the fourth): ``"tanh"`` or ``"relu"``. float32, float64, bfloat16 and float16.

    Raises:
        ValueError, TypeError: wrong constructor arguments, as torch.nn raises them.
        ValueError, RuntimeError, TypeError: in ``forward``, for input or hx of wrong shape, dtype
            or device, and for a PackedSequence that contradicts itself.

    Example::

        >>> layer = fastrnn.RNN(10, 20, num_layers=2)
        >>> output, h_n = layer(torch.randn(5, 3, 10))

    Formula: ``torch.nn.RNN``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__("RNN_" + self.nonlinearity.upper(), *args, **kwargs)


class LSTM(Layer):
    r"""Long short-term memory, a drop-in for ``torch.nn.LSTM``.

    .. math::
        i, f, o &= \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}) \quad
        g = \tanh(W_g x_t + b_{ig} + U_g h_{t-1} + b_{hg}) \\
        c_t &= f \odot c_{t-1} + i \odot g \qquad h_t = o \odot \tanh(c_t)

    for each layer and direction; with ``proj_size`` :math:`h_t = W_{hr} (o \odot \tanh(c_t))`.

    Shapes (T time, B batch, I input_size, H hidden_size, P proj_size or H, L num_layers,
    D directions):
        * input [T, B, I], with ``batch_first`` [B, T, I], unbatched [T, I], or a PackedSequence
        * hx (h [L * D, B, P], c [L * D, B, H]) (unbatched without B); zeros by default
        * output [T, B, D * P], laid out as the input; (h_n, c_n) shaped as hx

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
        device, dtype: as in ``torch.nn.LSTM``, in its order. float32, float64, bfloat16 and
        float16; the 16-bit types keep c in float32 inside.

    Raises:
        as :class:`RNN`.

    Example::

        >>> layer = fastrnn.LSTM(10, 20, bidirectional=True)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))

    Formula: ``torch.nn.LSTM``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(Layer):
    r"""Gated recurrent unit, a drop-in for ``torch.nn.GRU``.

    .. math::
        r, z &= \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}) \\
        n &= \tanh(W_n x_t + b_{in} + r \odot (U_n h_{t-1} + b_{hn})) \qquad
        h_t = (1 - z) \odot n + z \odot h_{t-1}

    for each layer and direction.

    Shapes, arguments (without ``nonlinearity``), errors: as :class:`RNN`.

    Example::

        >>> layer = fastrnn.GRU(10, 20, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 10))

    Formula: ``torch.nn.GRU``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)


def _is_frame(input: Any) -> bool:
    return isinstance(input, Tensor) and input.dim() <= 2


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
