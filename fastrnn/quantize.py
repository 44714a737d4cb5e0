"""Low-precision weights for inference: fewer bytes to read at each step, where reading the weights
is what a step costs (small batches, streams).

The weights of the products, weight_ih and weight_hh, are stored in bfloat16, or in int8 with one
float32 scale per row (``scale = max|row| / 127``, rounded to nearest). Activations, states, biases
and projections stay float32. Products with bfloat16 weights are those of float32; an int8 product
rounds its x to a multiple of ``max|x| / 32767``, an error of at most ``max|x| sum|w| / 65536``, and
is exact from there on. For inputs with outliers, features thousands of times the others, use bf16.

Dimension key: see layers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import modules, stream
from .swap import Entry, SwapReport

if TYPE_CHECKING:
    from ._C import DirectCall

_TYPES = {"bf16": "bfloat16", "int8": "int8"}


class QuantizedLayer(modules.Layer):
    """What the quantized RNN, LSTM and GRU share: buffers in place of the weight matrices, under
    the same names, and for int8 ``<name>_scale``. The gradient of the input is there, the weights
    have none."""

    # With more, weights brought back to float32 and used several times from the cache are faster.
    _max_direct_batch = 4
    _weight_type: str
    _originals: dict[str, nn.Parameter]

    def _direct(self, input: Any, hx: Any) -> Any:
        if torch.compiler.is_compiling() or not isinstance(input, Tensor) or input.dim() != 3:
            return None
        few = input.shape[0 if self.batch_first else 1] <= self._max_direct_batch
        return super()._direct(input, hx) if few else None

    def _weights(self) -> list[Tensor]:
        return [self._float_weight(name) for name in self._flat_weights_names]

    def _float_weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        expected = torch.float32
        if _is_matrix(name):
            expected = torch.bfloat16 if self._weight_type == "bfloat16" else torch.int8
        if weight.dtype != expected:
            raise RuntimeError(
                f"{name} of a quantized layer must be {expected}, got {weight.dtype}: quantized "
                "layers cannot be converted to another dtype"
            )
        if not _is_matrix(name):
            return weight
        if self._weight_type == "bfloat16":
            return weight.float()
        return weight.float() * getattr(self, name + "_scale").unsqueeze(1)

    def _new_direct_call(self) -> DirectCall | None:
        spec, names = self._spec(), list(self._flat_weights_names)
        if spec.directions == 2 or not stream.can_step(spec, self._weights()):
            return None
        if self._weight_type == "int8":
            per_layer = len(names) // spec.num_layers
            for first in reversed(range(0, len(names), per_layer)):
                names[first + 2 : first + 2] = [f"{n}_scale" for n in names[first : first + 2]]
        return stream.direct_call(self, spec, names, quantized=True)


class QuantizedRNN(QuantizedLayer, modules.RNN):
    """:class:`fastrnn.RNN` with low-precision weights; made by :func:`fastrnn.quantize`."""


class QuantizedLSTM(QuantizedLayer, modules.LSTM):
    """:class:`fastrnn.LSTM` with low-precision weights; made by :func:`fastrnn.quantize`."""


class QuantizedGRU(QuantizedLayer, modules.GRU):
    """:class:`fastrnn.GRU` with low-precision weights; made by :func:`fastrnn.quantize`."""


_QUANTIZED: dict[type[modules.Layer], type[QuantizedLayer]] = {
    modules.RNN: QuantizedRNN,
    modules.LSTM: QuantizedLSTM,
    modules.GRU: QuantizedGRU,
}


def quantize(model: nn.Module, weights: str = "int8", *, keep_originals: bool = True) -> SwapReport:
    """Store the weight matrices of every fastrnn layer inside ``model`` in low precision, in place.

    ``W = scale * q`` with int8 ``q`` and one scale per row (``"int8"``), or W rounded to bfloat16
    (``"bf16"``). Everything else stays float32. For inference: the weights are buffers afterwards
    and have no gradients. Measured effect on outputs of a layer with torch.nn's initial weights:
    errors below 1e-2 of the largest output for either; measure it on your model.

    Args:
        model: any module; its fastrnn layers must be float32. torch.nn's layers are left as they
            are: call :func:`fastrnn.replace` first.
        weights: ``"int8"`` or ``"bf16"``.
        keep_originals: keep the float32 Parameters beside the model (outside its state dict), so
            that :func:`dequantize` can give them back exactly.

    Returns:
        A report of the layers changed and of those left, with the reason.

    Raises:
        ValueError: ``weights`` is something else.
        TypeError: ``model`` is not a module.

    Example::

        >>> layer = fastrnn.LSTM(256, 256)
        >>> fastrnn.quantize(layer, weights="int8")
        >>> fastrnn.dequantize(layer)
    """
    if weights not in _TYPES:
        raise ValueError(f"weights must be one of {', '.join(map(repr, _TYPES))}, got {weights!r}")
    report = SwapReport(swapped=[], left=[])
    chosen = []
    for name, module in _layers(model):
        kind = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
        why = _reason_to_leave(module)
        if why is None:
            chosen.append(module)
            report.swapped.append(Entry(name, kind, f"{weights} weights"))
        else:
            report.left.append(Entry(name, kind, why))
    for module in chosen:
        _quantize_layer(module, _TYPES[weights], keep_originals)
    return report


def dequantize(model: nn.Module) -> SwapReport:
    """Undo :func:`quantize`: the original Parameters where they were kept, otherwise new ones with
    the values of the low-precision weights. Returns a report; raises TypeError as ``quantize``."""
    report = SwapReport(swapped=[], left=[])
    plain: dict[type[nn.Module], type[modules.Layer]]
    plain = {quantized: layer for layer, quantized in _QUANTIZED.items()}
    for name, module in _layers(model):
        if type(module) not in plain:
            continue
        assert isinstance(module, QuantizedLayer)
        originals = module.__dict__.pop("_originals")
        for weight in filter(_is_matrix, module._flat_weights_names):
            value = originals.get(weight)
            if value is None:
                value = nn.Parameter(module._float_weight(weight))
            for buffer in (weight, weight + "_scale"):
                module._buffers.pop(buffer, None)
            module._parameters[weight] = value
        _in_torch_order(module)
        del module._weight_type
        module.__dict__.pop("_direct_call", None)
        target = plain[type(module)]
        report.swapped.append(Entry(name, type(module).__name__, f"fastrnn.{target.__name__}"))
        module.__class__ = target  # type: ignore[assignment]
        module._init_flat_weights()
    return report


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.RNNBase)]


def _reason_to_leave(module: nn.Module) -> str | None:
    if isinstance(module, QuantizedLayer):
        return "already quantized"
    if type(module) not in _QUANTIZED:
        return "not a fastrnn layer: call fastrnn.replace first"
    assert isinstance(module, modules.Layer)
    if any(name not in module._parameters for name in module._flat_weights_names):
        return "its weights are not plain Parameters"
    if any(p.dtype != torch.float32 for p in module.parameters()):
        return "not float32"
    return None


def _is_matrix(name: str) -> bool:
    return name.startswith(("weight_ih", "weight_hh"))


def _quantize_layer(module: nn.Module, weight_type: str, keep_originals: bool) -> None:
    assert isinstance(module, modules.Layer)
    originals: dict[str, nn.Parameter] = {}
    for name in filter(_is_matrix, module._flat_weights_names):
        parameter = module._parameters.pop(name)
        assert parameter is not None
        weight = parameter.detach()
        if keep_originals:
            originals[name] = parameter
        if weight_type == "bfloat16":
            module.register_buffer(name, weight.bfloat16().contiguous())
            continue
        scale = weight.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        module.register_buffer(name, (weight / scale.unsqueeze(1)).round().to(torch.int8))
        module.register_buffer(name + "_scale", scale)
    module.__dict__.pop("_direct_call", None)
    module.__class__ = _QUANTIZED[type(module)]
    module.__dict__["_originals"] = originals
    module.__dict__["_weight_type"] = weight_type


def _in_torch_order(module: modules.Layer) -> None:
    """Parameters in the order of torch.nn's registration."""
    for name in module._flat_weights_names:
        module._parameters[name] = module._parameters.pop(name)


__all__ = ["QuantizedGRU", "QuantizedLSTM", "QuantizedRNN", "dequantize", "quantize"]
