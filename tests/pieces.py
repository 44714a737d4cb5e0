"""The definition of resets and lengths: every row is cut into pieces at its boundaries, torch.nn's
layers run over each piece alone, and the results are joined. And problems to hold against it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from compare import check

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


CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["dense", "lengths", "masked", "packed"]


class Problem:
    """Made-up data for one net: every tensor that a call may be given, in float64."""

    def __init__(
        self, cell: str, seed: int, T: int, B: int, I: int, H: int, layers: int,  # noqa: E741
        bidirectional: bool, batch_first: bool, bias: bool, kind: str, frequency: float,
        with_hx: bool, reset_rows: int,
    ) -> None:  # fmt: skip
        name, extra = CELLS[cell]
        torch.manual_seed(seed)
        self.module = getattr(fastrnn, name)(
            I, H, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first,
            bias=bias, **extra,
        ).double()  # fmt: skip
        self.cell, self.kind, self.is_lstm = cell, kind, name == "LSTM"
        self.batch_first = batch_first
        self.input = torch.randn(T, B, I).double()
        least = 1 if kind == "packed" else 0
        varied = kind != "dense"
        self.lengths = torch.randint(least, T + 1, (B,)).tolist() if varied else [T] * B
        self.resets = torch.rand(T, B) < frequency
        rows = layers * (2 if bidirectional else 1)
        widths = [self.module.proj_size or H, H][: 1 + self.is_lstm]
        self.with_hx, self.with_reset_hx = with_hx, reset_rows > 0
        self.hx = [torch.randn(rows, B, w).double() for w in widths]
        count = B if reset_rows > 1 else 1
        self.reset_hx = [torch.randn(rows, count, w).double() for w in widths]

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """input, hx and reset_hx, leaves of a graph; zeros in place of what is not given."""
        given = (self.input, *self.hx, *self.reset_hx)
        n = len(self.hx)
        found = [t.to(dtype).requires_grad_() for t in given]
        hx, reset_hx = found[1 : 1 + n], found[1 + n :]
        if not self.with_hx:
            hx = [torch.zeros_like(s) for s in hx]
        if not self.with_reset_hx:
            reset_hx = [torch.zeros_like(s) for s in reset_hx]
        return found[0], hx, reset_hx

    def expected(
        self, dtype: torch.dtype, cotangents: dict[str, Tensor], with_states: bool
    ) -> dict[str, Tensor]:
        module = self.module.to_torch().to(dtype)
        input, hx, reset_hx = self.tensors(dtype)
        batch = self.input.shape[1]
        results = run(
            module, input, tuple(hx), self.resets, tuple(s.expand(-1, batch, -1) for s in reset_hx),
            self.lengths,
        )  # fmt: skip
        if not with_states:
            results = {k: v for k, v in results.items() if not k.startswith("states")}
        return self.with_gradients(module, results, cotangents, input, hx, reset_hx)

    def got(
        self, dtype: torch.dtype, cotangents: dict[str, Tensor], **options: Any
    ) -> dict[str, Tensor]:
        module = copy.deepcopy(self.module).to(dtype)
        input, hx, reset_hx = self.tensors(dtype)
        data, named = self._arguments(input)
        if self.with_reset_hx:
            named["reset_hx"] = self._state(reset_hx)
        output, last, *states = module(
            data, self._state(hx) if self.with_hx else None, **named, **options
        )
        last = last if isinstance(last, tuple) else (last,)
        results = {"output": self._padded(output)}
        results |= dict(zip(("h_n", "c_n"), last, strict=False))
        for found in states:
            results["states.h"] = self._over_time(found.h)
            if found.c is not None:
                results["states.c"] = self._over_time(found.c)
        return self.with_gradients(module, results, cotangents, input, hx, reset_hx)

    def _arguments(self, input: Tensor) -> tuple[Any, dict[str, Any]]:
        data = input.transpose(0, 1) if self.batch_first else input
        resets = self.resets.t() if self.batch_first else self.resets
        if self.kind == "dense":
            return data, {"resets": resets}
        if self.kind != "packed":
            return data, {"resets": resets, "lengths": torch.tensor(self.lengths)}
        data, rows = (
            pack_padded_sequence(t, torch.tensor(self.lengths), self.batch_first, False)
            for t in (data, resets[..., None].to(torch.uint8))
        )
        return data, {"resets": rows.data[:, 0].bool()}

    def _state(self, states: list[Tensor]) -> Any:
        return tuple(states) if self.is_lstm else states[0]

    def _padded(self, output: Any) -> Tensor:
        if isinstance(output, PackedSequence):
            return pad_packed_sequence(output, total_length=self.input.shape[0])[0]
        return output.transpose(0, 1) if self.batch_first else output

    def _over_time(self, states: Tensor) -> Tensor:
        if self.kind != "packed":
            return states.transpose(1, 2) if self.batch_first else states
        packed = pack_padded_sequence(
            self.input, torch.tensor(self.lengths), enforce_sorted=False
        )
        return torch.stack([self._padded(packed._replace(data=s)) for s in states])

    def with_gradients(
        self, module: nn.Module, results: dict[str, Tensor], cotangents: dict[str, Tensor],
        input: Tensor, hx: list[Tensor], reset_hx: list[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        leaves = {"input": input} | dict(module.named_parameters())
        leaves |= {f"hx[{i}]": s for i, s in enumerate(hx) if s.requires_grad}
        leaves |= {f"reset_hx[{i}]": s for i, s in enumerate(reset_hx) if s.requires_grad}
        for name, result in results.items():
            if name not in cotangents:
                cotangents[name] = torch.randn_like(result, dtype=torch.float64)
        total = sum((r.double() * cotangents[name]).sum() for name, r in results.items())
        assert isinstance(total, Tensor)
        if not total.requires_grad:  # no row has a step, and nothing else is asked
            return results
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return results | {
            f"d {name}": torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }


def checked(problem: Problem, dtype: torch.dtype, **options: Any) -> None:
    cotangents: dict[str, Tensor] = {}
    with_states = "return_states" in options
    exact = problem.expected(torch.float64, cotangents, with_states)
    same = exact if dtype == torch.float64 else problem.expected(dtype, cotangents, with_states)
    got = problem.got(dtype, cotangents, **options)
    # Where no row has a step nothing has a gradient by definition; ours are zeros.
    assert set(exact) == set(got) or not any(problem.lengths)
    check({k: got[k] for k in exact}, same, exact)


def make(cell: str, kind: str, T: int = 9, B: int = 4, **options: Any) -> Problem:
    settings: dict[str, Any] = {
        "seed": 1, "T": T, "B": B, "I": 3, "H": 7, "layers": 2, "bidirectional": True,
        "batch_first": False, "bias": True, "frequency": 0.3, "with_hx": True, "reset_rows": 1,
    }  # fmt: skip
    return Problem(cell=cell, kind=kind, **(settings | options))
