"""csrc/rows.h: rows in another order, zeros in place of those that do not exist."""

from __future__ import annotations

import pytest
import torch

import compare
from fastrnn import _ops

pytestmark = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))


def select(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
    found: torch.Tensor | None = _ops.select_rows(_ops.python_tensors, t, index)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
@pytest.mark.parametrize(("n", "count", "width"), [(1, 1, 1), (7, 5, 3), (300, 500, 17)])
def test_every_row_is_written(
    n: int, count: int, width: int, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    t, index = torch.randn(*lead, n, width).to(dtype), torch.randint(0, n + 1, (count,))
    with compare.poisoned_memory():
        found = select(t, index)
    expected = torch.cat([t, t.new_zeros(*lead, 1, width)], -2).index_select(-2, index)
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [-1, 8, 2**62, -(2**63)])
def test_rows_that_there_are_not_raise(wrong: int) -> None:
    with pytest.raises(IndexError, match="an index is not from 0 to 7"):
        select(torch.randn(7, 3), torch.tensor([0, wrong, 7]))


def test_other_tensors_are_left_to_torch() -> None:
    t, index = torch.randn(7, 3), torch.tensor([0, 1])
    assert select(t, index) is not None
    for other in (t.T, t[0], t[None, None], t[:0], t.long(), t.to_sparse()):
        assert select(other, index) is None
    for other in (index.int(), index[None], index[:0], torch.arange(4)[::2], index.double()):
        assert select(t, other) is None
