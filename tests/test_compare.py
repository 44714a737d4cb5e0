"""The tools of the tests themselves: poisoned memory shows what was not written."""

from __future__ import annotations

import importlib

import pytest
import torch

from compare import poisoned_memory
from fastrnn import _ops

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_new_tensors_are_poisoned(dtype: torch.dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    with poisoned_memory():
        made = [
            torch.empty(3, 50, dtype=dtype),
            torch.empty_strided((3, 50), (50, 1), dtype=dtype),
            torch.empty_like(like),
            like.new_empty(3, 50),
        ]
    for tensor in made:
        assert tensor.isnan().all()


def test_new_integers_are_poisoned() -> None:
    with poisoned_memory():
        assert (torch.empty(50, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_settings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)  # the fixture that surrounds every test restores it
    with poisoned_memory():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))
def test_operators_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make tensors past PyTorch's own `empty`, and poison them where the library can."""
    native = importlib.import_module("fastrnn._C")
    if not hasattr(native, "poison"):
        pytest.skip("the operators allocate through PyTorch, as in the tests above")
    told: list[bool] = []
    monkeypatch.setattr(native, "poison", told.append)
    with poisoned_memory():
        assert told == [True]
    assert told == [True, False]
