"""Chooses the backend that runs a layer.

Backends: ``native``, the C++ and CUDA kernels behind ``torch.ops.fastrnn``; ``triton``, Triton
kernels behind ``torch.ops.fastrnn_triton``, for GPUs; ``reference``, the same functions in plain
PyTorch; and ``auto``, the default: ``native`` where it has kernels for the tensors' device,
otherwise ``triton`` on a GPU, otherwise ``reference``, which is said once by a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import operator
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops, modes

_NAMES = ("auto", "native", "triton", "reference")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def backends() -> dict[str, str | None]:
    """Every backend, with None where it is available and otherwise the reason why it is not."""
    return {name: _why_not_available(name) for name in _NAMES[1:]}


def _why_not_available(name: str) -> str | None:
    return triton_error() if name == "triton" else _ops.native_error if name == "native" else None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # None in sys.modules, which hides it
        return False


@functools.cache
def triton_error() -> str | None:
    """Why there is no Triton backend here; None if there is. Imports Triton."""
    if not _is_there("triton"):
        return "Triton is not installed (pip install fastrnn[triton])"
    try:
        importlib.import_module("fastrnn.triton")
    except Exception as error:  # whatever a Triton of another version, or its drivers, raise
        return f"Triton does not load: {type(error).__name__}: {error}"
    return None


def _checked(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(_NAMES)}")
    reason = _why_not_available(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return name


_default = os.environ.get("FASTRNN_BACKEND") or "auto"
_scoped: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_warned: set[str] = set()


def get_backend() -> str:
    """The backend asked for here: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``."""
    return _scoped.get() or _default


def set_backend(name: str) -> None:
    """Ask for a backend from now on, in every thread.

    The environment variable ``FASTRNN_BACKEND`` sets the one to begin with.

    Args:
        name: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not available here; the message gives the reason.
    """
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend inside a ``with`` block, in this thread only.

    The backward pass runs on the backend of its forward pass, its own derivative
    (``create_graph=True``) in plain PyTorch. Raises as :func:`set_backend` does.

    Example::

        >>> with fastrnn.use_backend("reference"):
        ...     output, h_n = layer(input)
    """
    token = _scoped.set(_checked(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def why_not(backend: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why ``"native"`` or ``"triton"`` cannot run a layer over these tensors, the data first; None
    if it can."""
    data = tensors[0]
    assert data is not None
    reason = _why_no_kernels(backend, data.device, data.dtype)
    if reason is not None:
        return reason
    if modes.is_mapped_by_autograd(tensors):
        return f"the {backend} kernels have no rules for is_grads_batched"
    if modes.has_tangents(tensors):
        return _NO_TANGENTS.format(backend)
    if modes.is_under("Functionalize"):
        return f"the {backend} kernels have no rule for torch.func.functionalize"
    return None


_NO_TANGENTS = "the {} kernels have no forward-mode derivative"


def _why_no_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = (_why_not_native if backend == "native" else _why_not_triton)(device)
    if reason is None and dtype not in _DTYPES:
        return f"there are no {backend} kernels for {dtype}"
    return reason


def _why_not_native(device: torch.device) -> str | None:
    if _ops.native_error is not None:
        return _ops.native_error
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type not in ("cpu", "meta"):
        return f"there are no native kernels for device {device.type!r}"
    return None


def _why_not_triton(device: torch.device) -> str | None:
    error = triton_error()
    if error is not None:
        return error
    if device.type == "cuda":
        return _why_not_triton_on(device)
    if device.type == "cpu" and importlib.import_module("fastrnn.triton").interpreted:
        return None
    return (
        f"the Triton kernels are for GPUs, and the data is on {device.type!r} "
        "(TRITON_INTERPRET=1 runs them on a CPU, slowly)"
    )


@functools.cache
def _why_not_triton_on(gpu: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(gpu)
    if capability < (8, 0):
        has = ".".join(map(str, capability))
        return f"Triton needs compute capability 8.0 or later, and {gpu} has {has}"
    return _why_no_launches()


def _why_no_launches() -> str | None:
    """Triton compiles, once, a little C that launches its kernels."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler (gcc or clang, or one that CC names) to launch kernels"
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Triton needs Python.h (python3-dev) to launch kernels"
    return None


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    """Why the kernels of this build do not run on a GPU; None if they do."""
    if not _ops.has_cuda:
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
    return _ops.native_error is None and plain_calls.hold()


def is_plain_native_on(*tensors: object) -> bool:
    """The same of a call on these tensors, the data first, which may be mapped and differentiated
    by torch.func; not for what is no tensor."""
    if torch.compiler.is_compiling() or _ops.native_error is not None:
        return False
    if torch._C._are_functorch_transforms_active():
        if not (transformed_calls.hold() and modes.only_maps_and_differentiates()):
            return False
    elif not plain_calls.hold():
        return False
    try:
        on_cpu = all(map(_IS_CPU, tensors))
    except AttributeError:  # no tensor
        return False
    return on_cpu and cast(Tensor, tensors[0]).dtype in _DTYPES


_IS_CPU = operator.attrgetter("is_cpu")


def _plain_calls(*more: tuple[Callable[[], Any], Any]) -> Any:
    """What ``is_plain_native`` asks, see csrc/python_stream.cpp."""
    conditions = [
        *more,
        (torch._C._is_any_autocast_enabled, False),
        (torch._C._get_tracing_state, None),
        (torch._C._len_torch_dispatch_stack, 0),
        (torch._C._len_torch_function_stack, 0),
    ]
    extension = importlib.import_module("fastrnn._C")
    return extension.PlainCalls(conditions, _scoped, globals(), forward_ad)


def resolve(tensors: Sequence[Tensor | None]) -> str:
    """The backend that runs a layer over these tensors: ``"native"``, ``"triton"`` or
    ``"reference"``.

    Raises:
        RuntimeError: the backend asked for cannot run it.
    """
    data = tensors[0]
    assert data is not None
    return _first(data.device, lambda backend: why_not(backend, tensors))


@torch.compiler.assume_constant_result
def while_compiling(device: torch.device, dtype: torch.dtype) -> str:
    """``resolve`` for data of this kind, whose answer a compiled model keeps."""

    def reason_against(backend: str) -> str | None:
        reason = _why_no_kernels(backend, device, dtype)
        if reason is None and modes.may_have_tangents():
            return _NO_TANGENTS.format(backend)
        return reason

    return _first(device, reason_against)


def _first(device: torch.device, reason_against: Callable[[str], str | None]) -> str:
    """The first backend, of those that come into question, against which there is no reason."""
    asked = get_backend()
    if asked == "reference":
        return "reference"
    if asked != "auto":
        candidates: Sequence[str] = (asked,)
    else:  # the interpreter of Triton is for those who ask for it
        candidates = ("native", "triton") if device.type == "cuda" else ("native",)
    reasons: list[str] = []
    for backend in candidates:
        reason = reason_against(backend)
        if reason is None:
            return backend
        reasons += [reason] if reason not in reasons else []
    report("; ".join(reasons))
    return "reference"


def report(reason: str) -> None:
    """Say once that the reference runs, and why; nothing if it was asked for.

    Raises:
        RuntimeError: another backend was asked for.
    """
    asked = get_backend()
    if asked in ("native", "triton"):
        _checked(asked)
        raise RuntimeError(f"backend {asked!r} cannot run this: {reason}")
    if asked == "auto" and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fastrnn runs its slow reference in plain PyTorch: {reason}. "
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


if _ops.native_error is None:
    plain_calls = _plain_calls((torch._C._are_functorch_transforms_active, False))
    transformed_calls = _plain_calls()


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
        if _ops.native_error is None:
            importlib.import_module("fastrnn._C").cpu_isa()
    except ValueError as error:
        if not reports:
            raise
        environment_errors["FASTRNN_CPU_ISA"] = str(error)


_check_environment()
