"""What the drop-in tests share: both libraries side by side, and layers with equal weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}

# A test marked so runs on torch.nn too, and thereby proves its own expectation.
both_libraries = pytest.mark.parametrize("lib", [nn, fastrnn], ids=["torch", "fastrnn"])


def build(lib: ModuleType, name: str, *args: Any, **kwargs: Any) -> Any:
    """A layer or cell with the same weights whichever library it comes from."""
    torch.manual_seed(7)
    return getattr(lib, name)(*args, **kwargs)


def states(hx: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state of any layer as a tuple: (h,) or (h, c)."""
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def make_hx(name: str, *shape: int) -> Any:
    """A random initial state for the layer or cell ``name``: h, or (h, c) for an LSTM."""
    h = torch.randn(*shape)
    return (h, torch.randn(*shape)) if name.startswith("LSTM") else h
