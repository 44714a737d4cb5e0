"""Checks at the door: what a layer or cell was given, against what it expects.

Types and texts of the errors are torch.nn's. Where torch.nn computes nonsense or reads out of
bounds (inconsistent PackedSequence, states of the wrong batch), these checks raise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .reference import CELLS

_CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


@dataclass(frozen=True)
class LayerSpec:
    """What the arguments of a layer are held against. Dimension key: L layers, D directions."""

    name: str  # RNN, LSTM or GRU, as in torch.nn's messages
    cell: str  # key of reference.CELLS
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    directions: int
    bias: bool
    output_size: int  # P
    has_c: bool
    gates: int
    weight_shapes: tuple[tuple[int, ...], ...]  # of all weights, in torch.nn's order


def layer_spec(
    mode: str, input_size: int, hidden_size: int, proj_size: int, num_layers: int,
    bidirectional: bool, bias: bool,
) -> LayerSpec:  # fmt: skip
    """The spec of a layer from the attributes of its module; ``mode`` as in torch.nn.RNNBase."""
    make = _new_spec if torch.compiler.is_compiling() else _kept_spec  # Dynamo warns of caches
    return make(
        mode, input_size, hidden_size, proj_size, num_layers, bidirectional, bias
    )


def _new_spec(
    mode: str, input_size: int, hidden_size: int, proj_size: int, num_layers: int,
    bidirectional: bool, bias: bool,
) -> LayerSpec:  # fmt: skip
    if mode not in _CELL_OF_MODE:
        raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join(_CELL_OF_MODE)}")
    cell = _CELL_OF_MODE[mode]
    info, D, size = CELLS[cell], directions(bidirectional, mode), proj_size or hidden_size
    rows, shapes = info.gates * hidden_size, []
    for group in range(num_layers * D):
        width = input_size if group < D else D * size
        shapes += [(rows, width), (rows, size), *[(rows,)] * (2 * bias)]
        shapes += [(proj_size, hidden_size)] if proj_size else []
    return LayerSpec(
        mode.partition("_")[0], cell, input_size, hidden_size, proj_size, num_layers, D, bias,
        size, info.has_c, info.gates, tuple(shapes),
    )  # fmt: skip


_kept_spec = functools.lru_cache(typed=True)(_new_spec)


def directions(bidirectional: object, name: str) -> int:
    """Number of directions."""
    if not isinstance(bidirectional, bool):
        raise TypeError(
            f"{name}: bidirectional should be of type bool, got: {type(bidirectional).__name__}"
        )
    return 2 if bidirectional else 1


def layer_dims(spec: LayerSpec, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None) -> None:
    """Number of dimensions of a tensor input [T, B, I] or [T, I], and of hx beside it."""
    if input.dim() not in (2, 3):
        kind = " tensor" if spec.name == "RNN" else ""
        raise ValueError(
            f"{spec.name}: Expected input to be 2D or 3D, got {input.dim()}D{kind} instead"
        )
    if input.layout != torch.strided:
        raise RuntimeError(f"{spec.name}: input must be a dense tensor, got {input.layout}")
    if hx is None:
        return
    dims = input.dim()
    batched = "batched 3-D" if dims == 3 else "unbatched 2-D"
    if spec.has_c:
        if hx[0].dim() != dims or hx[1].dim() != dims:
            raise RuntimeError(
                f"For {batched} input, hx and cx should also be {dims}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
    elif hx.dim() != dims:  # type: ignore[union-attr]
        raise RuntimeError(
            f"For {batched} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"  # type: ignore[union-attr]
        )


def step_input(spec: LayerSpec, input: Tensor) -> None:
    """Number of dimensions of the input of one step, [B, I] or [I]."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{spec.name}: input must be a Tensor, got {type(input).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{spec.name}: Expected the input of a step to be 1D or 2D, got {input.dim()}D instead"
        )


