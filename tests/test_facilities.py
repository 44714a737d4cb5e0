"""docs/pytorch.md says what happens, of both libraries; and everything in it works in fastrnn."""

from __future__ import annotations

import facilities
import pytest
import torch
from torch import nn

import fastrnn
from fastrnn import _ops

pytestmark = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))

ROWS = {
    cells[1]: cells[2:4]
    for line in facilities.DOC.read_text().splitlines()
    if line.startswith("| ") and (cells := [c.strip() for c in line.split("|")])[1]
}


@pytest.mark.parametrize("title", facilities.FACILITIES)
def test_works_in_fastrnn(title: str) -> None:
    assert facilities.answer(fastrnn, title) == "yes"
    assert ROWS[title][1] == "yes"


@pytest.mark.parametrize("title", facilities.FACILITIES)
def test_what_torch_does_is_recorded(title: str) -> None:
    if f"(torch {torch.__version__.partition('+')[0]})" not in facilities.DOC.read_text():
        pytest.skip("the table is of another version of torch")
    if "this CPU" in title:
        pytest.skip("depends on the CPU")
    assert facilities.answer(nn, title) == ROWS[title][0]


def test_the_table_has_no_other_rows() -> None:
    assert list(ROWS) == list(facilities.FACILITIES)
