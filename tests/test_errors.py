"""Wrong calls to the layers and cells: each raises what torch.nn raises, none ends the process.

torch.nn is called in the same test.  Where it accepts nonsense or reads out of bounds, the entry
names the exception that fastrnn raises instead.  Wrong calls to the constructors are in
test_drop_in.py, to the functional interface and the operators in test_errors_low_level.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, build, make_hx, states
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn

SAME = "same exception type and message as torch.nn"
TYPE = "same exception type as torch.nn; a message of its own"


@dataclass(frozen=True)
class Wrong:
    """A call that must raise.  ``call`` gets the layer and its name; T=2, B=2, I=3, H=4."""

    id: str
    call: Callable[[Any, str], Any]
    like: str = SAME
    error: type[Exception] | None = None  # given: torch.nn does not raise, or not for this reason
    says: str = ""  # a pattern in fastrnn's message
    names: tuple[str, ...] = LAYERS
    options: dict[str, Any] = field(default_factory=dict)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 2, 3), dtype=dtype)


def hx(name: str, *shape: int, change: Callable[[Tensor], Tensor] = lambda h: h) -> Any:
    made = tuple(change(h) for h in states(make_hx(name, *(shape or (1, 2, 4)))))
    return made if len(made) > 1 else made[0]


def to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def pack(
    batch_sizes: Any = (2, 2, 1), data: Tensor | None = None, indices: Any = (None, None)
) -> PackedSequence:
    """Packed data as no function of torch makes it."""
    sizes = torch.tensor(batch_sizes) if isinstance(batch_sizes, tuple) else batch_sizes
    return PackedSequence(x(5, 3) if data is None else data, sizes, *indices)


def with_parameter(layer: Any, name: str, change: Callable[[Tensor], Tensor]) -> Any:
    setattr(layer, name, nn.Parameter(change(getattr(layer, name).detach())))
    return layer


INPUTS = [
    Wrong("no input", lambda m, n: m(), TYPE, says="missing 1 required positional argument"),
    Wrong("surplus argument", lambda m, n: m(x(), None, None), TYPE, says="but 4 were given"),
    Wrong("unknown keyword", lambda m, n: m(x(), h0=None), TYPE, says="unexpected keyword"),
    Wrong("input None", lambda m, n: m(None), TYPE),
    Wrong("input list", lambda m, n: m([[1.0, 2.0, 3.0]]), TYPE),
    Wrong("input 0-D", lambda m, n: m(torch.tensor(1.0))),
    Wrong("input 1-D", lambda m, n: m(x(3))),
    Wrong("input 4-D", lambda m, n: m(x(1, 2, 2, 3))),
    Wrong("input float64", lambda m, n: m(x(dtype=torch.float64))),
    Wrong("input float16", lambda m, n: m(x(dtype=torch.float16))),
    Wrong("input int64", lambda m, n: m(x(dtype=torch.int64))),
    Wrong("input bool", lambda m, n: m(x(dtype=torch.bool))),
    Wrong("input complex", lambda m, n: m(x(dtype=torch.complex64))),
    Wrong("input sparse", lambda m, n: m(x().to_sparse()), TYPE),
    Wrong("input meta", lambda m, n: m(x().to("meta")), TYPE, says="device"),
    Wrong("weights meta", lambda m, n: m(x()), TYPE, says="device", options={"device": "meta"}),
    Wrong("features", lambda m, n: m(x(2, 2, 4))),
    Wrong("no features", lambda m, n: m(x(2, 2, 0))),
    Wrong("features unbatched", lambda m, n: m(x(2, 4))),
    Wrong("no steps", lambda m, n: m(x(0, 2, 3))),
    Wrong("no steps batch_first", lambda m, n: m(x(2, 0, 3)), options={"batch_first": True}),
    Wrong("no steps unbatched", lambda m, n: m(x(0, 3))),
    Wrong("bidirectional int", lambda m, n: m(x()), TYPE, options={"bidirectional": 1}),
]
STATES = [
    Wrong("hx batch", lambda m, n: m(x(), hx(n, 1, 3, 4))),
    Wrong("hx batch of one", lambda m, n: m(x(), hx(n, 1, 1, 4))),
    Wrong("hx layers", lambda m, n: m(x(), hx(n, 2, 2, 4))),
    Wrong("hx size", lambda m, n: m(x(), hx(n, 1, 2, 5))),
    Wrong("hx directions", lambda m, n: m(x(), hx(n)), options={"bidirectional": True}),
    Wrong(
        "hx batch first", lambda m, n: m(x(2, 5, 3), hx(n, 2, 1, 4)), options={"batch_first": True}
    ),
    Wrong("hx 2-D batched", lambda m, n: m(x(), hx(n, 2, 4))),
    Wrong("hx 4-D batched", lambda m, n: m(x(), hx(n, 1, 1, 2, 4))),
    Wrong("hx 3-D unbatched", lambda m, n: m(x(2, 3), hx(n, 1, 1, 4))),
    Wrong("hx size unbatched", lambda m, n: m(x(2, 3), hx(n, 1, 5))),
    Wrong("hx float64", lambda m, n: m(x(), hx(n, change=Tensor.double)), TYPE, says="dtype"),
    Wrong("hx float16", lambda m, n: m(x(), hx(n, change=Tensor.half)), TYPE, says="dtype"),
    Wrong("hx int64", lambda m, n: m(x(), hx(n, change=Tensor.long)), TYPE, says="dtype"),
    Wrong("hx complex", lambda m, n: m(x(), hx(n, change=lambda h: h + 0j)), TYPE, says="dtype"),
    Wrong("hx meta", lambda m, n: m(x(), hx(n, change=to_meta)), TYPE, says="device"),
    Wrong("hx number", lambda m, n: m(x(), 0.5), TYPE),
    Wrong("hx tuple", lambda m, n: m(x(), (torch.zeros(1, 2, 4),) * 2), TYPE, names=("RNN", "GRU")),
    Wrong("hx one of two", lambda m, n: m(x(), (torch.zeros(1, 2, 4),)), TYPE),
    Wrong("hx three", lambda m, n: m(x(), (torch.zeros(1, 2, 4),) * 3), TYPE),
]
LSTM_STATES = [
    Wrong("h only", lambda m, n: m(x(), torch.zeros(1, 2, 4)), TYPE),
    Wrong("stacked", lambda m, n: m(x(), torch.zeros(2, 1, 2, 4)), TYPE),
    Wrong("c None", lambda m, n: m(x(), (torch.zeros(1, 2, 4), None)), TYPE),
    Wrong("h None", lambda m, n: m(x(), (None, torch.zeros(1, 2, 4))), TYPE),
    Wrong("c size", lambda m, n: m(x(), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)))),
    Wrong("c batch", lambda m, n: m(x(), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)))),
    Wrong("c 2-D", lambda m, n: m(x(), (torch.zeros(1, 2, 4), torch.zeros(2, 4)))),
    Wrong("c 3-D unbatched", lambda m, n: m(x(2, 3), (torch.zeros(1, 4), torch.zeros(1, 1, 4)))),
    Wrong(
        "c float64",
        lambda m, n: m(x(), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())),
        TYPE,
        says="dtype",
    ),
    Wrong("h not projected", lambda m, n: m(x(), hx(n)), options={"proj_size": 2}),
    Wrong("c projected", lambda m, n: m(x(), hx(n, 1, 2, 2)), options={"proj_size": 2}),
]
PACKED = [
    # torch.nn drops the rest of the data
    Wrong("fewer rows", lambda m, n: m(pack((2, 1))), error=RuntimeError, says="batch_sizes"),
    Wrong("more rows", lambda m, n: m(pack((2, 2, 2))), TYPE, says="batch_sizes"),
    Wrong("increasing", lambda m, n: m(pack((1, 2, 2))), TYPE, says="batch_sizes"),
    Wrong("increasing later", lambda m, n: m(pack((2, 1, 2))), TYPE, says="batch_sizes"),
    Wrong("negative", lambda m, n: m(pack((3, 3, -1))), TYPE, says="batch_sizes"),
    # torch.nn accepts a step without rows, which no packing function makes
    Wrong("empty step", lambda m, n: m(pack((3, 2, 0))), error=RuntimeError, says="batch_sizes"),
    # this sum wraps around to the true number of rows
    Wrong("wrapping sum", lambda m, n: m(pack((*[2**62] * 4, 5))), TYPE),
    Wrong("overflowing sum", lambda m, n: m(pack((2**62, 2**62, 5))), TYPE, says="batch_sizes"),
    # torch.nn: IndexError for the missing first element
    Wrong(
        "no steps packed",
        lambda m, n: m(pack(torch.zeros(0, dtype=torch.int64), x(0, 3))),
        error=RuntimeError,
    ),
    Wrong(
        "float sizes", lambda m, n: m(pack((2.0, 2.0, 1.0))), error=RuntimeError, says="batch_sizes"
    ),
    Wrong(
        "int32 sizes",
        lambda m, n: m(pack(torch.tensor([2, 2, 1], dtype=torch.int32))),
        TYPE,
        says="batch_sizes",
    ),
    Wrong(
        "2-D sizes",
        lambda m, n: m(pack(torch.tensor([[2, 2, 1]]))),
        error=RuntimeError,
        says="batch_sizes",
    ),
    Wrong(
        "0-D sizes", lambda m, n: m(pack(torch.tensor(5))), error=RuntimeError, says="batch_sizes"
    ),
    Wrong("meta sizes", lambda m, n: m(pack(torch.tensor([2, 2, 1]).to("meta")))),
    Wrong("list sizes", lambda m, n: m(pack([2, 2, 1])), TYPE),
    Wrong("data 1-D", lambda m, n: m(pack(data=x(15))), TYPE, says="input must have 2 dimensions"),
    Wrong(
        "data 3-D", lambda m, n: m(pack(data=x(5, 1, 3))), TYPE, says="input must have 2 dimensions"
    ),
    Wrong("data features", lambda m, n: m(pack(data=x(5, 4))), TYPE, says="input_size. Expected 3"),
    Wrong("data meta", lambda m, n: m(pack(data=x(5, 3).to("meta"))), TYPE, says="device"),
    Wrong("data float64", lambda m, n: m(pack(data=x(5, 3).double())), TYPE, says="dtype"),
    Wrong("hx batch too large", lambda m, n: m(pack(), hx(n, 1, 3, 4)), TYPE, says="Expected hid"),
    Wrong("hx batch too small", lambda m, n: m(pack(), hx(n, 1, 1, 4)), TYPE, says="Expected hid"),
    Wrong("hx layers packed", lambda m, n: m(pack(), hx(n, 2, 2, 4)), TYPE, says="Expected hid"),
    # torch.nn.LSTM: IndexError
    Wrong(
        "hx 2-D packed",
        lambda m, n: m(pack(), hx(n, 2, 4)),
        error=RuntimeError,
        says="Expected hid",
    ),
    Wrong(
        "hx float64 packed",
        lambda m, n: m(pack(), hx(n, change=Tensor.double)),
        TYPE,
        says="dtype",
    ),
    Wrong(
        "sorted_indices out of range",
        lambda m, n: m(pack(indices=(torch.tensor([0, 5]), torch.tensor([0, 1]))), hx(n)),
    ),
    Wrong(
        "unsorted_indices out of range",
        lambda m, n: m(pack(indices=(torch.tensor([0, 1]), torch.tensor([0, 7]))), hx(n)),
    ),
    Wrong(
        "sorted_indices too few",
        lambda m, n: m(pack(indices=(torch.tensor([0]), torch.tensor([0]))), hx(n)),
        TYPE,
        says="sorted_indices",
    ),
]
WEIGHTS = [
    # torch.nn.LSTM accepts a recurrent weight of a wrong shape and reads what lies there
    Wrong(
        "weight shape",
        lambda m, n: with_parameter(m, "weight_hh_l0", lambda w: w[:2, :2])(x()),
        error=RuntimeError,
    ),
    Wrong(
        "weight one column less",
        lambda m, n: with_parameter(m, "weight_hh_l0", lambda w: w[:, :3])(x()),
        error=RuntimeError,
    ),
    Wrong(
        "input weight shape",
        lambda m, n: with_parameter(m, "weight_ih_l0", lambda w: w[:, :2])(x()),
        error=RuntimeError,
    ),
    Wrong("bias shape", lambda m, n: with_parameter(m, "bias_hh_l0", lambda b: b[:2])(x()), TYPE),
    Wrong(
        "weight float64", lambda m, n: with_parameter(m, "weight_hh_l0", Tensor.double)(x()), TYPE
    ),
    Wrong("bias float64", lambda m, n: with_parameter(m, "bias_hh_l0", Tensor.double)(x()), TYPE),
    Wrong(
        "weight meta",
        lambda m, n: with_parameter(m, "weight_hh_l0", to_meta)(x()),
        TYPE,
        says="device",
    ),
    Wrong("weight None", lambda m, n: (setattr(m, "weight_hh_l0", None), m(x())), TYPE),
]
CELL_CALLS = [
    Wrong("input None", lambda m, n: m(None), TYPE),
    Wrong("input 0-D", lambda m, n: m(torch.tensor(1.0))),
    Wrong("input 3-D", lambda m, n: m(x())),
    Wrong("features", lambda m, n: m(x(2, 4))),
    Wrong("features unbatched", lambda m, n: m(x(4))),
    Wrong("input float64", lambda m, n: m(x(2, 3).double()), TYPE, says="dtype"),
    Wrong("input int64", lambda m, n: m(x(2, 3).long()), TYPE, says="dtype"),
    Wrong("input complex", lambda m, n: m(x(2, 3) + 0j), TYPE, says="dtype"),
    Wrong("input meta", lambda m, n: m(x(2, 3).to("meta")), TYPE, says="device"),
    Wrong("hx size", lambda m, n: m(x(2, 3), hx(n, 2, 5))),
    Wrong("hx batch", lambda m, n: m(x(2, 3), hx(n, 3, 4))),
    Wrong("hx batch of one", lambda m, n: m(x(2, 3), hx(n, 1, 4))),
    Wrong("hx 3-D", lambda m, n: m(x(2, 3), hx(n, 1, 2, 4))),
    Wrong("hx 1-D batched", lambda m, n: m(x(2, 3), hx(n, 4)), TYPE),
    Wrong("hx 2-D unbatched", lambda m, n: m(x(3), hx(n, 1, 4)), TYPE),
    Wrong(
        "hx float64",
        lambda m, n: m(x(2, 3), hx(n, 2, 4, change=Tensor.double)),
        TYPE,
        None,
        "dtype",
    ),
    Wrong("hx int64", lambda m, n: m(x(2, 3), hx(n, 2, 4, change=Tensor.long)), TYPE, says="dtype"),
    Wrong("hx meta", lambda m, n: m(x(2, 3), hx(n, 2, 4, change=to_meta)), TYPE),
    Wrong("hx three", lambda m, n: m(x(2, 3), (torch.zeros(2, 4),) * 3), TYPE),
    Wrong("hx one of two", lambda m, n: m(x(2, 3), (torch.zeros(2, 4),)), TYPE),
    Wrong(
        "weight shape",
        lambda m, n: with_parameter(m, "weight_hh", lambda w: w[:2, :2])(x(2, 3)),
        TYPE,
    ),
    Wrong("bias shape", lambda m, n: with_parameter(m, "bias_hh", lambda b: b[:2])(x(2, 3)), TYPE),
]
LSTM_CELL_CALLS = [
    Wrong("h only", lambda m, n: m(x(2, 3), torch.zeros(2, 4)), TYPE),
    Wrong("c None", lambda m, n: m(x(2, 3), (torch.zeros(2, 4), None)), TYPE),
    Wrong("c size", lambda m, n: m(x(2, 3), (torch.zeros(2, 4), torch.zeros(2, 5)))),
    Wrong("c batch", lambda m, n: m(x(2, 3), (torch.zeros(2, 4), torch.zeros(3, 4)))),
]


def table() -> list[Any]:
    groups = [(INPUTS + STATES + PACKED + WEIGHTS, LAYERS), (LSTM_STATES, ("LSTM",))]
    groups += [(CELL_CALLS, CELLS), (LSTM_CELL_CALLS, ("LSTMCell",))]
    return [
        pytest.param(wrong, name, id=f"{name}-{wrong.id}")
        for wrongs, names in groups
        for wrong in wrongs
        for name in names
        if name in wrong.names or name in CELLS
    ]


def outcome(lib: Any, name: str, wrong: Wrong) -> Exception:
    layer = build(lib, name, 3, 4, **wrong.options)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared by the caller
        wrong.call(layer, name)
    return caught.value


@pytest.mark.parametrize(("wrong", "name"), table())
def test_wrong_call_raises(wrong: Wrong, name: str) -> None:
    got = outcome(fastrnn, name, wrong)
    if wrong.error is not None:
        assert isinstance(got, wrong.error)
    else:
        expected = outcome(nn, name, wrong)
        assert type(got) is type(expected)
        if wrong.like is SAME:
            assert str(got) == str(expected)
    assert str(got)
    assert wrong.says in str(got)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_layer_is_unharmed_by_wrong_calls(name: str) -> None:
    layer = build(fastrnn, name, 3, 4)
    good = x(2, 3) if name in CELLS else x()
    before = states(layer(good))[0].detach().clone()
    for wrong in INPUTS + STATES + PACKED if name in LAYERS else CELL_CALLS:
        if (
            wrong.options
            or name not in wrong.names + CELLS
            or wrong.id.startswith(("weight", "bias"))
        ):
            continue
        with pytest.raises(Exception):  # noqa: B017, PT011 - which one is tested above
            wrong.call(layer, name)
    assert torch.equal(states(layer(good))[0], before)


def test_table_is_large() -> None:
    assert len(table()) >= 80
