"""Clocks: paired timing of several calls, peak memory of a call, the machine's GEMM peak."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Sequence[Any]]

MAX_ROUNDS = 2000
GEMM_SIZE = 1024


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of the rounds."""

    p20: float
    median: float
    p80: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        return Timing(
            p20=percentile(seconds, 20),
            median=statistics.median(seconds),
            p80=percentile(seconds, 80),
            rounds=len(seconds),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value at that rank, without interpolation."""
    return sorted(values)[round(percent / 100 * (len(values) - 1))]


def time_paired(
    calls: Mapping[str, Call], seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Time the calls in alternation: every round runs each of them once.

    Returns the seconds of each call in each round.

    A slow phase of the machine then falls on all of them alike.  The order rotates from round to
    round, so that none always runs on the caches the same other one left behind.  Rounds go on for
    about `seconds` per call, at least `min_rounds`; two rounds before them are not counted.
    """
    names = list(calls)
    rounds, warm_up = min_rounds, 2
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        round_ = -warm_up
        while round_ < rounds:
            spent = 0.0
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                call = calls[name]
                start = time.perf_counter()
                result = call()
                elapsed = time.perf_counter() - start
                del result  # freed outside the clock
                spent += elapsed
                if round_ >= 0:
                    samples[name].append(elapsed)
            if round_ == -1:
                affordable = int(seconds * len(names) / max(spent, 1e-9))
                rounds = max(min_rounds, min(affordable, MAX_ROUNDS))
            round_ += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_memory(call: Call) -> int:
    """Return the peak of the bytes one call holds in tensors, its results included.

    The profiler records every allocation and release of PyTorch's CPU allocator; the peak is the
    largest running sum.  Weights and inputs exist before the call and do not count, nor does
    scratch memory that a library (MKL, oneDNN) takes past PyTorch's allocator.
    """
    call()  # what is allocated once and kept does not count either
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        result = call()
    assert run.profiler is not None
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler recorded no allocations")
    del result
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def gemm_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the flop/s of the fastest of many square matrix products, on the current threads."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best
