"""Which kernel runs a pass on a GPU (csrc/cuda/plan.h): what is asked for, or an error with the
reason."""

from __future__ import annotations

import pytest
import torch

import cuda_on_host
import fastrnn

on_host = pytest.mark.skipif(torch.cuda.is_available(), reason="the host counts what it runs")


@pytest.mark.parametrize(
    ("kernel", "layer", "dtype", "reason"),
    [
        ("block", ("LSTM", 4), torch.float32, "its products are those of bfloat16 and float16"),
        ("block", ("LSTM", 4, 2), torch.bfloat16, "it has no projection"),
        ("block", ("GRU", 130), torch.bfloat16, "H=130: weight_hh fits"),
        ("grid", ("LSTM", 4), torch.float64, "it has no float64"),
        ("grid", ("LSTM", 4, 2), torch.bfloat16, "it has no projection"),
    ],
)
def test_what_it_cannot_run_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch, kernel: str, layer: tuple[str, int],
    dtype: torch.dtype, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", f"persistent-{kernel}")
    name, H, *P = layer
    made = getattr(fastrnn, name)(2, H, **({"proj_size": P[0]} if P else {})).to(device, dtype)
    with pytest.raises(RuntimeError, match=f"persistent-{kernel} cannot be met: {reason}"):
        made(torch.ones(1, 1, 2, device=device, dtype=dtype))


def test_as_many_multiprocessors_as_are_allowed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", "persistent-grid")
    layer = fastrnn.RNN(2, 40).to(device, torch.bfloat16)
    x = torch.randn(3, 30, 2, device=device).bfloat16()
    outputs = []
    for most in ("", "3", "6"):  # 4 tiles of rows in one row group, one, two
        monkeypatch.setenv("FASTRNN_MAX_SMS", most)
        outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    monkeypatch.setenv("FASTRNN_MAX_SMS", "2")
    with pytest.raises(RuntimeError, match="H=40: its 3 blocks of 16 units do not fit on 2 mult"):
        layer(x)
    for wrong in ("0", "-1", "many", "3x"):
        monkeypatch.setenv("FASTRNN_MAX_SMS", wrong)
        with pytest.raises(RuntimeError, match=f"FASTRNN_MAX_SMS must be .*{wrong}"):
            layer(x)
    monkeypatch.setenv("FASTRNN_MAX_SMS", "")
    monkeypatch.setenv("FASTRNN_GRID_EXCHANGE", "letters")
    with pytest.raises(RuntimeError, match="FASTRNN_GRID_EXCHANGE must be words or flags"):
        layer(x)


@on_host
@pytest.mark.parametrize("persistent", ["", "1"])
def test_it_runs_where_it_is_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch, persistent: str
) -> None:
    """By itself only with FASTRNN_PERSISTENT=1, which leaves what it cannot run to the others."""
    monkeypatch.setenv("FASTRNN_PERSISTENT", persistent)

    def ran(kernel: str, dtype: torch.dtype, H: int = 4) -> tuple[int, int]:
        """Blocks, grids."""
        monkeypatch.setenv("FASTRNN_CUDA_KERNEL", kernel)
        before = cuda_on_host.programs()
        layer = fastrnn.LSTM(2, H).to(device, dtype)
        layer(torch.ones(3, 9, 2, device=device, dtype=dtype))
        after = cuda_on_host.programs()
        return after.blocks - before.blocks, after.grids - before.grids

    low = torch.bfloat16
    assert ran("persistent-block", low) == (2, 0)
    assert ran("persistent-grid", low)[0] == 0
    assert ran("persistent-grid", low)[1] > 0
    assert ran("step", low) == (0, 0)
    assert ran("auto", low) == ((2, 0) if persistent else (0, 0))
    assert (ran("auto", low, 140)[1] > 0) == bool(persistent)
    assert (ran("auto", torch.float32)[1] > 0) == bool(persistent)
    assert ran("auto", torch.float64) == (0, 0)
    monkeypatch.setenv("FASTRNN_DISABLE_PERSISTENT", "1")
    assert ran("auto", low) == (0, 0)
    for kernel in ("block", "grid"):
        with pytest.raises(RuntimeError, match="cannot be met: FASTRNN_DISABLE_PERSISTENT=1"):
            ran(f"persistent-{kernel}", low)


@on_host
def test_a_kernel_that_gave_up_is_told_at_the_next_pass(device: str) -> None:
    layer, x = fastrnn.GRU(2, 4).to(device), torch.ones(1, 1, 2, device=device)
    for word, text in ((2 * (7 + 1), "forward .* in step 7 "), (2 * (0 + 1) + 1, "backward .* 0 ")):
        cuda_on_host.report(word)
        with pytest.raises(RuntimeError, match=f"gave up on a GPU in an earlier {text}"):
            layer(x)
        layer(x)