def step_out(spec: LayerSpec, out: object, state: Tensor | tuple[Tensor, Tensor]) -> None:
    """Tensors for the new state, against the state itself: nothing is written before all can be."""
    targets = out if spec.has_c else [out]
    values = state if spec.has_c else [state]
    if not isinstance(targets, (tuple, list)) or len(targets) != len(values):
        raise TypeError(f"{spec.name}: out must be given like the state of the step")
    for target, value in zip(targets, values, strict=True):
        if not isinstance(target, Tensor):
            raise TypeError(f"{spec.name}: out must hold Tensors, got {type(target).__name__}")
        if target.shape != value.shape or target.dtype != value.dtype:
            raise RuntimeError(
                f"{spec.name}: out must have shape {list(value.shape)} and dtype {value.dtype}, "
                f"got {list(target.shape)} and {target.dtype}"
            )
        if target.device != value.device:
            raise RuntimeError(
                f"{spec.name}: out must be on {value.device}, got a tensor on {target.device}"
            )
        places = zip(target.shape, target.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in places):
            raise RuntimeError(
                f"{spec.name}: out must have a place for every element, got strides "
                f"{list(target.stride())} for shape {list(target.shape)}"
            )
        if torch.compiler.is_compiling():  # what follows, the graph's own writing checks
            continue
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{spec.name}: out must not be an inference tensor outside of inference mode"
            )
        if target.requires_grad and target.is_leaf and torch.is_grad_enabled():
            raise RuntimeError(f"{spec.name}: out must not be a leaf that requires grad")
    if torch.compiler.is_compiling():
        return
    if len(targets) == 2 and torch._C._overlaps(targets[0], targets[1]):
        raise RuntimeError(f"{spec.name}: the tensors of out must not overlap")


def layer_input(spec: LayerSpec, input: Tensor, weights: Sequence[Tensor], packed: bool) -> None:
    """Dtype, dimensions, feature size and device of the data, time first or packed."""
    weight = weights[0]
    if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        # torch.nn.LSTM does not check packed input; its product then raises a RuntimeError.
        error = RuntimeError if packed and spec.has_c else ValueError
        raise error(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    dims = 2 if packed else 3
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.size(-1) != spec.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {spec.input_size}, got {input.size(-1)}"
        )
    device = weight.device
    if input.device != device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {device}"
        )


def layer_state(
    spec: LayerSpec, hx: Any, batch: int, input: Tensor, argument: str = "hx"
) -> None:
    """Number, shapes, dtypes and devices of the initial states: [L * D, B, P] and [L * D, B, H]."""
    if spec.has_c and isinstance(hx, Tensor):
        raise TypeError(f"LSTM: {argument} must be a tuple (h, c) of Tensors, not a Tensor")
    if spec.has_c and len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, got {len(hx)}")
    states = [hx[0], hx[1]] if spec.has_c else [hx]
    rows = spec.num_layers * spec.directions
    for i, (state, size) in enumerate(
        zip(states, (spec.output_size, spec.hidden_size), strict=False)
    ):
        expected = (rows, batch, size)
        which = f"hidden[{i}]" if spec.has_c else "hidden"
        if argument != "hx":
            which = f"{argument}[{i}]" if spec.has_c else argument
        if not isinstance(state, Tensor):
            raise TypeError(f"{spec.name}: {which} must be a Tensor, got {type(state).__name__}")
        if state.shape != expected:
            name = which if spec.has_c or argument != "hx" else "hidden size"
            size_word = " size" if spec.has_c else ""
            raise RuntimeError(f"Expected {name}{size_word} {expected}, got {list(state.shape)}")
        if state.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"{spec.name}: {which} must have the dtype of the input, {input.dtype}, "
                f"got {state.dtype}"
            )
        if state.device != input.device:
            raise RuntimeError(
                f"{spec.name}: {which} must be on the device of the input, {input.device}, "
                f"got {state.device}"
            )


def packed_batches(spec: LayerSpec, input: PackedSequence) -> None:
    """``batch_sizes`` [T] against the rows of the data, and the permutation against the batch."""
    data, sizes = input.data, input.batch_sizes
    if not isinstance(sizes, Tensor) or sizes.dim() != 1 or sizes.dtype != torch.int64:
        raise RuntimeError(f"{spec.name}: batch_sizes must be a 1-D int64 tensor")
    if not sizes.is_cpu:
        raise RuntimeError(f"{spec.name}: batch_sizes must be on the CPU, got {sizes.device}")
    if sizes.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if torch.compiler.is_compiling():  # values are not there yet; the operators check them
        there, back = input.sorted_indices, input.unsorted_indices
        if there is not None and back is not None and there.shape != back.shape:
            raise RuntimeError(f"{spec.name}: sorted_indices and unsorted_indices differ in shape")
        return
    under_transform = torch._C._are_functorch_transforms_active()
    if under_transform and torch._C._functorch.is_batchedtensor(sizes):
        raise RuntimeError(f"{spec.name}: vmap over batch_sizes of packed data is not possible")
    counts = sizes.tolist()
    if counts[-1] <= 0 or counts != sorted(counts, reverse=True):
        raise RuntimeError(
            f"{spec.name}: batch_sizes must be positive and must not increase, got {counts}"
        )
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if sum(counts) != data.shape[0]:
        raise RuntimeError(
            f"{spec.name}: batch_sizes sum to {sum(counts)} rows, but the data has {data.shape[0]}"
        )
    batch = counts[0]
    for name, indices in (
        ("sorted_indices", input.sorted_indices),
        ("unsorted_indices", input.unsorted_indices),
    ):
        if indices is not None and indices.shape != (batch,):
            raise RuntimeError(
                f"{spec.name}: {name} must have shape ({batch},), got {tuple(indices.shape)}"
            )


