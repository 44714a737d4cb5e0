"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run in Python
    os.environ.setdefault("TRITON_INTERPRET", "1")

from compare import engines, poisoned_memory, use_engine


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tests' problems are too small for threads; test_determinism.py compares thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(params=engines())
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set of the native backend, and on the reference."""
    with use_engine(request.param):
        yield request.param
