"""The definition of resets and lengths: every row is cut into pieces at its boundaries, torch.nn's
layers run over each piece alone, and the results are joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


def run(
    module: nn.RNNBase, input: Tensor, hx: State, resets: Tensor, reset_hx: State,
    lengths: list[int],
) -> dict[str, Tensor]:  # fmt: skip
    """Output, final states and the states of all steps of input [T, B, I]; hx and reset_hx
    [L * D, B, ...]; resets [T, B]. Differentiable."""
    data, finals, all_h, all_c = input, [], [], []
    D = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        by_direction = [
            _direction(module, layer, d, data, hx, resets, reset_hx, lengths) for d in range(D)
        ]
        data = torch.cat([found[0] for found in by_direction], -1)
        all_h.append(data)
        all_c.append(torch.cat([found[1] for found in by_direction], -1))
        finals += [found[2] for found in by_direction]
    states = [torch.stack(s) for s in zip(*finals, strict=True)]
    named = dict(zip(("h_n", "c_n"), states, strict=False))
    every = {"states.h": torch.stack(all_h)}
    if isinstance(module, nn.LSTM):
        every["states.c"] = torch.stack(all_c)
    return {"output": data, **named, **every}


def _direction(
    module: nn.RNNBase, layer: int, d: int, data: Tensor, hx: State, resets: Tensor,
    reset_hx: State, lengths: list[int],
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """h and c of every step [T, B, ...], zeros behind each row's end, and the final state."""
    index = layer * (2 if module.bidirectional else 1) + d
    outputs, cells, finals = [], [], []
    for b, length in enumerate(lengths):
        order = list(range(length))
        own = tuple(s[index, b] for s in hx)
        hs: dict[int, Tensor] = {}
        cs: dict[int, Tensor] = {}
        for t in reversed(order) if d else order:
            boundary = t + 1 if d else t
            if boundary < length and resets[boundary, b]:
                own = tuple(s[index, b] for s in reset_hx)
            own = _step(module, layer, d, data[t, b], own)
            hs[t], cs[t] = own[0], own[-1]
        steps = range(data.shape[0])
        outputs.append(torch.stack([hs.get(t, torch.zeros_like(hx[0][0, 0])) for t in steps]))
        cells.append(torch.stack([cs.get(t, torch.zeros_like(hx[-1][0, 0])) for t in steps]))
        finals.append(own)
    final = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return torch.stack(outputs, 1), torch.stack(cells, 1), final


def _step(module: nn.RNNBase, layer: int, d: int, x: Tensor, own: State) -> State:
    """One step of one layer and direction of torch.nn: x [I], state [P] and [H]."""
    name = type(module).__name__
    suffix = f"_l{layer}" + ("_reverse" if d else "")
    weights = [
        getattr(module, kind + suffix)
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        if hasattr(module, kind + suffix)
    ]
    options: Any = (bool(module.bias), 1, 0.0, False, False, False)
    data = x[None, None]
    states = [s[None, None] for s in own]
    if name == "LSTM":
        _, *new = torch.lstm(data, states, weights, *options)
    elif name == "GRU":
        _, *new = torch.gru(data, states[0], weights, *options)
    else:
        run = torch.rnn_tanh if module.nonlinearity == "tanh" else torch.rnn_relu  # type: ignore[attr-defined]
        _, *new = run(data, states[0], weights, *options)
    return tuple(s[0, 0] for s in new)
