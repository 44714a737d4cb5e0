"""``RNNCell``, ``LSTMCell`` and ``GRUCell``: one time step, as torch.nn's cells.

They subclass ``torch.nn.RNNCellBase``, which gives them torch.nn's parameters, initialisation,
state dict and repr. What is fastrnn's own is ``forward``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from . import checks, functional, sequences, stream, swap

if TYPE_CHECKING:
    from ._C import DirectCall

Device = torch.device | str | int | None


class _Cell(RNNCellBase):
    """What the three cells share."""

    _mode: str  # of the layer with the same cell

    def to_torch(self) -> nn.Module:
        """An independent ``torch.nn`` cell with equal parameters."""
        return swap.to_torch(self)

    def _stepped(self, input: Any, hx: Any) -> Any:
        """The call as a step of a layer, without gradients; None where the general
        path has to run, or to say what is wrong."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if type(input) is not Tensor or input.dim() != 2 or not len(input):
            return None
        if isinstance(hx, Tensor):
            state: Any = hx.unsqueeze(0)
        elif isinstance(hx, tuple) and all(isinstance(s, Tensor) for s in hx):
            state = tuple(s.unsqueeze(0) for s in hx)
        elif hx is None:
            state = None
        else:
            return None
        result = stream.run(self, input, state)
        if result is None:
            return None
        new = result[1]
        # In place: results that are views could not be detached or changed in place.
        return tuple(s.squeeze_(0) for s in new) if isinstance(new, tuple) else new.squeeze_(0)

    def _new_direct_call(self) -> DirectCall | None:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        mode = self._mode
        if mode == "RNN":
            nonlinearity = cast(str, self.nonlinearity)
            if nonlinearity not in ("tanh", "relu"):
                return None
            mode = f"RNN_{nonlinearity.upper()}"
        spec = checks.layer_spec(
            mode, self.input_size, self.hidden_size, 0, 1, False, bool(self.bias)
        )
        weights = [self._parameters.get(name) for name in names]
        found = [w for w in weights if w is not None]
        if len(found) < len(names) or not stream.can_step(spec, found):
            return None
        return stream.direct_call(self, spec, names)


class RNNCell(_Cell):
    r"""One step of an Elman RNN, a drop-in for ``torch.nn.RNNCell``.

    .. math:: h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    (or ReLU in place of tanh).

    Shapes (B batch, I input_size, H hidden_size): input [B, I] or [I]; hx [B, H] or [H], zeros by
    default; result h' [B, H] or [H].

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in ``torch.nn.RNNCell``.

    Raises:
        ValueError, RuntimeError: in ``forward``, for arguments of wrong shape, dtype or device and
            for an unknown nonlinearity, as torch.nn raises them.

    Example::

        >>> h = fastrnn.RNNCell(10, 20)(torch.randn(3, 10))
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012
    _mode = "RNN"
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None,
        reset_hx: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The next state; see the class for shapes and errors. ``reset``, bool [B]: rows of hx that
        those of ``reset_hx`` (as hx; zeros by default) replace before the step."""
        hx = sequences.entering_cell(self._mode + "Cell", input, hx, reset, reset_hx)
        if (stepped := self._stepped(input, hx)) is not None:
            return cast(Tensor, stepped)
        return functional.rnn_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh,
            nonlinearity=self.nonlinearity,
        )  # fmt: skip


class LSTMCell(_Cell):
    r"""One step of an LSTM, a drop-in for ``torch.nn.LSTMCell``.

    .. math::
        i, f, o &= \sigma(W x + b_{ih} + U h + b_{hh}) \quad
        g = \tanh(W_g x + b_{ig} + U_g h + b_{hg}) \\
        c' &= f \odot c + i \odot g \qquad h' = o \odot \tanh(c')

    Shapes (B batch, I input_size, H hidden_size): input [B, I] or [I]; hx (h, c), each [B, H] or
    [H], zeros by default; result (h', c') shaped as hx.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``torch.nn.LSTMCell``.

    Raises:
        ValueError, RuntimeError, TypeError: in ``forward``, for arguments of wrong shape, dtype,
            device or type, as torch.nn raises them.

    Example::

        >>> h, c = fastrnn.LSTMCell(10, 20)(torch.randn(3, 10))
    """

    _mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *,
        reset: Tensor | None = None, reset_hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The next state; see the class for shapes and errors. ``reset``: as of :class:`RNNCell`'s
        ``forward``."""
        hx = sequences.entering_cell("LSTMCell", input, hx, reset, reset_hx)
        if (stepped := self._stepped(input, hx)) is not None:
            return cast(tuple[Tensor, Tensor], stepped)
        return functional.lstm_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )


class GRUCell(_Cell):
    r"""One step of a GRU, a drop-in for ``torch.nn.GRUCell``.

    The formula of :class:`fastrnn.GRU` for one step. Shapes, arguments (without ``nonlinearity``)
    and errors: as :class:`RNNCell`.

    Example::

        >>> h = fastrnn.GRUCell(10, 20)(torch.randn(3, 10))
    """

    _mode = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None,
        reset_hx: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The next state; see the class for shapes and errors. ``reset``, bool [B]: rows of hx that
        those of ``reset_hx`` (as hx; zeros by default) replace before the step."""
        hx = sequences.entering_cell(self._mode + "Cell", input, hx, reset, reset_hx)
        if (stepped := self._stepped(input, hx)) is not None:
            return cast(Tensor, stepped)
        return functional.gru_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )


__all__: list[Any] = ["GRUCell", "LSTMCell", "RNNCell"]
