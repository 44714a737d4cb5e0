"""Records steps of the CUDA kernels as CUDA graphs of torch, for csrc/cuda/program.h.

Asked for by ``FASTRNN_CUDA_KERNEL=step-graph``: two launches for sixteen time steps in place of two
for each. A layer that is called while somebody else captures the stream is captured step by step.
Not to be asked for together with ``torch.compile(mode="reduce-overhead")`` or a memory pool of the
caller's own: what is kept would lie in that pool. While a graph is recorded, no other thread may
draw from the generator of the device (dropout).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

import torch

_PRODUCT_SETTINGS = (
    "fp32_precision", "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k",
)  # fmt: skip

# torch's set of graphs that know the generator is not locked.
_recording = threading.RLock()

# For each stream of callers one to record on, which nobody else uses. The stream of a call may be
# the default one, which cannot be recorded; and torch's own are shared, with the work of others and
# with the scratch memory of the products in their graphs.
_side_streams: dict[int, torch.cuda.Stream] = {}


def is_ready() -> bool:
    """Whether the current stream is nobody's to record."""
    return not torch.cuda.is_current_stream_capturing()


def product_settings() -> str:
    """What the products of torch depend on beside their arguments: a graph keeps it."""
    matmul = torch.backends.cuda.matmul
    settings = [getattr(matmul, name, None) for name in _PRODUCT_SETTINGS]
    return repr([*settings, str(torch.backends.cuda.preferred_blas_library())])


def allows_tf32() -> bool:
    """Whether torch's products of float32 may be those of TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


class Program:
    """A graph that was recorded: ``replay`` puts it on the current stream, ``close`` ends it."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph
        self.replay = graph.replay

    def close(self) -> None:
        with _recording:
            self._graph.reset()


def record(steps: Callable[[int], None]) -> Program:
    """Record what ``steps`` puts on a stream.

    Args:
        steps: is given the stream, as ``cuda_stream`` of ``torch.cuda.Stream``, which is the
            current one then; called twice.
    """
    current = torch.cuda.current_stream()
    with _recording:
        side = _side_stream(current)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                steps(side.cuda_stream)  # what torch sets up once for a stream: not in the graph
                graph = torch.cuda.CUDAGraph()
                with torch.inference_mode(False):  # or generators' states become such tensors
                    graph.capture_begin(capture_error_mode="relaxed")
                try:
                    steps(side.cuda_stream)
                except BaseException as error:
                    _end(graph, error)
                    raise
                graph.capture_end()
        finally:
            current.wait_stream(side)  # even then: it works on memory that goes back
    return Program(graph)


def release() -> None:
    """Give the memory of all graphs back to torch, as soon as no layer runs."""
    importlib.import_module("fastrnn._C").release_programs()


def _side_stream(current: torch.cuda.Stream) -> torch.cuda.Stream:
    key = current.cuda_stream if current.cuda_stream else -1 - current.device_index
    if key not in _side_streams:
        stream = importlib.import_module("fastrnn._C").new_stream(current.device_index)
        _side_streams[key] = torch.cuda.ExternalStream(stream, device=current.device)
    return _side_streams[key]


def _end(graph: torch.cuda.CUDAGraph, error: BaseException) -> None:
    """End a capture that has failed; what that says is a note to the first error."""
    try:
        graph.capture_end()
    except RuntimeError as second:
        if hasattr(error, "add_note"):
            error.add_note(f"and the capture could not be ended: {second}")