def layer_weights(spec: LayerSpec, weights: Sequence[Tensor]) -> None:
    """Number and shapes of a layer's weights, in torch.nn's order."""
    expected = spec.weight_shapes
    if len(weights) != len(expected):
        raise ValueError(
            f"{spec.name}: expected {len(expected)} weights for {spec.num_layers} layers and "
            f"{spec.directions} directions, got {len(weights)}"
        )
    for index, (weight, shape) in enumerate(zip(weights, expected, strict=True)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{spec.name}: weights must be Tensors, got {type(weight).__name__}")
        if weight.is_cpu is not weights[0].is_cpu:
            one_dtype_and_device(weights[0], [weight])
        if weight.shape != shape:
            raise RuntimeError(
                f"{spec.name}: weight {index} must have shape {shape}, got {tuple(weight.shape)}"
            )


def one_dtype_and_device(first: Tensor, others: Sequence[Tensor | None]) -> None:
    """What the operators check for themselves: all tensors of a layer are of one kind."""
    for other in others:
        if other is not None and (other.device != first.device or other.dtype != first.dtype):
            raise RuntimeError(
                "input, states and weights must have one dtype and device, got "
                f"{first.dtype} on {first.device} and {other.dtype} on {other.device}"
            )


def cell_dims(name: str, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None) -> None:
    """Number of dimensions of a cell's input [B, I] or [I], and of its state."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is None:
        return
    states = hx if name == "LSTMCell" else [hx]
    for index, state in enumerate(states):
        which = f"hx[{index}]" if name == "LSTMCell" else "hidden"
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")


def cell_arguments(
    name: str, input: Tensor, states: list[Tensor | None], weight_ih: Tensor, weight_hh: Tensor,
    biases: list[Tensor | None], gates: int,
) -> None:  # fmt: skip
    """Shapes, dtypes and devices of a batched cell call: input [B, I], states [B, H]."""
    for weight in (weight_ih, weight_hh):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: weights must be Tensors, got {type(weight).__name__}")
        if weight.dim() != 2:
            raise RuntimeError(f"{name}: weights must be matrices, got {weight.dim()}-D")
    if input.shape[1] != weight_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {weight_ih.shape[1]}"
        )
    hidden = weight_hh.shape[1]
    rows = gates * hidden
    if weight_ih.shape[0] != rows or weight_hh.shape[0] != rows:
        raise RuntimeError(
            f"{name}: weight_ih and weight_hh must have {rows} rows, "
            f"got {weight_ih.shape[0]} and {weight_hh.shape[0]}"
        )
    for bias in biases:
        if bias is not None and bias.shape != (rows,):
            raise RuntimeError(f"{name}: biases must have shape ({rows},), got {list(bias.shape)}")
    if (biases[0] is None) != (biases[1] is None):
        raise RuntimeError(f"{name}: give both biases or none")
    for i, state in enumerate(states):
        if state is None:
            continue
        if state.dim() != 2:
            raise RuntimeError(
                f"{name}: hidden{i} must have as many dimensions as the input, got {state.dim()}-D"
            )
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match "
                f"hidden{i} batch size {state.shape[0]}"
            )
        if state.shape[1] != hidden:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden}"
            )
    for other in (*states, weight_hh, *biases, weight_ih):
        if other is None:
            continue
        if other.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"{name}: input, state and weights must have one dtype, "
                f"got {input.dtype} and {other.dtype}"
            )
        if other.device != input.device:
            raise RuntimeError(
                f"{name}: input, state and weights must be on one device, "
                f"got {input.device} and {other.device}"
            )
