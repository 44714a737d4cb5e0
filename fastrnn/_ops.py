"""Loads the native extension, describes its operators to PyTorch and chooses the backend.

Backends: ``native``, the C++ kernels behind ``torch.ops.fastrnn``; ``reference``, the same
functions in plain PyTorch; and ``auto``, the default: ``native`` for CPU tensors where the
extension is installed, and for CUDA tensors where it was built with CUDA, ``reference`` elsewhere,
which is said once by a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cuda_graphs, reference


def _load() -> str | None:
    """Import the extension, which registers the operators. Returns why it is not loaded."""
    if importlib.util.find_spec("fastrnn._C") is None:
        return _why_not_built()
    try:
        importlib.import_module("fastrnn._C")
    except ImportError as error:
        return f"the native extension does not load: {error}"
    return None


def _why_not_built() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.isfile(os.path.join(root, "setup.py")):
        return (
            f"fastrnn was imported from the source tree at {root}, which is not built: "
            "run `make build` there, or leave that directory"
        )
    try:  # written by setup.py
        reason = f": {importlib.import_module('fastrnn._build').PURE_PYTHON}"
    except ImportError:
        reason = ""
    return f"fastrnn was installed without its native extension (pure-Python install{reason})"


native_error: str | None = _load()

# Whether the extension was built with CUDA kernels, whatever torch it runs on.
has_cuda: bool = native_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fastrnn::layer", "CUDA"
)
if has_cuda:
    importlib.import_module("fastrnn._C").record_programs(
        is_ready=cuda_graphs.is_ready, record=cuda_graphs.record,
        product_settings=cuda_graphs.product_settings, allows_tf32=cuda_graphs.allows_tf32,
    )  # fmt: skip

_NAMES = ("auto", "native", "reference")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def backends() -> dict[str, str | None]:
    """Every backend, with None where it is available and otherwise the reason why it is not."""
    return {"native": native_error, "reference": None}


def _checked(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(_NAMES)}")
    reason = backends().get(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return name


_default = os.environ.get("FASTRNN_BACKEND") or "auto"
_scoped: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_warned: set[str] = set()


def get_backend() -> str:
    """The backend asked for here: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _scoped.get() or _default


def set_backend(name: str) -> None:
    """Ask for a backend from now on, in every thread.

    The environment variable ``FASTRNN_BACKEND`` sets the one to begin with.

    Args:
        name: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not available here; the message gives the reason.
    """
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend inside a ``with`` block, in this thread only.

    The backward pass runs on the backend of its forward pass; one that is itself differentiated
    (``create_graph=True``) runs in plain PyTorch. Raises as :func:`set_backend` does.

    Example::

        >>> with fastrnn.use_backend("reference"):
        ...     output, h_n = layer(input)
    """
    token = _scoped.set(_checked(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def why_not_native(tensors: Sequence[Tensor | None]) -> str | None:
    """Why the kernels cannot run a layer over these tensors, the data first; None if they can."""
    data = tensors[0]
    assert data is not None
    if native_error is not None:
        return native_error
    if data.is_cuda:
        reason = _why_not_gpu(data.device)
        if reason is not None:
            return reason
    elif not (data.is_cpu or data.is_meta):
        return f"there are no native kernels for device {data.device.type!r}"
    if data.dtype not in _DTYPES:
        return f"there are no native kernels for {data.dtype}"
    if torch._C._are_functorch_transforms_active() or any(
        t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors
    ):
        return "the native kernels have no rules for torch.func transforms"
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "the native kernels have no forward-mode derivative"
    return None


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    """Why the kernels of this build do not run on a GPU; None if they do."""
    if not has_cuda:
        return "this build has no CUDA kernels (nvcc was not found, or FASTRNN_CUDA=0)"
    built = str(importlib.import_module("fastrnn._C").build_info()["cuda"])
    names = built.partition(" for ")[2].split()
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(name, capability) for name in names):
        return None
    has = ".".join(map(str, capability))
    return (
        f"the CUDA kernels of this build are for {', '.join(names)}, and {device} has {has}: "
        "build with it in TORCH_CUDA_ARCH_LIST"
    )


def _runs(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for an architecture of TORCH_CUDA_ARCH_LIST runs on a GPU: on later minor
    versions of the same major one, with an `a` on nothing else, as PTX on everything later."""
    name, _, ptx = built.partition("+")
    exact = name.endswith("a")
    major, minor = map(int, name.rstrip("af").split("."))
    if exact:
        return (major, minor) == capability
    same = major == capability[0] and minor <= capability[1]
    return same or (ptx == "PTX" and (major, minor) <= capability)


def is_plain_native() -> bool:
    """Whether nothing but the native kernels is asked for: no other backend, no transform, no
    autocast, no tracing."""
    return native_error is None and plain_calls.hold()


