"""What sequences need beyond torch.nn: resets, lengths of rows, the states of all steps.

Dimension key: see layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, modes
from .checks import LayerSpec


class Options(NamedTuple):
    """The keyword arguments of ``forward``."""

    resets: Tensor | None = None
    reset_hx: Any = None
    lengths: Tensor | None = None
    return_states: bool = False
    recompute: bool | int = False


class States(NamedTuple):
    """The states after every step, of all layers: h [L, T, B, D * P] and c [L, T, B, D * H] (None
    of a cell without c); [L, B, T, ...] with ``batch_first``, [L, T, ...] unbatched, [L, N, ...] of
    packed data. h[l] is the output of layer l."""

    h: Tensor
    c: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        return States(change(self.h), None if self.c is None else change(self.c))


class Boundaries(NamedTuple):
    """Resets as the operators take them: uint8 [T, B] or [N], and for each state the rows
    [L * D, B, ...] that enter behind a reset, or None: zeros."""

    codes: Tensor
    states: tuple[Tensor, ...] | None

    def of_rows(self, order: Tensor) -> Boundaries:
        """With the states of these rows of the batch; the codes stay."""
        if self.states is None:
            return self
        return Boundaries(self.codes, tuple(s.index_select(1, order) for s in self.states))

    def to(self, dtype: torch.dtype) -> Boundaries:
        if self.states is None:
            return self
        return Boundaries(self.codes, tuple(s.to(dtype) for s in self.states))


def boundaries_of(
    spec: LayerSpec, options: Options, data: Tensor, batch: int, batch_first: bool
) -> Boundaries | None:
    """The resets of a call, checked. data: [T, B, I] or packed [N, I]; ``options`` are laid out as
    the user gave them, but batched."""
    resets, reset_hx = options.resets, options.reset_hx
    if resets is None:
        if reset_hx is not None:
            raise ValueError(f"{spec.name}: reset_hx was given without resets")
        return None
    _check_resets(spec, resets, data, batch_first)
    codes = resets.transpose(0, 1) if batch_first and resets.dim() == 2 else resets
    codes = codes.to(torch.uint8)
    if reset_hx is None:
        return Boundaries(codes, None)
    states = tuple(reset_hx) if spec.has_c and isinstance(reset_hx, (tuple, list)) else reset_hx
    one = states[0] if isinstance(states, tuple) else states
    rows = 1 if isinstance(one, Tensor) and one.dim() == 3 and one.shape[1] == 1 else batch
    checks.layer_state(spec, states, rows, data, "reset_hx")
    if not isinstance(states, tuple):
        states = (states,)
    return Boundaries(codes, tuple(s.expand(-1, batch, -1) for s in states))


def _check_resets(spec: LayerSpec, resets: Any, data: Tensor, batch_first: bool) -> None:
    if not isinstance(resets, Tensor):
        raise TypeError(f"{spec.name}: resets must be a Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"{spec.name}: resets must be a bool tensor, got {resets.dtype}")
    expected = data.shape[:-1]
    shape = resets.shape[::-1] if batch_first and len(expected) == 2 else resets.shape
    if shape != expected:
        wanted = tuple(expected[::-1] if batch_first else expected)
        raise ValueError(
            f"{spec.name}: resets must have shape {wanted}, got {tuple(resets.shape)}"
        )
    if resets.device != data.device:
        raise ValueError(
            f"{spec.name}: resets must be on the device of the input, {data.device}, "
            f"got {resets.device}"
        )


def entering(
    boundaries: Boundaries | None, initial: Sequence[Tensor | None], first: int, last: int
) -> list[Tensor | None]:
    """h0 and c0 of groups [first, last) as the operators take them: [D, B, width], or with
    boundaries [D, 2 B, width], the initial states and those that enter behind a reset."""
    found: list[Tensor | None] = []
    for i, whole in enumerate(initial):
        state = None if whole is None else whole[first:last]
        behind = None
        if boundaries is not None and boundaries.states is not None and i < len(boundaries.states):
            behind = boundaries.states[i][first:last]
        if boundaries is None or (state is None and behind is None):
            found.append(state)
        else:
            zeros = torch.zeros_like(behind if state is None else state)  # type: ignore[arg-type]
            found.append(torch.cat([t if t is not None else zeros for t in (state, behind)], 1))
    return found


def entering_cell(name: str, input: Tensor, hx: Any, reset: Any, reset_hx: Any) -> Any:
    """hx of a cell [B, H] or [H], with the rows that are reset (bool [B] or []) replaced by those
    of ``reset_hx``, or zeros."""
    if reset is None:
        if reset_hx is not None:
            raise ValueError(f"{name}: reset_hx was given without reset")
        return hx
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"{name}: reset must be a bool tensor, got {kind}")
    if reset.shape != input.shape[:-1]:
        raise ValueError(
            f"{name}: reset must have shape {tuple(input.shape[:-1])}, got {tuple(reset.shape)}"
        )
    if hx is None and reset_hx is None:
        return None
    old, new = ((s,) if isinstance(s, Tensor) else s for s in (hx, reset_hx))
    count = len(old if old is not None else new)
    found = []
    for i in range(count):
        like = old[i] if old is not None else new[i]
        before = torch.zeros_like(like) if old is None else old[i]
        behind = torch.zeros_like(like) if new is None else new[i]
        if behind.shape != before.shape and old is not None:
            raise ValueError(
                f"{name}: reset_hx must have the shape of hx, {tuple(before.shape)}, "
                f"got {tuple(behind.shape)}"
            )
        found.append(torch.where(reset[..., None], behind, before))
    return found[0] if name != "LSTMCell" else tuple(found)


def states_over_time(cells: Tensor, output: Tensor, groups: int) -> Tensor:
    """c of every step [D, N, H], laid out and of the dtype as the output: [T, B, D * H] or
    [N, D * H]."""
    rows = output.shape[:-1]
    return cells.transpose(0, 1).reshape(*rows, groups * cells.shape[-1]).to(output.dtype)


def recompute_of(spec: LayerSpec, options: Options) -> bool | int:
    """``recompute`` of a call, checked."""
    recompute: Any = options.recompute
    if not isinstance(recompute, int):
        kind = type(recompute).__name__
        raise TypeError(f"{spec.name}: recompute must be a bool or an int, got {kind}")
    if recompute is not False and recompute < 1:
        raise ValueError(f"{spec.name}: recompute must be True or at least 1 step, got {recompute}")
    if not recompute:
        return False
    if options.return_states:
        raise ValueError(
            f"{spec.name}: return_states keeps the states of all steps, which recompute does not"
        )
    for happens, what in (
        (torch.compiler.is_compiling(), "torch.compile"),
        (torch._C._are_functorch_transforms_active(), "torch.func"),
        (modes.is_traced(), "torch.jit.trace"),
    ):
        if happens:
            raise RuntimeError(f"{spec.name}: recompute is not possible under {what}")
    return recompute


def batched(spec: LayerSpec, options: Options) -> Options:
    """The options of an unbatched call as those of a batch of one row."""
    resets, reset_hx, lengths = options[:3]
    if isinstance(resets, Tensor) and resets.dim() == 1:
        resets = resets.unsqueeze(1)
    if isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if isinstance(reset_hx, (tuple, list)):
        reset_hx = tuple(s.unsqueeze(1) if isinstance(s, Tensor) else s for s in reset_hx)
    elif isinstance(reset_hx, Tensor):
        reset_hx = reset_hx.unsqueeze(1)
    return options._replace(resets=resets, reset_hx=reset_hx, lengths=lengths)


__all__ = [
    "Boundaries", "Options", "States", "batched", "boundaries_of", "entering", "entering_cell",
    "recompute_of", "states_over_time",
]  # fmt: skip
