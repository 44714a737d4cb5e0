"""Recurrent layers of other libraries on a GPU, for bench.gpu: Haste, FlashRNN, TorchRL.

Each is a module from an input [T, B, I] to (output [T, B, H], last h), made by
``RIVALS[name](cell)``, which raises ImportError where the library is not installed and
NotImplementedError with the reason where it cannot run the cell. They draw weights of their own: it
is checked that results are finite and of the right shape, not their values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Cell = dict[str, Any]  # a cell of bench.gpu


def _only(cell: Cell, kinds: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    if cell["cell"] not in kinds:
        raise NotImplementedError(f"no {cell['cell']}")
    if cell["dtype"] not in dtypes:
        raise NotImplementedError(f"no {cell['dtype']}")
    for option, plain in (("layers", 1), ("bidirectional", False), ("packed", False)):
        if cell[option] != plain:
            raise NotImplementedError(f"{option}: not of one call")


def haste(cell: Cell) -> nn.Module:
    """Haste: a product and a gate kernel per step, float32."""
    library = importlib.import_module("haste_pytorch")
    _only(cell, ("LSTM", "GRU"), ("float32",))
    layer: nn.Module = getattr(library, cell["cell"])(cell["H"], cell["H"])
    return layer


class _FlashRnn(nn.Module):
    """The input product, which the library leaves to the caller, and its fused recurrence."""

    def __init__(self, function: Callable[..., Any], cell: Cell) -> None:
        super().__init__()
        self.function, self.kind = function, {"LSTM": "lstm", "RNN": "elman"}[cell["cell"]]
        self.gates, self.hidden = {"LSTM": 4, "RNN": 1}[cell["cell"]], cell["H"]
        self.dtype_name = cell["dtype"]
        self.input = nn.Linear(cell["H"], self.gates * cell["H"], bias=False)
        self.recurrent = nn.Parameter(torch.empty(self.gates, 1, cell["H"], cell["H"]))
        self.bias = nn.Parameter(torch.zeros(self.gates, 1, cell["H"]))
        nn.init.uniform_(self.recurrent, -(cell["H"] ** -0.5), cell["H"] ** -0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, batch, _ = x.shape
        products = self.input(x.transpose(0, 1)).view(batch, steps, self.gates, 1, self.hidden)
        states, last = self.function(
            products, self.recurrent, self.bias, function=self.kind, backend="cuda_fused",
            dtype=self.dtype_name,
        )  # fmt: skip
        return states[0].view(batch, steps, self.hidden).transpose(0, 1), last[0]


def flashrnn(cell: Cell) -> nn.Module:
    """FlashRNN's fused kernel, compiled for the shape at its first call."""
    library = importlib.import_module("flashrnn")
    _only(cell, ("LSTM", "RNN"), ("bfloat16", "float16", "float32"))
    return _FlashRnn(library.flashrnn, cell)


class _TorchRl(nn.Module):
    """A module over a TensorDict, on whole sequences."""

    def __init__(self, library: Any, tensordict: Any, cell: Cell) -> None:
        super().__init__()
        states = ["h", "c"] if cell["cell"] == "LSTM" else ["h"]
        self.library, self.tensordict, self.states = library, tensordict, states
        self.layer = getattr(library, f"{cell['cell']}Module")(
            input_size=cell["H"], hidden_size=cell["H"], in_keys=["x", *states],
            out_keys=["y", *(("next", name) for name in states)], recurrent_backend="triton",
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, batch, hidden = x.shape
        data = {"x": x.transpose(0, 1)}
        for name in self.states:
            data[name] = x.new_zeros(batch, steps, 1, hidden)
        data["is_init"] = torch.zeros(batch, steps, 1, dtype=torch.bool, device=x.device)
        with self.library.set_recurrent_mode("recurrent"):
            found = self.layer(self.tensordict.TensorDict(data, [batch, steps]))
        return found["y"].transpose(0, 1), found["next", "h"][:, -1]


def torchrl(cell: Cell) -> nn.Module:
    """TorchRL's Triton kernels."""
    library = importlib.import_module("torchrl.modules")
    tensordict = importlib.import_module("tensordict")
    _only(cell, ("LSTM", "GRU"), ("float32", "bfloat16", "float16"))
    return _TorchRl(library, tensordict, cell)


RIVALS: dict[str, Callable[[Cell], nn.Module]] = {
    "haste": haste, "flashrnn": flashrnn, "torchrl": torchrl,
}  # fmt: skip