def is_plain_native_on(*tensors: object) -> bool:
    """The same of a call on these tensors, the data first; not for what is no tensor."""
    return (
        all(isinstance(t, Tensor) and t.is_cpu for t in tensors)
        and cast(Tensor, tensors[0]).dtype in _DTYPES
        and not torch.compiler.is_compiling()
        and is_plain_native()
    )


def _plain_calls() -> Any:
    """What ``is_plain_native`` asks, see csrc/python_stream.cpp."""
    conditions = [
        (torch._C._is_any_autocast_enabled, False),
        (torch._C._are_functorch_transforms_active, False),
        (torch._C._get_tracing_state, None),
        (torch._C._len_torch_dispatch_stack, 0),
        (torch._C._len_torch_function_stack, 0),
    ]
    extension = importlib.import_module("fastrnn._C")
    return extension.PlainCalls(conditions, _scoped, globals(), forward_ad)


def resolve(tensors: Sequence[Tensor | None]) -> str:
    """The backend that runs a layer over these tensors: ``"native"`` or ``"reference"``.

    Raises:
        RuntimeError: the backend asked for cannot run it.
    """
    if get_backend() == "reference":
        return "reference"
    why_not = why_not_native(tensors)
    if why_not is None:
        return "native"
    report(why_not)
    return "reference"


def report(why_not: str) -> None:
    """Say once that the reference runs, and why; nothing if it was asked for.

    Raises:
        RuntimeError: another backend was asked for.
    """
    asked = get_backend()
    if asked == "native":
        _checked(asked)
        raise RuntimeError(f"backend {asked!r} cannot run this: {why_not}")
    if asked == "auto" and why_not not in _warned:
        _warned.add(why_not)
        warnings.warn(
            f"fastrnn runs its slow reference in plain PyTorch: {why_not}. "
            "`python -m fastrnn.info` tells more; set_backend('reference') silences this.",
            stacklevel=_frames_to_user(),
        )


def _frames_to_user() -> int:
    """The ``stacklevel`` of the first frame above :func:`report` outside fastrnn and torch."""
    folders = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folders):
        frame, level = frame.f_back, level + 1
    return level


def _layer_fake(
    cell: str, input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None,
    batch_sizes: Tensor | None, groups: int, direction: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer``, for tensors without data."""
    info = reference.CELLS[cell]
    hidden, size = weights[1].shape[0] // info.gates, weights[1].shape[1]
    batch = input.shape[1] if h0 is None else h0.shape[1]
    rows = input.shape[:-1].numel()
    compute = reference.compute_dtype(input.dtype)
    keeps = save and info.has_c
    return (
        input.new_empty([*input.shape[:-1], groups * size]),
        input.new_empty([groups, batch, size]),
        input.new_empty([groups, batch, hidden] if info.has_c else [0]),
        input.new_empty([groups, rows, hidden] if keeps else [0], dtype=compute),
        input.new_empty([groups, rows, info.saved * hidden] if save else [0]),
    )


def _layer_backward_fake(
    cell: str, doutput: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor,
    output: Tensor, cells: Tensor, saved: Tensor, weights: Sequence[Tensor], h0: Tensor | None,
    c0: Tensor | None, batch_sizes: Tensor | None, groups: int, direction: int,
    wanted: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of the results of ``layer_backward``, for tensors without data."""
    info = reference.CELLS[cell]
    hidden, size = weights[1].shape[0] // info.gates, weights[1].shape[1]
    batch = input.shape[1] if h0 is None else h0.shape[1]
    shapes = [input.shape, [groups, batch, size], [groups, batch, hidden]]
    shapes += [w.shape for w in weights]
    made = [
        input.new_empty(shape if want else [0])
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    return made[0], made[3:], made[1], made[2]


if native_error is None:
    plain_calls = _plain_calls()
    python_tensors = importlib.import_module("fastrnn._C").PythonTensors(Tensor, torch.nn.Parameter)
    layer = torch.ops.fastrnn.layer.default
    layer_backward = torch.ops.fastrnn.layer_backward.default
    torch.library.register_fake("fastrnn::layer", _layer_fake)
    torch.library.register_fake("fastrnn::layer_backward", _layer_backward_fake)


# Environment variables that ask for what is not there, and why it is not: this stops the import,
# except of `python -m fastrnn.info`, which reports it.
environment_errors: dict[str, str] = {}


def _check_environment() -> None:
    # While Python looks for the module of -m, "-m" stands in place of its name.
    reports = sys.argv[:1] == ["-m"] and any(a.endswith("fastrnn.info") for a in sys.orig_argv)
    try:
        _checked(_default)
    except (ValueError, RuntimeError) as error:
        if not reports:
            raise
        environment_errors["FASTRNN_BACKEND"] = str(error)
    try:
        if native_error is None:
            importlib.import_module("fastrnn._C").cpu_isa()
    except ValueError as error:
        if not reports:
            raise
        environment_errors["FASTRNN_CPU_ISA"] = str(error)


_check_environment()
