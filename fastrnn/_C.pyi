"""The native extension. Absent in a pure-Python install."""

from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | bool]: ...
def cells() -> dict[str, dict[str, int | bool]]: ...
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

class DirectCall:
    def __init__(
        self, plain: PlainCalls, tensor_type: type, description: dict[str, Any], has_c: bool,
        held: list[tuple[bool, str, Tensor]], net: int, step: Any, step_out: Any,
    ) -> None: ...  # fmt: skip
    def call(
        self, attributes: dict[str, Any], input: Any, state: Any, out: Any
    ) -> tuple[Tensor, Any] | None: ...
