"""Which Triton kernels run a layer, and why not the others."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import fastrnn
from fastrnn import _ops, info
from fastrnn.triton import plan
from fastrnn.triton.plan import H100, Gpu, Shape, make_plan

A100, SMALL = plan.GPUS["a100"], plan.GPUS["l40s"]


def shape(G: int, B: int, H: int, D: int = 1, item: int = 2, **options: bool) -> Shape:
    given = {"projected": False, "tf32": False} | options
    return Shape(G, B, H, D, item, given["projected"], given["tf32"])


@pytest.mark.parametrize(
    ("s", "gpu", "kernel"),
    [
        (shape(4, 32, 128), H100, "resident"),
        (shape(4, 32, 128), A100, "resident"),
        (shape(4, 32, 128), SMALL, "streamed"),  # W_hh finds no room
        (shape(4, 32, 130), H100, "streamed"),  # padded to 256
        (shape(4, 32, 256), H100, "streamed"),
        (shape(3, 32, 256), H100, "streamed"),
        (shape(1, 32, 256), H100, "resident"),
        (shape(4, 32, 512), H100, "step"),
        (shape(4, 1, 1024), H100, "step"),
        (shape(4, 32, 128, projected=True), H100, "step"),
        (shape(4, 32, 32, item=8), H100, "step"),
        (shape(4, 32, 32, item=4), H100, "streamed"),
        (shape(4, 32, 64, item=4), H100, "streamed"),
        (shape(4, 32, 64, item=4, tf32=True), H100, "resident"),
        (shape(4, 32, 256, item=4), H100, "step"),  # float32 products without tensor cores
        (shape(4, 4096, 64), H100, "resident"),
        (shape(4, 100000, 64), H100, "step"),  # many more programs than multiprocessors
    ],
)
def test_choice(s: Shape, gpu: Gpu, kernel: str) -> None:
    found = make_plan(s, gpu, "auto")
    assert found.kernel == kernel
    assert re.search(r"\d us a step predicted", found.why)
    others = {reason.partition(":")[0] for reason in found.against}
    assert others == set(plan.KERNELS) - {kernel}


def test_tiles_know_neither_batch_nor_steps() -> None:
    """So that nothing is compiled anew for them."""
    for H in (16, 100, 200):
        for kernel in plan.KERNELS:
            asked = "auto" if plan.why_not(kernel, shape(4, 1, H), H100) else kernel
            options = [make_plan(shape(4, B, H), H100, asked).options() for B in (1, 7, 64)]
            assert options[0] == options[1] == options[2]


@pytest.mark.parametrize(
    ("kernel", "s", "reason"),
    [
        ("resident", shape(4, 1, 256), "W_hh takes .* bytes of shared memory"),
        ("resident", shape(4, 1, 16, item=4), "products of float32 without TF32"),
        ("resident", shape(4, 1, 64, projected=True), "a projection is a product of its own"),
        ("streamed", shape(4, 1, 64, projected=True), "a projection is a product of its own"),
        ("streamed", shape(4, 1, 64, item=8), "products of float64 are left to torch"),
        ("streamed", shape(4, 1, 23200), r"W_hh has 2\^31 numbers or more"),
    ],
)
def test_what_cannot_be_met(kernel: str, s: Shape, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_plan(s, H100, kernel)


@pytest.mark.parametrize("given", ["resets", "gradients of cells"])
def test_what_only_kernels_of_one_step_take(given: str) -> None:
    s = dataclasses.replace(shape(4, 32, 64), only_steps=given)
    reasons = [f"{k}: only kernels of one step take {given}" for k in ("resident", "streamed")]
    found = make_plan(s, H100, "auto")
    assert (found.kernel, list(found.against)) == ("step", reasons)
    for reason in reasons:
        with pytest.raises(ValueError, match=reason):
            make_plan(s, H100, reason.partition(":")[0])


@pytest.mark.skipif(_ops.native_error is not None, reason="pure-Python install")
def test_gpus_are_those_of_the_native_plan() -> None:
    from fastrnn import _C

    known = {n: Gpu(f["multiprocessors"], f["shared_bytes"]) for n, f in _C.gpus().items()}
    assert known == plan.GPUS


def test_variable(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fastrnn.GRU(3, 4, device=device), torch.randn(2, 2, 3, device=device)
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "fast")
    text = "must be one of auto, resident, streamed, step, and is 'fast'"
    with pytest.raises(RuntimeError, match=text):
        layer(x)
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "streamed")
    layer(x)
    with pytest.raises(RuntimeError, match=r"streamed cannot be met: .*float64"):
        layer.double()(x.double())


def test_explain_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["256", "32", "256", "256"]
    assert info.main(["--explain", *sizes, "gru", "bfloat16", "a100", "--backend", "triton"]) == 0
    assert "streamed: " in capsys.readouterr().out


def test_what_the_interpreter_cannot_multiply(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 goes step by step there, or is refused."""
    if device == "cuda":
        pytest.skip("on a GPU it can be had")
    layer = fastrnn.GRU(3, 4, dtype=torch.bfloat16)
    layer(torch.randn(2, 2, 3, dtype=torch.bfloat16))[0].sum().backward()
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "resident")
    with pytest.raises(RuntimeError, match="does not support products of bfloat16"):
        layer(torch.randn(2, 2, 3, dtype=torch.bfloat16))


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    text = info.explain(256, 32, 256, 128, "lstm", "bfloat16", "h100", backend="triton")
    assert re.search(r"kernel +resident: \d+\.\d us a step predicted", text)
    assert re.search(r"not +step: \d+\.\d us a step predicted", text)
    assert re.search(r"tiles +16 rows, 128 units", text)
    monkeypatch.setenv("FASTRNN_TRITON_KERNEL", "step")
    text = info.explain(256, 32, 256, 128, "lstm", "bfloat16", "h100", backend="triton")
    assert re.search(r"kernel +step: asked for", text)
    with pytest.raises(ValueError, match="kernel 'resident' cannot run this: resident: W_hh"):
        info.explain(1, 1, 1, 256, "lstm", "bfloat16", "h100", kernel="resident", backend="triton")
    with pytest.raises(ValueError, match="unknown kernel 'fast', expected one of auto, resident"):
        info.explain(1, 1, 1, 1, "lstm", "bfloat16", "h100", kernel="fast", backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cudnn', expected native or triton"):
        info.explain(1, 1, 1, 1, "lstm", "bfloat16", "h100", backend="cudnn")
