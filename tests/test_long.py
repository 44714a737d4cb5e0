"""Many steps, and arrays of more elements than 32 bits count."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from compare import check

GIB = 2**30


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_hundred_thousand_steps_train(name: str, recompute: bool) -> None:
    torch.set_num_threads(2)
    layer = getattr(fastrnn, name)(8, 32)
    x = torch.randn(100_000, 1, 8, requires_grad=True)
    cotangent = torch.randn(100_000, 1, 32)

    def trained(run: Any) -> dict[str, Tensor]:
        output, last = run()
        found = torch.autograd.grad(output, [x, *layer.parameters()], cotangent)
        last = last if isinstance(last, tuple) else (last,)
        return {str(i): t for i, t in enumerate((output, *last, *found))}

    def by_chunks() -> Any:
        state, parts = None, []
        for chunk in x.split(10_000):
            output, state = layer(chunk, state)
            parts.append(output)
        return torch.cat(parts), state

    got = trained(lambda: layer(x, recompute=recompute))
    expected = trained(by_chunks)
    layer.double()
    x, cotangent = x.detach().double().requires_grad_(), cotangent.double()
    check(got, expected, trained(by_chunks))


def free_memory() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(free_memory() < 8 * GIB, reason="needs 8 GiB of memory")
@torch.no_grad()
def test_more_elements_than_32_bits_count() -> None:
    torch.set_num_threads(2)
    T, B, H = 2**10, 2**18 + 1, 8
    layer: nn.Module = fastrnn.RNN(1, H).bfloat16()
    x = torch.randn(T, B, 1, dtype=torch.bfloat16)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[-2, -1] = True
    output, h_n = layer(x, resets=resets)
    assert output.numel() > 2**31
    few, last = layer(x[:, -3:].clone(), resets=resets[:, -3:])
    assert output[:, -3:].equal(few)
    assert h_n[:, -3:].equal(last)
