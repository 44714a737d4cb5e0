"""Members and parts of the batch (tests/test_ops_groups.py) on Triton's kernels."""

from __future__ import annotations

import pytest
import torch
from test_ops_groups import agree, changed, problem, refused_stacks, stacked, wanted_of

import fastrnn

pytestmark = [
    pytest.mark.skipif(fastrnn._ops.native_error is not None, reason="pure-Python install"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy, of a mask
]


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_members_and_parts(device: str, kernel: str, cell: str) -> None:
    if cell == "lstm_proj" and kernel != "step":
        pytest.skip("a projection is a product of its own")
    call = problem(cell, (2, 4, 2), (2, 4, 3, 5))
    agree(torch.ops.fastrnn_triton, call, 2, poisoned=False, device=device)


@pytest.mark.parametrize("width", [0, 7, 9, 12])
def test_wrong_inputs_are_refused(device: str, width: int) -> None:
    call = problem("gru", (2, 4, 2), (2, 4, 3, 5))
    wrong = changed(call, input=torch.randn(2, 4, width))
    with pytest.raises(RuntimeError, match=r"weight_ih must have shape|does not divide"):
        torch.ops.fastrnn_triton.layer(*wrong, True)


def test_wrong_stacks_are_refused(device: str) -> None:
    call = problem("gru", (2, 4, 2), (2, 4, 3, 5))
    call = stacked(call, wanted_of(call, 1), 4)[0]
    for weights, text in refused_stacks(call[2]):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.fastrnn_triton.layer(*changed(call, weights=weights), False)
