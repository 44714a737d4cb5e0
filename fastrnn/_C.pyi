"""The native extension. Absent in a pure-Python install."""

from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | bool]: ...
def cells() -> dict[str, dict[str, int | bool]]: ...
def gpus() -> dict[str, dict[str, Any]]: ...
def plan(
    *, cell: str, T: int, B: int, I: int, H: int, D: int, item_bytes: int, gpu: dict[str, Any],
    kernel: str, persistent: bool = False, tf32: bool = False, backward: bool = False,
) -> dict[str, Any]: ...  # fmt: skip
def record_programs(
    *, is_ready: Callable[[], bool], record: Callable[[Callable[[int], None]], Any],
    product_settings: Callable[[], str], allows_tf32: Callable[[], bool],
) -> None: ...  # fmt: skip
def poison(on: bool) -> None: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...

class PlainCalls:
    def __init__(
        self, conditions: list[tuple[Callable[[], Any], Any]],
        scoped_backend: ContextVar[str | None], backends: dict[str, Any], forward_ad: ModuleType,
    ) -> None: ...  # fmt: skip
    def hold(self) -> bool: ...

class PythonTensors:
    def __init__(self, tensor: type, parameter: type) -> None: ...

def select_rows(tensors: PythonTensors, rows: Tensor, index: Tensor) -> Tensor | None: ...

class StepKind:
    def __init__(
        self, *, cell: str, L: int, I: int, H: int, P: int, bias: bool, quantized: bool
    ) -> None: ...

class DirectCall:
    def __init__(
        self, plain: PlainCalls, tensors: PythonTensors, description: dict[str, Any],
        weights: list[tuple[bool, str]], kind: StepKind, record: Callable[..., Any],
    ) -> None: ...  # fmt: skip
    def call(
        self, attributes: dict[str, Any], input: Any, state: Any, out: Any, batch_first: bool
    ) -> tuple[Tensor, Any] | None: ...
