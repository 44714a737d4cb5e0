"""The kernels that run all steps, against torch.nn by the rule, in numbers of 16 bits: of a few
rows in one block (FASTRNN_CUDA_KERNEL=persistent-block, csrc/cuda/block_kernels.h), or of a few
units in each of many (persistent-grid, grid_kernels.h) with either exchange; the rest of those is
in test_gpu_grid.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_gpu_parity import LONG, states
from torch import Tensor, nn

import fastrnn
from cases import CASES, CELLS, DTYPES, Case, expected
from compare import check, check_identical

LOW = ["bfloat16", "float16"]
MOST_UNITS = 128


@pytest.fixture(autouse=True, params=["block", "grid-words", "grid-flags"])
def persistent(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """The kernel that runs; by its name in FASTRNN_CUDA_KERNEL."""
    kernel, _, exchange = request.param.partition("-")
    monkeypatch.setenv("FASTRNN_CUDA_KERNEL", f"persistent-{kernel}")
    monkeypatch.setenv("FASTRNN_GRID_EXCHANGE", exchange)
    return f"persistent-{kernel}"


# Rows that fill a block and one more, units that fill no fragment, sizes of either instance; rows
# that enter and leave at all steps, several blocks of them.
SIZES = [
    Case("block-full", "as many rows as a block has", T=4, B=8, H=16),
    Case("block-and-one", "a block of one row", T=4, B=9, H=32),
    Case("H64", "the smaller instance, full", T=4, B=3, I=9, H=64, bidirectional=True),
    Case("H66", "the larger one, a pair beyond a fragment", T=4, B=2, H=66),
    Case("H127", "the larger one, units one by one", T=3, B=2, H=127),
    Case("H128", "the larger one, full", T=3, B=2, H=128),
    Case("packed-blocks", "a block whose rows have all left", bidirectional=True, H=10,
         lengths=(9, 9, 8, 8, 8, 5, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1)),
]  # fmt: skip


# Of grids: flags have the bits of the words (test_gpu_grid.py), and the products of the two dtypes
# differ in one instruction, so that not every case needs each of them.
LAYERS = [("block", dtype, case) for dtype in LOW for case in CASES + LONG + SIZES]
LAYERS += [("grid-words", "bfloat16", case) for case in CASES]
LAYERS += [
    (kernel, dtype, case)
    for kernel in ("grid-words", "grid-flags")
    for dtype in LOW
    for case in LONG + SIZES
]


@pytest.mark.parametrize(
    ("persistent", "dtype", "case"), LAYERS, indirect=["persistent"],
    ids=[f"{kernel}-{dtype}-{case.id}" for kernel, dtype, case in LAYERS],
)  # fmt: skip
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm_proj"])
def test_layer(device: str, persistent: str, cell: str, dtype: str, case: Case) -> None:
    problem, torch_same, ref64 = expected(cell, case, DTYPES[dtype], device)
    if persistent == "persistent-block" and case.H > MOST_UNITS:
        with pytest.raises(RuntimeError, match="block cannot be met: H=150"):
            problem.run(fastrnn, device=device)
        return
    first = problem.run(fastrnn, device=device)
    check(first, torch_same, ref64)
    check_identical(problem.run(fastrnn, device=device), first)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_more_steps_than_fit_into_the_arguments_of_a_kernel(
    device: str, name: str, dtype: str
) -> None:
    """The offsets of packed steps go to the device a few hundred at a time."""
    low = DTYPES[dtype]
    layer = getattr(fastrnn, name)(2, 4).to(device, low)
    x = torch.randn(1000, 2, 2, device=device).to(low)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([1000, 901]))
    output, state = torch.nn.utils.rnn.pad_packed_sequence(layer(packed)[0])[0], layer(packed)[1]
    plain = layer(x)[0]
    check_identical(
        {"row 0": output[:, 0], "row 1": output[:901, 1], "h_n": states(state)[0][0, 1]},
        {"row 0": plain[:, 0], "row 1": plain[:901, 1], "h_n": plain[900, 1]},
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(
    device: str, name: str, dtype: str, value: float
) -> None:
    low = DTYPES[dtype]
    layer = getattr(fastrnn, name)(6, 20).to(device, low)
    x = torch.randn(5, 10, 6, device=device).to(low)
    clean = layer(x)[0]
    x[2, 3, 1] = value
    output = layer(x)[0]
    others = [b for b in range(10) if b != 3]
    assert torch.equal(output[:, others], clean[:, others])
    if value != value:
        assert output[2:, 3].isnan().all()


@pytest.mark.parametrize("H", [20, 64, 77])
def test_infinity_in_units_that_fill_no_tile(device: str, H: int) -> None:
    """Zero weights of units that are not there times infinity must not come back."""
    layer = fastrnn.RNN(3, H, nonlinearity="relu").to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    x = torch.ones(6, 9, 3, device=device, dtype=torch.bfloat16)
    x[1, 4, 0] = float("inf")
    output = layer(x)[0]
    assert not output.isnan().any()
    assert output[1:, 4].isinf().all()
    output[:, 0].sum().backward()
    assert layer.bias_hh_l0.grad.isfinite().all()  # of weights: infinity times zero, as in torch.nn


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("H", [5, 20, 64])
def test_an_infinite_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch, persistent: str, name: str, H: int
) -> None:
    """Goes where that of a product and a kernel per step goes."""
    layer = getattr(fastrnn, name)(3, H).to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
    x = torch.randn(5, 2, 3, device=device).bfloat16().requires_grad_()
    found = {}
    for kernel in ("step", persistent):
        monkeypatch.setenv("FASTRNN_CUDA_KERNEL", kernel)
        h_n = states(layer(x)[1])[0]
        slope = torch.zeros_like(h_n)
        slope[0, 1, 2] = float("inf")
        (found[kernel],) = torch.autograd.grad(h_n, x, slope)
    assert torch.equal(found["step"].isnan(), found[persistent].isnan())
    assert torch.equal(found["step"].isinf(), found[persistent].isinf())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_arrays_that_begin_at_an_odd_element(device: str, name: str, dtype: str) -> None:
    """Weights, states and gradients."""
    low = DTYPES[dtype]

    def apart(t: Tensor) -> Tensor:
        larger = torch.empty(t.numel() + 1, dtype=low, device=device)
        larger[1:] = t.detach().flatten()
        return larger[1:].view(t.shape)

    theirs = getattr(nn, name)(4, 8).to(low)
    sizes = ((5, 3, 4), (1, 3, 8), (5, 3, 8))
    given = [torch.randn(*size).to(low) for size in sizes]

    def results(layer: nn.Module, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        for parameter in layer.parameters():
            parameter.data = place(parameter.data)
        like = next(layer.parameters())
        x, h, dy = (place(t.to(like)) for t in given)
        output, state = layer(x, (h, h) if name == "LSTM" else h)
        found = [output, *states(state)]
        slopes = [dy, *(h for _ in states(state))]
        grads = torch.autograd.grad(found, list(layer.parameters()), slopes)
        tensors = [t.detach().cpu() for t in (*found, *grads)]
        return {str(n): t for n, t in enumerate(tensors)}

    ours = getattr(fastrnn, name)(4, 8).to(low)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    exact = results(copy.deepcopy(theirs).double(), torch.clone)
    same = results(theirs, torch.clone)
    for place in (torch.clone, apart):
        check(results(ours, place), same, exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_numbers_that_mean_something_to_the_exchange(device: str, name: str, dtype: str) -> None:
    """NaN whose bits are all ones, in initial states, weights and gradients: what has not been
    published looks like that."""
    low = DTYPES[dtype]
    reserved = torch.full((1,), -1, dtype=torch.int16).view(low).to(device)
    assert reserved.isnan().all()
    layer = getattr(fastrnn, name)(3, 20).to(device, low)
    x = torch.randn(6, 9, 3, device=device).to(low).requires_grad_()
    h0 = torch.randn(1, 9, 20, device=device).to(low)
    clean = layer(x, (h0, h0) if name == "LSTM" else h0)[0].detach()
    h0[0, 3] = reserved
    output = layer(x, (h0, h0) if name == "LSTM" else h0)[0]
    others = [b for b in range(9) if b != 3]
    assert output[:, 3].isnan().all()
    assert torch.equal(output[:, others], clean[:, others])
    slope = torch.ones_like(output)
    slope[3, 5] = reserved
    (dx,) = torch.autograd.grad(output, x, slope)
    assert dx[:, 5][:4].isnan().any()
    assert dx[4:, 5].isfinite().all()
    assert dx[:, [b for b in others if b != 5]].isfinite().all()


