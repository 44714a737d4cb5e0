"""Records steps of the CUDA kernels as CUDA graphs of torch, for csrc/cuda/program.h.

Asked for by ``FASTRNN_CUDA_KERNEL=step-graph``: a launch for several time steps in place of two for
each. A layer that is called while somebody else captures the stream is captured step by step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_PRODUCT_SETTINGS = (
    "fp32_precision", "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k",
)  # fmt: skip


def is_ready() -> bool:
    """Whether the current stream is nobody's to record."""
    return not torch.cuda.is_current_stream_capturing()


def product_settings() -> str:
    """What the products of torch depend on beside their arguments: a graph keeps it."""
    matmul = torch.backends.cuda.matmul
    settings = [getattr(matmul, name, None) for name in _PRODUCT_SETTINGS]
    return repr([*settings, str(torch.backends.cuda.preferred_blas_library())])


def record(steps: Callable[[int], None]) -> Callable[[], None]:
    """Record what ``steps`` puts on a stream.

    Args:
        steps: is given the stream, as ``cuda_stream`` of ``torch.cuda.Stream``, which is the
            current one then; called twice.

    Returns:
        A function that puts the same on the current stream.
    """
    current = torch.cuda.current_stream()
    steps(current.cuda_stream)  # what torch sets up once must not be in the graph
    side = torch.cuda.Stream()  # the stream of a call may be the default one, which has no graphs
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            steps(side.cuda_stream)
        finally:
            graph.capture_end()
    current.wait_stream(side)
    return graph.replay
