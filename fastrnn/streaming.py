"""``Stream``: a layer fed chunk by chunk, which keeps the state of every row between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Stream:
    """A unidirectional layer over sequences that arrive in chunks of any sizes, from one step on.

    The outputs of the chunks, one after the other, are those of one call over all of them: the
    state that a chunk leaves enters the next. It is detached in between, so that training by
    chunks is truncated back-propagation through time: ``loss(stream(chunk)).backward()`` for each.

    Shapes (T time, B batch, I input_size, D * P output, of the layer):
        * input of a call [T, B, I] ([B, T, I] with ``batch_first``, unbatched [T, I]), or one step
          ``stream.step``: [B, I] or [I]
        * state as hx of the layer, None before the first call

    Args:
        layer: a ``fastrnn.RNN``, ``LSTM`` or ``GRU``, not bidirectional.
        state: the state to begin with; zeros by default.

    Raises:
        TypeError, ValueError: the layer is none of these, or bidirectional.

    Example::

        >>> stream = fastrnn.Stream(fastrnn.GRU(40, 128))
        >>> with torch.inference_mode():
        ...     first = stream(torch.randn(7, 2, 40))
        ...     stream.reset([1])  # the second row begins anew
        ...     frame = stream.step(torch.randn(2, 40))
    """

    def __init__(self, layer: Any, state: Any = None) -> None:
        if not hasattr(layer, "step") or not hasattr(layer, "bidirectional"):
            kind = type(layer).__name__
            raise TypeError(f"Stream: expected a fastrnn.RNN, LSTM or GRU, got {kind}")
        if layer.bidirectional:
            raise ValueError("Stream: a bidirectional layer needs the whole sequence")
        self.layer = layer
        self.state = state

    def __call__(self, input: Tensor, **options: Any) -> Any:
        """The output of the layer over a chunk; ``options``: those of its ``forward``, of which
        ``return_states`` adds the states as a second result."""
        output, state, *states = self.layer(input, self.state, **options)
        self.state = _detached(state)
        return (output, *states) if states else output

    def step(self, input: Tensor) -> Tensor:
        """The output of one time step: ``layer.step``."""
        output, state = self.layer.step(input, self.state)
        self.state = _detached(state)
        return output

    def reset(self, rows: Tensor | Sequence[int] | None = None, state: Any = None) -> None:
        """Let rows begin anew: indices, or a bool tensor [B]; all by default.

        Args:
            state: what they begin with, laid out as the stream's state of these rows (or of one
                row); zeros by default.

        Raises:
            IndexError, ValueError, RuntimeError: rows that there are not, or a state of other
                shape.
        """
        if rows is None:
            self.state = state
            return
        if self.state is None:
            if state is not None:
                raise ValueError("Stream: there are no rows yet, reset all of them with rows=None")
            return
        own = _states(self.state)
        if own[0].dim() == 2:
            raise ValueError("Stream: a stream without batch has no rows, reset it with rows=None")
        index = torch.as_tensor(rows, device=own[0].device)
        if index.dtype != torch.bool and index.numel() == 0:
            return
        if index.dtype not in (torch.bool, torch.int64, torch.int32) or index.dim() > 1:
            raise ValueError(
                f"Stream: rows must be indices or a bool tensor [B], got {index.dtype} of shape "
                f"{tuple(index.shape)}"
            )
        index = index.reshape(-1)
        new = [s.clone() for s in own]
        for target, value in zip(new, self._behind_reset(own, index, state), strict=True):
            target[:, index] = value
        self.state = tuple(new) if len(new) == 2 else new[0]

    @staticmethod
    def _behind_reset(own: list[Tensor], index: Tensor, state: Any) -> list[Any]:
        """What the rows begin with, checked."""
        if state is None:
            return [0.0] * len(own)
        given = _states(state)
        if len(given) != len(own):
            raise ValueError(f"Stream: the state must be {'(h, c)' if len(own) == 2 else 'h'}")
        for s, value in zip(own, given, strict=True):
            layers, count, width = s[:, index].shape
            if value.shape not in ((layers, count, width), (layers, 1, width)):
                raise ValueError(
                    f"Stream: the state of the rows must have shape {(layers, count, width)}, or "
                    f"of one row for all, got {tuple(value.shape)}"
                )
        return [value.to(s.dtype) for s, value in zip(own, given, strict=True)]


def _states(state: Any) -> list[Tensor]:
    """The tensors of a state."""
    found = [state] if isinstance(state, Tensor) else list(state)
    if not all(isinstance(s, Tensor) for s in found):
        raise TypeError("Stream: a state is a Tensor, or a tuple (h, c) of them")
    return found


def _detached(state: Any) -> Any:
    if isinstance(state, (tuple, list)):
        return tuple(s.detach() for s in state)
    return None if state is None else state.detach()


__all__ = ["Stream"]
