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
    one = states[0] if isinstance(states, tuple) and states else states
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
    if reset.device != input.device:
        raise ValueError(
            f"{name}: reset must be on the device of the input, {input.device}, got {reset.device}"
        )
    if hx is None and reset_hx is None:
        return None
    old = None if hx is None else _cell_states(name, "hx", input, hx)
    new = None if reset_hx is None else _cell_states(name, "reset_hx", input, reset_hx)
    if old is not None and new is not None and old[0].shape != new[0].shape:
        raise ValueError(
            f"{name}: reset_hx must have the shape of hx, {tuple(old[0].shape)}, "
            f"got {tuple(new[0].shape)}"
        )
    old = [torch.zeros_like(s) for s in new or ()] if old is None else old
    new = [torch.zeros_like(s) for s in old] if new is None else new
    found = [torch.where(reset[..., None], n, o) for o, n in zip(old, new, strict=True)]
    return found[0] if name != "LSTMCell" else tuple(found)


def _cell_states(name: str, which: str, input: Tensor, given: Any) -> list[Tensor]:
    """The states of a cell, each as long as the input is."""
    count = 2 if name == "LSTMCell" else 1
    states = [given] if count == 1 else list(given) if isinstance(given, (tuple, list)) else []
    if len(states) != count or not all(isinstance(s, Tensor) for s in states):
        expected = "a Tensor" if count == 1 else "a tuple (h, c) of Tensors"
        raise TypeError(f"{name}: {which} must be {expected}, got {type(given).__name__}")
    for state in states:
        rows = tuple(input.shape[:-1])
        if state.shape[:-1] != rows or state.shape != states[0].shape:
            shape = f"({', '.join([*map(str, rows), 'H'])})"
            raise ValueError(f"{name}: {which} must have shape {shape}, got {tuple(state.shape)}")
    return states


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
    for name, given, dims in (("resets", resets, 1), ("lengths", lengths, 0)):
        if isinstance(given, Tensor) and given.dim() != dims:
            raise ValueError(
                f"{spec.name}: {name} of an unbatched input must have {dims} dimension(s), "
                f"got {given.dim()}"
            )
    resets = resets.unsqueeze(1) if isinstance(resets, Tensor) else resets
    lengths = lengths.unsqueeze(0) if isinstance(lengths, Tensor) else lengths
    if isinstance(reset_hx, (tuple, list)):
        reset_hx = tuple(s.unsqueeze(1) if isinstance(s, Tensor) else s for s in reset_hx)
    elif isinstance(reset_hx, Tensor):
        reset_hx = reset_hx.unsqueeze(1)
    return options._replace(resets=resets, reset_hx=reset_hx, lengths=lengths)


__all__ = [
    "Boundaries", "Options", "States", "batched", "boundaries_of", "entering", "entering_cell",
    "recompute_of", "states_over_time",
]  # fmt: skip
