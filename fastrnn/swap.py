"""Exchange torch.nn's recurrent layers for fastrnn's inside an existing model, and back.

A layer and its counterpart hold the same state under the same names, so exchanging them means
changing the class of the object and nothing else.  The Parameter objects, the state-dict keys, the
hooks, the training flag and the place of the layer in the model stay what they were: optimizers,
DistributedDataParallel and everyone who holds a reference to the layer do not notice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import cells, modules

FilterFn = Callable[[str, nn.Module], bool]


@functools.cache
def pairs() -> dict[type[nn.Module], type[nn.Module]]:
    """Each torch.nn class and its fastrnn counterpart.

    A function, since ``modules`` and ``cells`` may still be loading when this file is imported.
    """
    return {
        nn.RNN: modules.RNN,
        nn.LSTM: modules.LSTM,
        nn.GRU: modules.GRU,
        nn.RNNCell: cells.RNNCell,
        nn.LSTMCell: cells.LSTMCell,
        nn.GRUCell: cells.GRUCell,
    }


class Entry(NamedTuple):
    """One layer in a report."""

    name: str  # qualified name in the model; "" is the model itself
    type: str  # class before the call
    why: str  # what it became, or why it was left


@dataclass(frozen=True)
class SwapReport:
    """What ``replace`` or ``restore`` did: every recurrent layer of the model stands in one list.

    ``str(report)`` is a short table.
    """

    swapped: list[Entry]
    left: list[Entry]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        rows = [("swapped", *entry) for entry in self.swapped]
        rows += [("left", *entry) for entry in self.left]
        rows = [(action, name or "(model)", kind, why) for action, name, kind, why in rows]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        for *columns, why in rows:
            padded = (text.ljust(width) for text, width in zip(columns, widths, strict=True))
            lines.append("  ".join((*padded, why)))
        return "\n".join(lines)


def replace(model: nn.Module, filter_fn: FilterFn | None = None) -> SwapReport:
    """Make every torch.nn recurrent layer and cell inside ``model`` a fastrnn one, in place.

    The class of each object changes, its Parameters, hooks and names do not, so an optimizer
    built before the call goes on working.  That holds for ``model`` itself too: a bare
    ``torch.nn.LSTM`` is a ``fastrnn.LSTM`` afterwards.  Note that ``isinstance(m, torch.nn.LSTM)``
    is then False; call :func:`restore` before using tools that look for torch.nn's classes
    (quantize_dynamic, torch.fx, TorchScript).

    Args:
        model: any module.
        filter_fn: called as ``filter_fn(name, module)`` for each layer that can be swapped, with
            its qualified name (``""`` for the model itself); a false result leaves the layer.

    Returns:
        A :class:`SwapReport` of the layers swapped and of those left, with the reason.  Left are
        subclasses of torch.nn's layers (their code may rely on torch's), quantized layers,
        TorchScript modules and layers whose ``forward`` was overridden on the object.  A layer
        that is used in several places is reported once, under its first name.

    Raises:
        TypeError: ``model`` is not a module or ``filter_fn`` is not callable.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16))
        >>> print(fastrnn.replace(model))
        1 swapped, 0 left
        swapped  0  torch.nn.LSTM  now fastrnn.LSTM
    """
    return _swap(model, pairs(), filter_fn)


def restore(model: nn.Module) -> SwapReport:
    """Undo :func:`replace`: make every fastrnn layer inside ``model`` a torch.nn one, in place.

    Layers that were built as fastrnn layers become torch.nn layers as well.  Returns and raises
    as :func:`replace` does.
    """
    return _swap(model, {fast: torch_type for torch_type, fast in pairs().items()}, None)


def to_torch(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` in which every fastrnn layer is a torch.nn layer.

    The copy is independent: it has its own Parameters with equal values, and keeps dtype, device,
    ``requires_grad``, the training flag, hooks and parametrizations.  ``module`` is not changed.

    Raises:
        TypeError: a layer has no torch.nn equivalent, for example a subclass of ``fastrnn.LSTM``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    copied = copy.deepcopy(module)
    report = restore(copied)
    fast_types = tuple(pairs().values())
    for entry in report.left:
        if isinstance(copied.get_submodule(entry.name), fast_types):
            raise TypeError(f"{entry.name or entry.type} has no torch.nn equivalent: {entry.why}")
    return copied


def _swap(
    model: nn.Module, mapping: dict[type[nn.Module], type[nn.Module]], filter_fn: FilterFn | None
) -> SwapReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {type(filter_fn).__name__}")
    # Decide first, change afterwards: a filter_fn that raises leaves the model as it was.
    chosen: list[tuple[nn.Module, type[nn.Module]]] = []
    report = SwapReport(swapped=[], left=[])
    for name, module in model.named_modules():
        if not _is_recurrent(module):
            continue
        source = _plain_type(module)
        why = _reason_to_leave(module, source, mapping)
        if why is None and filter_fn is not None and not filter_fn(name, module):
            why = "refused by filter_fn"
        if why is None:
            chosen.append((module, mapping[source]))
            entry = Entry(name, _type_name(source), f"now {_type_name(mapping[source])}")
            report.swapped.append(entry)
        else:
            report.left.append(Entry(name, _type_name(source), why))
    for module, target in chosen:
        _set_type(module, target)
    return report


def _is_recurrent(module: nn.Module) -> bool:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return True
    names = {torch_type.__name__ for torch_type in pairs()}
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in names
    return _is_quantized(module) and type(module).__name__ in names


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.")


def _plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, looking through the one that a parametrization puts in front."""
    if parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module)
    return type(module)


def _reason_to_leave(
    module: nn.Module,
    source: type[nn.Module],
    mapping: dict[type[nn.Module], type[nn.Module]],
) -> str | None:
    """Why ``module`` cannot be swapped by ``mapping``; None if it can."""
    if source in mapping.values():
        return f"already a {_type_name(source)}"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript: swap before scripting or tracing"
    if _is_quantized(module):
        return "quantized"
    if source not in mapping:
        base = next((base for base in source.__mro__[1:] if base in _known_types()), None)
        if base is None:
            return "not a layer that is known here"
        return f"a subclass of {_type_name(base)}, which may rely on its base class"
    if "forward" in vars(module):
        return "forward is overridden on the object: swap before overriding it"
    return None


def _known_types() -> set[type]:
    return {nn.RNNBase, nn.RNNCellBase, *pairs().keys(), *pairs().values()}


def _type_name(kind: type) -> str:
    if kind in pairs().values():
        return f"fastrnn.{kind.__name__}"
    if kind in _known_types():
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _set_type(module: nn.Module, target: type[nn.Module]) -> None:
    """Change the class of ``module``, keeping the class that a parametrization put in front."""
    module.__dict__.pop("_direct_call", None)
    if not parametrize.is_parametrized(module):
        module.__class__ = target
        return
    # The class in front holds one property per parametrized tensor.  Copies of the module share
    # it, so a new one is made on the new base instead of giving the old one another base.
    front = type(module)
    namespace = {
        name: value
        for name, value in vars(front).items()
        if name not in ("__dict__", "__weakref__")
    }
    module.__class__ = type(front.__name__, (target,), namespace)
