"""Random configurations against torch.nn: `python tests/fuzz.py --n 10000 --seed 0`."""

from __future__ import annotations

import random

import torch

from cases import CELLS, DTYPES, Case


def random_case(seed: int) -> tuple[str, Case, torch.dtype]:
    """The configuration of `seed`: cell, case and dtype."""
    r = random.Random(seed)

    def size(small: int = 40, large: int = 150) -> int:
        kind = r.random()
        if kind < 0.15:
            return 1
        return r.randint(1, small) if kind < 0.95 else r.randint(small, large)

    cell, dtype = r.choice(list(CELLS)), r.choice(list(DTYPES.values()))
    H = size()
    if cell == "lstm_proj":
        H = max(H, 2)
    T, B = size(12, 60), size(12, 70)
    layout = r.choice(("dense", "dense", "packed", "packed-sorted", "unbatched"))
    lengths = None
    if layout.startswith("packed"):
        lengths = tuple(r.randint(1, T) for _ in range(B))
        if layout == "packed-sorted":
            lengths = tuple(sorted(lengths, reverse=True))
    layers = r.choice((1, 1, 2, 3))
    states = ("h_0", "c_0") if cell.startswith("lstm") else ("h_0",)
    names = ("input", *states, "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    frozen: tuple[str, ...] = ()
    if r.random() < 0.3:
        frozen = tuple(name for name in (*names, "weights") if r.random() < 0.4)
    return (
        cell,
        Case(
            f"seed{seed}", "random", T=T, B=B, I=size(), H=H,
            P=r.randint(1, H - 1) if cell == "lstm_proj" else 0,
            layers=layers, bidirectional=r.random() < 0.4, bias=r.random() < 0.8,
            batch_first=r.random() < 0.4,
            dropout=r.choice((0.0, 0.5, 0.75)) if layers > 1 else 0.0,
            training=r.random() < 0.8, lengths=lengths, unbatched=layout == "unbatched",
            hx=r.choice(("given", "given", "none", "expanded", "strided")),
            strided=r.random() < 0.2, frozen=frozen, grad=r.random() < 0.9,
            scale=r.choice((1.0, 1.0, 1.0, 10.0)),
        ),
        dtype,
    )  # fmt: skip
