"""Resets, lengths and the other arguments of sequences: what is wrong raises and says what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "resets int": ({"resets": torch.zeros(5, 2)}, TypeError, "resets must be a bool tensor"),
    "resets list": ({"resets": [True]}, TypeError, "resets must be a Tensor, got list"),
    "resets shape": ({"resets": torch.zeros(2, 5).bool()}, ValueError, r"shape \(5, 2\)"),
    "resets long": ({"resets": torch.zeros(6, 2).bool()}, ValueError, r"shape \(5, 2\)"),
    "resets device": (
        {"resets": torch.zeros(5, 2, device="meta").bool()}, ValueError, "on the device",
    ),
    "reset_hx alone": ({"reset_hx": torch.zeros(1, 2, 4)}, ValueError, "without resets"),
    "reset_hx rows": (
        {"resets": torch.zeros(5, 2).bool(), "reset_hx": torch.zeros(1, 3, 4)}, RuntimeError,
        r"reset_hx \(1, 2, 4\), got \[1, 3, 4\]",
    ),
    "reset_hx dtype": (
        {"resets": torch.zeros(5, 2).bool(), "reset_hx": torch.zeros(1, 1, 4).double()},
        RuntimeError, "reset_hx must have the dtype",
    ),
    "lengths float": ({"lengths": torch.ones(2)}, TypeError, "lengths must be integers"),
    "lengths list": ({"lengths": [1, 2]}, TypeError, "lengths must be a Tensor"),
    "lengths shape": ({"lengths": torch.ones(3).long()}, ValueError, r"shape \(2,\)"),
    "lengths negative": ({"lengths": torch.tensor([-1, 2])}, ValueError, "0 to 5.*got -1 to 2"),
    "lengths long": ({"lengths": torch.tensor([6, 2])}, ValueError, "0 to 5.*got 2 to 6"),
    "recompute text": ({"recompute": "yes"}, TypeError, "recompute must be a bool or an int"),
    "recompute 0": ({"recompute": 0}, ValueError, "at least 1 step, got 0"),
    "recompute states": (
        {"recompute": True, "return_states": True}, ValueError, "which recompute does not",
    ),
    "unknown": ({"rests": None}, TypeError, "rests"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(engine: str, wrong: str) -> None:
    options, error, text = WRONG[wrong]
    layer = fastrnn.GRU(3, 4)
    with pytest.raises(error, match=text):
        layer(torch.randn(5, 2, 3), **options)
    with pytest.raises(error, match=text):
        fastrnn.functional.gru(torch.randn(5, 2, 3), list(layer.parameters()), **options)


UNBATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "resets": ({"resets": torch.zeros(5, 1).bool()}, "must have 1 dimension"),
    "lengths": ({"lengths": torch.tensor([3])}, "must have 0 dimension"),
}


@pytest.mark.parametrize("wrong", UNBATCHED)
def test_wrong_arguments_without_batch(wrong: str) -> None:
    options, text = UNBATCHED[wrong]
    with pytest.raises(ValueError, match=text):
        fastrnn.GRU(3, 4)(torch.randn(5, 3), **options)


def test_an_empty_reset_hx_is_refused() -> None:
    resets = torch.zeros(5, 2).bool()
    with pytest.raises(RuntimeError, match="expects two hidden states, got 0"):
        fastrnn.LSTM(3, 4)(torch.randn(5, 2, 3), resets=resets, reset_hx=())


def test_lengths_beside_packed_are_refused() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, 3), torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="beside those of a PackedSequence"):
        fastrnn.GRU(3, 4)(packed, lengths=torch.tensor([1, 1]))


WRONG_STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "hx of one row": ("GRUCell", {"hx": torch.zeros(1, 4)}),
    "hx without rows": ("RNNCell", {"hx": torch.zeros(4)}),
    "hx of two": ("GRUCell", {"hx": (torch.zeros(3, 4), torch.zeros(3, 4))}),
    "reset_hx of one row": ("GRUCell", {"reset_hx": torch.zeros(1, 4)}),
    "reset_hx of two": ("RNNCell", {"reset_hx": (torch.zeros(3, 4), torch.zeros(3, 4))}),
    "reset_hx of one": ("LSTMCell", {"reset_hx": (torch.zeros(3, 4),)}),
    "reset_hx of three": ("LSTMCell", {"reset_hx": (torch.zeros(3, 4),) * 3}),
    "reset_hx tensor": ("LSTMCell", {"reset_hx": torch.zeros(2, 3, 4)}),
    "reset_hx None": ("LSTMCell", {"reset_hx": (None, None)}),
    "hx and reset_hx": ("RNNCell", {"hx": torch.zeros(3, 4), "reset_hx": torch.zeros(3, 5)}),
    "reset elsewhere": ("GRUCell", {"reset": torch.ones(3, device="meta").bool()}),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_wrong_states_of_cells(wrong: str) -> None:
    cell, options = WRONG_STATES[wrong]
    options = {"reset": torch.ones(3).bool()} | options
    with pytest.raises((TypeError, ValueError), match=r"must (be|have)"):
        getattr(fastrnn, cell)(3, 4)(torch.randn(3, 3), **options)
