"""The operators of the Triton backend: their contract, what they refuse, when they are chosen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastrnn
from fastrnn import _backend, _ops, reference
from fastrnn.triton import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy, of a mask
T, B, I, H = 4, 3, 5, 6  # noqa: E741


def ops() -> Any:
    return torch.ops.fastrnn_triton


def arguments(
    cell: str, device: str, groups: int = 1, direction: int = 0, packed: bool = False
) -> list[Any]:
    """Those of `layer`, without `save`."""
    G = reference.CELLS[cell].gates
    shapes = ((G * H, I), (G * H, H), (G * H,), (G * H,))
    weights = [torch.randn(*s, device=device) * 0.4 for _ in range(groups) for s in shapes]
    batch_sizes = torch.tensor([3, 3, 1]) if packed else None
    x = torch.randn(*((7, I) if packed else (T, B, I)), device=device)
    h0 = torch.randn(groups, B, H, device=device)
    c0 = torch.randn_like(h0) if cell == "lstm" else None
    return [cell, x, weights, h0, c0, batch_sizes, groups, direction]


def backward_arguments(call: list[Any], forward: tuple[Tensor, ...]) -> list[Any]:
    cell, x, weights, h0, c0, batch_sizes, groups, direction = call
    output, h_n, c_n, cells, saved = forward
    dc_n = torch.ones_like(c_n) if c0 is not None else None
    wanted = [1, 1, int(c0 is not None), *[1] * len(weights)]
    return [
        cell, torch.ones_like(output), torch.ones_like(h_n), dc_n, x, output, cells, saved, weights,
        h0, c0, batch_sizes, groups, direction, wanted,
    ]  # fmt: skip


@pytest.mark.skipif(_ops.native_error is not None, reason="pure-Python install")
def test_schemas_are_those_of_the_native_operators() -> None:
    for name in ("layer", "layer_backward"):
        ours = getattr(ops(), name).default._schema
        native = getattr(torch.ops.fastrnn, name).default._schema
        assert str(ours).replace("fastrnn_triton::", "fastrnn::") == str(native)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("groups", "direction"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_results_are_those_of_the_reference(
    device: str, kernel: str, cell: str, direction: int, groups: int, packed: bool
) -> None:
    """Also what backward needs, cells and saved; one reversed direction, which no module has."""
    call = arguments(cell, device, groups, direction, packed)
    found = ops().layer(*call, True)
    for ours, theirs in zip(found, reference.layer(*call), strict=True):
        torch.testing.assert_close(ours, theirs, check_stride=False)
    _, _, _, cells, saved = without = ops().layer(*call, False)
    assert cells.numel() == saved.numel() == 0
    for ours, theirs in zip(without[:3], found[:3], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_that_nobody_wants(device: str, kernel: str, cell: str) -> None:
    """Empty, and the others are the same; gradients that are not given count as zeros."""
    call = arguments(cell, device)
    given = backward_arguments(call, ops().layer(*call, True))
    dx, dw, dh0, dc0 = ops().layer_backward(*given)
    none = ops().layer_backward(*given[:-1], [0] * len(given[-1]))
    assert [t.numel() for t in (none[0], *none[1], *none[2:])] == [0] * len(given[-1])
    only = ops().layer_backward(*given[:-1], [0, 0, 0, 0, 1, *[0] * (len(given[-1]) - 5)])
    assert torch.equal(only[1][1], dw[1])
    zeros = [g if g is None else torch.zeros_like(g) for g in given[1:4]]
    one = ops().layer_backward(given[0], given[1], zeros[1], zeros[2], *given[4:])
    two = ops().layer_backward(given[0], given[1], None, None, *given[4:])
    for a, b in zip((one[0], *one[1], *one[2:]), (two[0], *two[1], *two[2:]), strict=True):
        torch.testing.assert_close(a, b)
    assert dx.shape == call[1].shape
    assert dh0.shape == call[3].shape
    assert dc0.numel() == (dh0.numel() if cell == "lstm" else 0)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_opcheck(device: str, cell: str) -> None:
    utilities = ("test_schema", "test_faketensor")
    call = arguments(cell, device)
    opcheck(ops().layer.default, (*call, True), test_utils=utilities)
    given = backward_arguments(call, ops().layer(*call, True))
    opcheck(ops().layer_backward.default, tuple(given), test_utils=utilities)


REFUSED = {
    "unknown cell 'mgu'": (0, "mgu"),
    "must have 3 dimensions, got 2": (1, torch.zeros(B, I)),
    "the input must be float32, float64": (1, torch.zeros(T, B, I, dtype=torch.int64)),
    "weight_ih must have dtype torch.float64": (1, torch.zeros(T, B, I, dtype=torch.float64)),
    "weight_ih must have shape": (1, torch.zeros(T, B, I + 1)),
    "Expected sequence length to be larger than 0": (1, torch.zeros(0, B, I)),
    "3 weights are not 2 to 5 for each of 2 groups": (6, 2),
    "h0 must have shape": (3, torch.zeros(1, B + 1, H)),
    "h0 must have dtype": (3, torch.zeros(1, B, H).double()),
    "has no cell state, but one was given": (4, torch.zeros(1, B, H)),
    "direction must be 0, 1 or 2, got 3": (7, 3),
    "direction 2 needs an even number of groups, got 1": (7, 2),
    "batch_sizes must be an int64 tensor": (5, torch.tensor([3.0])),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_layer_refuses(device: str, text: str) -> None:
    place, value = REFUSED[text]
    if isinstance(value, Tensor) and place != 5:
        value = value.to(device)
    call = arguments("gru", device)
    if text.startswith("3 weights"):
        call[2] = call[2][:3]
    if place == 5:
        call[1] = call[1].flatten(0, 1)
    call[place] = value
    with pytest.raises(RuntimeError, match=text):
        ops().layer(*call, True)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [([3, 4, 0], "must be positive and must not increase"), ([3, 3], "sum to 6 rows, the data"),
     ([8, 1], "must be positive and must not increase"), ([], "must be an int64 tensor")],
)  # fmt: skip
def test_batch_sizes_that_do_not_fit(device: str, sizes: list[int], text: str) -> None:
    call = arguments("gru", device, packed=True)
    call[5] = torch.tensor(sizes, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=text):
        ops().layer(*call, True)
    call[3], call[5] = None, torch.tensor([3, 3, 1])
    with pytest.raises(RuntimeError, match="packed data needs h0"):
        ops().layer(*call, True)


@pytest.mark.parametrize(
    ("place", "name"),
    [(1, "doutput"), (2, "dh_n"), (3, "dc_n"), (5, "output"), (6, "cells"), (7, "saved")],
)
def test_what_layer_backward_refuses(device: str, place: int, name: str) -> None:
    """Arrays that are too small are not read."""
    call = arguments("lstm", device)
    given = backward_arguments(call, ops().layer(*call, True))
    given[place] = given[place][..., :-1].contiguous()
    with pytest.raises(RuntimeError, match=f"{name} must have shape"):
        ops().layer_backward(*given)
    given = backward_arguments(call, ops().layer(*call, True))
    with pytest.raises(RuntimeError, match="wanted must hold 7 flags, got 6"):
        ops().layer_backward(*given[:-1], given[-1][1:])


def freed(tensor: Tensor) -> Tensor:
    """The tensor, after somebody has given its memory back, as FSDP does."""
    tensor.untyped_storage().resize_(0)
    return tensor


def test_storages_that_were_freed_are_not_read(device: str) -> None:
    for place, name in ((1, "the input"), (3, "h0"), (4, "c0")):
        call = arguments("lstm", device)
        freed(call[place])
        with pytest.raises(RuntimeError, match=f"the storage of {name} holds 0 bytes"):
            ops().layer(*call, True)
    call = arguments("lstm", device)
    freed(call[2][1])
    with pytest.raises(RuntimeError, match="the storage of a weight holds 0 bytes"):
        ops().layer(*call, True)
    for place, name in ((1, "doutput"), (2, "dh_n"), (3, "dc_n"), (4, "the input"),
                        (5, "output"), (6, "cells"), (7, "saved")):  # fmt: skip
        call = arguments("lstm", device)
        given = backward_arguments(call, ops().layer(*call, True))
        freed(given[place])
        with pytest.raises(RuntimeError, match=f"the storage of {name} holds 0 bytes"):
            ops().layer_backward(*given)


def test_results_do_not_depend_on_autocast(device: str) -> None:
    """An operator computes in the dtype of its tensors, whatever is around it."""
    call = arguments("lstm", device)
    given = backward_arguments(call, ops().layer(*call, True))
    alone = ops().layer_backward(*given)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = ops().layer_backward(*given)
    for a, b in zip((alone[0], *alone[1]), (inside[0], *inside[1]), strict=True):
        assert torch.equal(a, b)


class Kernel:
    """What Triton makes of a kernel, and of one that it has compiled."""

    arg_names = ("x", "H", "row0", "BLOCK_B")

    def __init__(self, is_compiled: bool = False) -> None:
        self.calls: list[Any] = []
        self.compiled = None if is_compiled else Kernel(True)

    def __getitem__(self, grid: Any) -> Any:
        def run(*positional: Any, **named: Any) -> Kernel | None:
            self.calls.append((grid, positional, named))
            return self.compiled

        return run


def test_later_launches_run_what_the_first_has_compiled() -> None:
    """With the arguments of that one in their order, but for the numbers they are given."""
    kernel = Kernel()
    launched = launch.Launch(kernel, {"BLOCK_B": 16, "num_warps": 4}, H=5, x="array")
    launched((0, 1, 1), row0=9)  # of no rows
    launched((2, 1, 1), row0=1)
    launched((3, 1, 1), row0=2)
    launched((3, 1, 1), row0=3)
    given = {"H": 5, "x": "array", "row0": 1, "BLOCK_B": 16, "num_warps": 4}
    assert kernel.calls == [((2, 1, 1), (), given)]
    assert kernel.compiled is not None
    later = [((3, 1, 1), ("array", 5, row, 16), {}) for row in (2, 3)]
    assert kernel.compiled.calls == later
    with pytest.raises(AssertionError):
        launched((3, 1, 1), H=6)  # the kernel was compiled for another one


# When it is chosen


def test_chosen_on_a_gpu_where_the_extension_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_backend, "_why_not_gpu", lambda _: "this build has no CUDA kernels")
    monkeypatch.setattr(_backend, "_why_not_triton_on", lambda _: None)
    with FakeTensorMode(), fastrnn.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.empty(T, B, I, device="cuda")
        assert _backend.resolve([x]) == "triton"
        if _ops.native_error is None:
            assert _backend.resolve([torch.empty(T, B, I)]) == "native"
        shapes = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)] * 2
        weights = [torch.empty(*shape, device="cuda") for shape in shapes]
        with torch.no_grad():  # the fake kernel of fastrnn_triton
            output, (h_n, _) = fastrnn.functional.lstm(x, weights, bidirectional=True)
        assert (output.shape, h_n.shape) == ((T, B, 2 * H), (2, B, H))
        assert output.device.type == "cuda"


def test_not_chosen_where_the_extension_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if _ops.native_error is not None:
        pytest.skip(_ops.native_error)
    monkeypatch.setattr(_backend, "_why_not_gpu", lambda _: None)
    with FakeTensorMode(), fastrnn.use_backend("auto"):
        assert _backend.resolve([torch.empty(T, B, I, device="cuda")]) == "native"


def test_gpus_on_which_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = torch.device("cuda", 90), torch.device("cuda", 91)
    has = {old: (7, 5), new: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", has.__getitem__)
    needs = _backend._why_not_triton_on(old)
    assert needs == "Triton needs compute capability 8.0 or later, and cuda:90 has 7.5"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backend.shutil, "which", lambda _: None)
    assert "Triton needs a C compiler" in str(_backend._why_not_triton_on(new))


def test_reasons_where_neither_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_why_not_gpu", lambda _: "this build has no CUDA kernels")
    monkeypatch.setattr(_backend, "triton_error", lambda: "Triton is not installed")
    monkeypatch.setattr(_backend, "_warned", set())
    native = "this build has no CUDA kernels" if _ops.native_error is None else _ops.native_error
    with FakeTensorMode(), fastrnn.use_backend("auto"):
        x = torch.empty(T, B, I, device="cuda")
        with pytest.warns(UserWarning, match=f"{native}; Triton is not installed"):
            assert _backend.resolve([x]) == "reference"
    with FakeTensorMode(), pytest.raises(RuntimeError, match="'triton' is not available: Triton"):
        _backend.resolve([x])


def test_what_the_backend_refuses(device: str) -> None:
    x = torch.zeros(T, B, I, device=device)
    weights = [p.detach() for p in fastrnn.GRU(I, H, device=device).parameters()]
    with pytest.raises(RuntimeError, match=r"'triton' cannot run this: .*forward-mode"):
        torch.func.jvp(lambda x: fastrnn.functional.gru(x, weights)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match=r"'triton' cannot run this: .*meta"):
        fastrnn.GRU(I, H, device="meta")(x.to("meta"))
    with pytest.raises(ValueError, match="RNN input dtype"):
        fastrnn.GRU(I, H, device=device)(x.to(torch.int32))


def test_double_backward_is_that_of_the_reference(device: str) -> None:
    layer = fastrnn.GRU(3, 2, device=device).double()
    x = torch.randn(2, 1, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_backward_runs_where_its_forward_ran(device: str) -> None:
    layer, x = fastrnn.LSTM(3, 4, device=device), torch.randn(3, 2, 3, device=device)
    loss = layer(x)[0].sum()
    with fastrnn.use_backend("reference"):
        loss.backward()
    found = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    with fastrnn.use_backend("reference"):
        layer(x)[0].sum().backward()
    torch.testing.assert_close(found, layer.weight_hh_l0.grad)


def test_output_may_be_changed_in_place(device: str) -> None:
    layer, x = fastrnn.LSTM(3, 4, device=device), torch.randn(3, 2, 3, device=device)
    gradients = []
    for change in (False, True):
        layer.zero_grad()
        output = layer(x)[0]
        loss = (output * 2).sum()
        if change:
            output.mul_(2)
            loss = output.sum()
        loss.backward()
        gradients.append(layer.weight_hh_l0.grad)
    torch.testing.assert_close(*gradients)
