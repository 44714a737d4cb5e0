"""Boundaries between steps and gradients of the c of each step (tests/test_cuda_resets.py) on CUDA
kernels; see conftest.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_resets import (
    CELLS,
    DTYPES,
    GROUPS,
    SIZES,
    agree,
    by_operators,
    cotangents,
    problem,
)

import cuda_on_host
import fastrnn

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def ops(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if fastrnn.get_backend() == "triton":
        pytest.skip("tests the CUDA kernels, and the backend asked for is triton")
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "step")
    return torch.ops.fastrnn if device == "cuda" else cuda_on_host.load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_equal_to_reference(ops: Any, device: str, cell: str, dtype: torch.dtype) -> None:
    for i, groups in enumerate(GROUPS):
        call = problem(cell, groups, SIZES[i % len(SIZES)], dtype, packed=i % 3 == 2)
        agree(ops, call, dcells=i % 2 == 0, device=device)


@pytest.mark.parametrize("cell", CELLS)
def test_some_more_rows(ops: Any, device: str, cell: str) -> None:
    """Several blocks of threads."""
    call = problem(cell, (2, 2), (12, 20, 5, 32), torch.float32, share=0.2)
    agree(ops, call, dcells=True, device=device)


@pytest.mark.parametrize("kernel", ["step-graph", "persistent-block", "persistent-grid"])
def test_kernels_of_several_steps_refuse(
    ops: Any, device: str, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    call = problem("lstm", (1, 0), SIZES[0], torch.bfloat16)
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", kernel)
    with pytest.raises(RuntimeError, match=f"KERNEL={kernel} cannot be met: it has no resets"):
        by_operators(ops, call, cotangents(call, False), device=device)


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
def test_other_codes_are_read_as_one_of_them(ops: Any, device: str, cell: str) -> None:
    """They lie where only kernels look; nothing beyond h0 and c0 is read."""
    call = problem(cell, (2, 2), SIZES[0], torch.float32)
    grads = cotangents(call, True)
    wrong = torch.where(call["resets"] == 2, 200, call["resets"]).to(torch.uint8)
    got = by_operators(ops, call | {"resets": wrong}, grads, device=device)
    for name, expected in by_operators(ops, call, grads, device=device).items():
        torch.testing.assert_close(got[name], expected)


def on_gpu(call: dict[str, Any]) -> list[Any]:
    """Arguments of the operator behind `cell`, but for `save` and `resets`; then resets."""
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("cuda"), call)
    return [*list(moved.values())[1:-1], moved["resets"]]


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_and_a_graph_has_it(ops: Any, device: str, cell: str) -> None:
    """Other codes in the same memory count at the next replay."""
    call, other = (problem(cell, (2, 2), SIZES[0], torch.float32) for _ in range(2))
    *given, resets = on_gpu(call)
    name = call["cell"]

    def run() -> list[torch.Tensor]:
        results = ops.layer(name, *given, True, resets)
        output, h_n, _, cells, saved = results
        ones = [torch.ones_like(output), torch.ones_like(h_n), None]
        wanted = [1, 1, int(name == "lstm"), *[1] * len(given[1])]
        backward = ops.layer_backward(
            name, *ones, given[0], output, cells, saved, *given[1:], wanted, resets, None
        )
        return [*results, backward[0], *backward[1], *backward[2:]]

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    resets.copy_(other["resets"])
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip([t.clone() for t in captured], run(), strict=True):
        assert torch.equal(got, expected)
