"""The surface of torch.nn's recurrent modules: constructors, attributes, parameters, repr.

What forward does is in test_drop_in_forward.py, wrong calls to it in test_errors.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, GATES, LAYERS, both_libraries, build, states
from torch import Tensor, nn

import fastrnn

DROPOUT_RANGE = (
    "dropout should be a number in range [0, 1] representing the probability of an element being "
    "zeroed"
)

POSITIONAL = [
    ("RNN", (3, 4, 2, "relu", False, True, 0.25, True)),
    ("LSTM", (3, 4, 2, False, True, 0.25, True, 2)),
    ("GRU", (3, 4, 2, False, True, 0.25, True)),
    ("GRU", (3, 4, 2, False, True, 0.25, True, 2)),
]


@both_libraries
@pytest.mark.parametrize(("name", "args"), POSITIONAL)
def test_positional_order(lib: ModuleType, name: str, args: tuple[Any, ...]) -> None:
    layer = getattr(lib, name)(*args)
    tail = args[-5:] if len(args) == 8 and name == "RNN" else args[3:]
    names = ("bias", "batch_first", "dropout", "bidirectional", "proj_size")
    expected = dict(zip(names, tail if name != "RNN" else args[4:], strict=False))
    expected |= {"input_size": 3, "hidden_size": 4, "num_layers": 2}
    expected["mode"] = "RNN_RELU" if name == "RNN" else name
    expected.setdefault("proj_size", 0)
    assert {key: getattr(layer, key) for key in expected} == expected
    assert isinstance(layer.dropout, float)
    assert layer.training
    assert set(expected) == set(type(layer).__constants__)


@both_libraries
@pytest.mark.parametrize(("nonlinearity", "mode"), [("tanh", "RNN_TANH"), ("relu", "RNN_RELU")])
def test_rnn_nonlinearity(lib: ModuleType, nonlinearity: str, mode: str) -> None:
    layer = lib.RNN(3, 4, nonlinearity=nonlinearity)
    assert (layer.nonlinearity, layer.mode) == (nonlinearity, mode)


BAD_ARGUMENTS = [
    ({"foo": 1}, TypeError, "RNNBase.__init__() got an unexpected keyword argument 'foo'"),
    ({"dropout": "a"}, ValueError, "could not convert string to float: 'a'"),
    ({"dropout": None}, TypeError, "float() argument must be a string or a real number"),
    ({"dropout": 1.5}, ValueError, DROPOUT_RANGE),
    ({"dropout": -0.1}, ValueError, DROPOUT_RANGE),
    ({"dropout": float("nan")}, ValueError, DROPOUT_RANGE),
    ({"dropout": True}, ValueError, DROPOUT_RANGE),
    ({"dropout": "0.5"}, ValueError, DROPOUT_RANGE),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"bias": None}, TypeError, "bias should be of type bool, got: NoneType"),
    ({"batch_first": 0}, TypeError, "batch_first should be of type bool, got: int"),
    ({"input_size": 3.0}, TypeError, "input_size should be of type int, got: float"),
    ({"input_size": 0}, ValueError, "input_size must be greater than zero"),
    ({"hidden_size": "4"}, TypeError, "hidden_size should be of type int, got: str"),
    ({"hidden_size": -4}, ValueError, "hidden_size must be greater than zero"),
    ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
    ({"num_layers": 1.5}, TypeError, "'float' object cannot be interpreted as an integer"),
    ({"dtype": torch.int64}, RuntimeError, ""),
    ({"dtype": "float32"}, TypeError, ""),
    ({"device": "nowhere"}, RuntimeError, ""),
]
BAD_PROJECTIONS = [
    (-1, "proj_size should be a positive integer or zero to disable projections"),
    (4, "proj_size has to be smaller than hidden_size"),
    (5, "proj_size has to be smaller than hidden_size"),
]


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_ARGUMENTS, ids=str)
def test_constructor_refuses(
    lib: ModuleType, name: str, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        getattr(lib, name)(**{"input_size": 3, "hidden_size": 4, **kwargs})
    assert str(caught.value).startswith(message)


@both_libraries
@pytest.mark.parametrize(("proj_size", "message"), BAD_PROJECTIONS)
def test_constructor_refuses_projection(lib: ModuleType, proj_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lib.LSTM(3, 4, proj_size=proj_size)


@both_libraries
@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_projection_keyword_is_for_lstm(lib: ModuleType, name: str, proj_size: int) -> None:
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN"):
        getattr(lib, name)(3, 4, proj_size=proj_size)


@both_libraries
def test_unknown_nonlinearity(lib: ModuleType) -> None:
    message = "Unknown nonlinearity 'x'. Select from 'tanh' or 'relu'."
    with pytest.raises(ValueError, match=message):
        lib.RNN(3, 4, nonlinearity="x")


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_missing_sizes(lib: ModuleType, name: str) -> None:
    with pytest.raises(TypeError, match="missing"):
        getattr(lib, name)(3)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_of_one_layer_warns(lib: ModuleType, name: str) -> None:
    message = (
        r"dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
        r"expects num_layers greater than 1, but got dropout=0.5 and num_layers=1"
    )
    with pytest.warns(UserWarning, match=message):
        getattr(lib, name)(3, 4, dropout=0.5)


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_number_of_layers_may_be_true(lib: ModuleType, name: str) -> None:
    assert len(list(getattr(lib, name)(3, 4, num_layers=True).parameters())) == 4


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_bidirectional_is_checked_in_forward(lib: ModuleType, name: str) -> None:
    layer = getattr(lib, name)(3, 4, bidirectional=1)
    with pytest.raises(TypeError):
        layer(torch.randn(2, 2, 3))


# Parameters

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]
PROJECTED = [{"proj_size": 2}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}]
CONFIGS = [(name, options) for name in LAYERS for options in OPTIONS]
CONFIGS += [("LSTM", options) for options in PROJECTED]
CONFIGS += [("RNN", {"nonlinearity": "relu"}), ("LSTM", {"proj_size": 2, "bias": False})]


@both_libraries
@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=str)
def test_parameter_names_order_and_shapes(
    lib: ModuleType, name: str, options: dict[str, Any]
) -> None:
    layer = getattr(lib, name)(3, 4, **options)
    directions = 2 if options.get("bidirectional") else 1
    proj, rows = options.get("proj_size", 0), GATES[name] * 4
    state = proj or 4
    expected = []
    for k in range(options.get("num_layers", 1)):
        for suffix in ("", "_reverse")[:directions]:
            expected.append((f"weight_ih_l{k}{suffix}", (rows, directions * state if k else 3)))
            expected.append((f"weight_hh_l{k}{suffix}", (rows, state)))
            if options.get("bias", True):
                expected.append((f"bias_ih_l{k}{suffix}", (rows,)))
                expected.append((f"bias_hh_l{k}{suffix}", (rows,)))
            if proj:
                expected.append((f"weight_hr_l{k}{suffix}", (proj, 4)))
    assert [(key, tuple(p.shape)) for key, p in layer.named_parameters()] == expected
    assert [(key, tuple(p.shape)) for key, p in layer.state_dict().items()] == expected
    names = [key for key, _ in expected]
    assert layer._flat_weights_names == names
    assert all(a is layer.get_parameter(k) for a, k in zip(layer._flat_weights, names, strict=True))
    assert [key for group in layer._all_weights for key in group] == names
    flat = [p for group in layer.all_weights for p in group]
    assert all(a is b for a, b in zip(flat, layer.parameters(), strict=True))
    assert len(layer.all_weights) == options.get("num_layers", 1) * directions


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=str)
def test_same_seed_same_weights_and_repr(name: str, options: dict[str, Any]) -> None:
    torch_layer, fast = (build(lib, name, 3, 4, **options) for lib in (nn, fastrnn))
    for a, b in zip(torch_layer.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(fast) == repr(torch_layer)
    assert fast.extra_repr() == torch_layer.extra_repr()
    torch.manual_seed(3)
    torch_layer.reset_parameters()
    torch.manual_seed(3)
    fast.reset_parameters()
    for a, b in zip(torch_layer.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.abs().max() <= 0.5 for p in fast.parameters())  # 1 / sqrt(hidden_size)


@both_libraries
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_factory_arguments(lib: ModuleType, name: str) -> None:
    layer = getattr(lib, name)(3, 4, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in getattr(lib, name)(3, 4).parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.device.type == "cpu" for p in layer.parameters())
    assert states(layer(torch.randn(5, 3, dtype=torch.float64))[0])[0].dtype == torch.float64


@both_libraries
@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_follow_assignment(lib: ModuleType, name: str) -> None:
    layer = build(lib, name, 3, 4)
    new = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    before, x = layer.weight_ih_l0, torch.randn(5, 2, 3)
    output, _ = layer(x)
    layer.weight_hh_l0 = new
    assert layer._flat_weights[1] is new
    assert layer._flat_weights[0] is before
    assert not torch.allclose(layer(x)[0][1:], output[1:])
    assert layer.flatten_parameters() is None
    layer._flat_weights = []
    layer._init_flat_weights()
    assert layer._flat_weights[1] is new
    layer._update_flat_weights()
    assert not layer._weights_have_changed()


@both_libraries
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_parameters(lib: ModuleType, name: str, bias: bool) -> None:
    cell, rows = getattr(lib, name)(3, 4, bias), GATES[name[:-4]] * 4
    expected = {"weight_ih": (rows, 3), "weight_hh": (rows, 4)}
    if bias:
        expected |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    else:
        assert cell.bias_ih is None
        assert cell.bias_hh is None
    assert [(k, tuple(p.shape)) for k, p in cell.named_parameters()] == list(expected.items())
    assert (cell.input_size, cell.hidden_size, cell.bias) == (3, 4, bias)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"bias": bias}) for name in CELLS for bias in (True, False)]
    + [("RNNCell", {"nonlinearity": "relu"})],
    ids=str,
)
def test_cell_repr_and_weights(name: str, options: dict[str, Any]) -> None:
    torch_cell, fast = (build(lib, name, 3, 4, **options) for lib in (nn, fastrnn))
    assert repr(torch_cell) == repr(fast)
    assert type(fast).__constants__ == type(torch_cell).__constants__
    for a, b in zip(torch_cell.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b)


@both_libraries
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,)], ids=str)
def test_cell_shapes(lib: ModuleType, name: str, rows: tuple[int, ...]) -> None:
    cell, x = build(lib, name, 3, 4), torch.randn(*rows, 3)
    zeros = torch.zeros(*rows, 4)
    result = cell(x)
    assert isinstance(result, tuple if name == "LSTMCell" else Tensor)
    assert all(h.shape == (*rows, 4) for h in states(result))
    given = cell(x, [zeros, zeros] if name == "LSTMCell" else zeros)
    for a, b in zip(states(result), states(given), strict=True):
        assert torch.allclose(a, b)


@both_libraries
def test_cell_nonlinearity_is_checked_in_forward(lib: ModuleType) -> None:
    cell = lib.RNNCell(3, 4, nonlinearity="x")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: x"):
        cell(torch.randn(2, 3))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_base_classes(name: str) -> None:
    layer = getattr(fastrnn, name)(3, 4)
    assert isinstance(layer, nn.RNNCellBase if name in CELLS else nn.RNNBase)
    assert not isinstance(layer, getattr(nn, name))
