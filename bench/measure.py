"""Clocks: paired timing of several calls, peak memory of a call, what the machine could do."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Sequence[Any]]

MAX_ROUNDS = 2000
FEW_ROUNDS, PATIENCE = 3, 60.0  # so few are enough where the rounds would take more seconds
MAX_REPEATS = 1000
BURST = 1e-3  # seconds of one turn, at least
GEMM_SIZE = 1024
READ_BYTES = 16 * 2**20  # by one call that measures bandwidth


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of the rounds."""

    p20: float
    median: float
    p80: float
    rounds: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        return Timing(
            p20=percentile(seconds, 20),
            median=statistics.median(seconds),
            p80=percentile(seconds, 80),
            rounds=len(seconds),
        )


@dataclass
class Samples:
    """What the rounds of one call took: seconds each, and seconds of CPU, all threads together."""

    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0

    @property
    def cpus(self) -> float:
        """CPU time over wall time: how many threads the call kept busy."""
        return self.cpu / max(sum(self.seconds), 1e-9)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value at that rank, without interpolation."""
    return sorted(values)[round(percent / 100 * (len(values) - 1))]


def time_paired(
    calls: Mapping[str, Call], seconds: float, min_rounds: int, burst: float = BURST
) -> dict[str, Samples]:
    """Time the calls in alternation: in every round each of them has one turn.

    A slow phase of the machine then falls on all of them alike.  The order rotates from round to
    round, so that none always runs on the caches the same other one left behind.  A turn is one
    call, or as many as take `burst` together, of which the mean is taken: otherwise a call of
    microseconds would mostly wait for memory that the others drove out of the caches.  Rounds go on
    for about `seconds` per call, at least `min_rounds`; two rounds before them are not counted.
    """
    names = list(calls)
    rounds, warm_up = min_rounds, 2
    samples = {name: Samples() for name in names}
    repeats = dict.fromkeys(names, 1)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        round_ = -warm_up
        while round_ < rounds:
            spent = 0.0
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                elapsed, cpu = time_turn(calls[name], repeats[name])
                spent += max(elapsed, burst)
                if round_ >= 0:
                    samples[name].seconds.append(elapsed / repeats[name])
                    samples[name].cpu += cpu / repeats[name]
                elif round_ == -1:
                    repeats[name] = max(1, min(int(burst / elapsed), MAX_REPEATS))
            if round_ == -1:
                affordable = int(seconds * len(names) / max(spent, 1e-9))
                least = min_rounds if min_rounds * spent < PATIENCE else min(min_rounds, FEW_ROUNDS)
                rounds = max(least, min(affordable, MAX_ROUNDS))
            round_ += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def time_turn(call: Call, repeats: int) -> tuple[float, float]:
    """Return the seconds that so many calls take, and the CPU seconds of all threads."""
    cpu = time.process_time()
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter() - start
    cpu = time.process_time() - cpu
    del result  # freed outside the clock
    return max(elapsed, 1e-9), cpu


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Hold every thread of this process on one CPU while one thread is asked for.

    Not every library can be told to use one thread: JAX's client has one that computes beside the
    one that calls it.  On more threads, or where the system knows no affinity, nothing is done.
    """
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    _set_affinity({max(allowed)})
    try:
        yield
    finally:
        _set_affinity(allowed)


def _set_affinity(cpus: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cpus)


def peak_memory(call: Call) -> int:
    """Return the peak of the bytes one call holds in tensors, its results included.

    The profiler records every allocation and release of PyTorch's CPU allocator; the peak is the
    largest running sum.  Weights and inputs exist before the call and do not count, nor does
    scratch memory that a library (MKL, oneDNN, fastrnn) takes past PyTorch's allocator.
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


def gemm_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the flop/s of the fastest of many square matrix products, on the current threads.

    For a narrower dtype than float32, float32's where that is faster: a layer may convert.
    """
    best, size = 0.0, GEMM_SIZE // 8
    while size <= GEMM_SIZE:
        a, b = torch.randn(2, size, size).to(dtype)
        out = torch.empty_like(a)
        took = fastest(functools.partial(torch.mm, a, b, out=out), seconds / 4)
        best = max(best, 2 * size**3 / took)
        if 8 * took > seconds:  # eight times the work: the next size would take too long
            break
        size *= 2
    return max(best, gemm_peak(torch.float32, seconds)) if dtype.itemsize < 4 else best


def bandwidth(size: int, seconds: float = 0.1) -> float:
    """Return the bytes per second at which the current threads read `size` bytes over and over.

    A sum reads them: each thread its own share of them, so many times in one call that the cost of
    the call does not count.  Where they fit a cache, this is the bandwidth of that cache.
    """
    threads = torch.get_num_threads()
    count = max(size // 4 // threads, 1)  # float32 of each thread
    repeats = max(READ_BYTES // (4 * count * threads), 1)
    share = torch.ones(threads, 1, count).expand(-1, repeats, -1)  # the same memory every time
    out = torch.empty(threads)
    best = fastest(lambda: torch.sum(share, (1, 2), out=out), seconds)
    return 4 * count * threads * repeats / best


def fastest(call: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of the fastest of the calls that fit into `seconds`, at least one."""
    start = time.perf_counter()
    call()
    best = first = time.perf_counter() - start
    end = time.perf_counter() + seconds - first
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
