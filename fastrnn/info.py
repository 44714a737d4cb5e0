"""`python -m fastrnn.info`: what is installed here, how it was built, and what will run.

`python -m fastrnn.info --explain T B I H CELL DTYPE DEVICE [--bidirectional] [--kernel NAME]
[--backend NAME]` tells how a layer of this shape would run on a GPU, which does not have to be
there: the kernel, its sizes and the reasons against the others. DEVICE is cuda, for the GPU that is
there, or one of a100, l40s, h100, h200, b200; the backend native (where it is installed) or triton.

Works in every installation, also one without the native part, and needs no compiler. A setting that
cannot be met is reported where other programs stop.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastrnn
from fastrnn import _backend, _ops, cuda_graphs
from fastrnn.reference import CELLS


def report() -> str:
    """The text that `python -m fastrnn.info` prints.

    Example:
        >>> print(fastrnn.info.report())  # doctest: +SKIP
    """
    sections = [
        ("versions", _versions()),
        ("native build", _native_build()),
        ("CPU", _cpu()),
        ("backends", _backends()),
        ("environment", _environment()),
    ]
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections)


def backend_in_use(device: str = "cpu") -> str:
    """What runs a layer on `device` here, for example `auto (native, avx2)`.

    Raises:
        RuntimeError: the backend asked for cannot run there.
    """
    asked = fastrnn.get_backend()
    used = _backend.resolve([torch.empty(0, device=device)])
    words = [used] if used != asked else []
    if used == "native" and torch.device(device).type == "cpu":
        words.append(importlib.import_module("fastrnn._C").cpu_isa())
    return f"{asked} ({', '.join(words)})" if words else asked


def _versions() -> list[tuple[str, str]]:
    cuda = torch.version.cuda
    return [
        ("fastrnn", fastrnn.__version__),
        ("imported from", str(Path(fastrnn.__file__).resolve().parent)),
        ("torch", torch.__version__ + (f" (CUDA {cuda})" if cuda else "")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
    ]


def _native_build() -> list[tuple[str, str]]:
    if _ops.native_error is None:
        build = importlib.import_module("fastrnn._C").build_info()
        return [(str(name), _joined(value)) for name, value in build.items()]
    rows = [("not loaded", _ops.native_error)]
    if importlib.util.find_spec("fastrnn._build"):  # written where there was a reason to
        again = "`FASTRNN_BUILD=1 pip install .` says what it needs, and builds the native part"
        rows.append(("remedy", again))
    return rows


def _cpu() -> list[tuple[str, str]]:
    rows = [("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")]
    if _ops.native_error is None:
        native = importlib.import_module("fastrnn._C")
        isas = f"{_joined(native.cpu_isas())} (built, and supported by this CPU)"
        rows.append(("instruction sets", isas))
        try:
            rows.append(("in use", native.cpu_isa()))
        except ValueError as error:
            rows.append(("in use", f"none: {error}"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = [("selected", fastrnn.get_backend())]
    for name, reason in _backend.backends().items():
        told = "available" if reason is None else f"not available: {reason}"
        rows.append((name, told + (_about_triton() if name == "triton" and not reason else "")))
    return rows


def _about_triton() -> str:
    version = importlib.import_module("triton").__version__
    if importlib.import_module("fastrnn.triton").interpreted:
        return f": {version}, in its interpreter"
    if not torch.cuda.is_available():
        return f": {version}, for GPUs, of which torch sees none"
    reason = _backend._why_not_triton(torch.device("cuda"))
    return f": {version}" + (f", but {reason}" if reason else "")


def _environment() -> list[tuple[str, str]]:
    mistakes, rows = _backend.environment_errors, []
    for name in (
        "FASTRNN_BACKEND", "FASTRNN_CPU_ISA", "FASTRNN_TRITON_KERNEL", "TRITON_INTERPRET"
    ):  # fmt: skip
        value = os.environ.get(name, "not set")
        rows.append((name, f"{value}; {mistakes[name]}" if name in mistakes else value))
    return rows


def _joined(value: object) -> str:
    """Lists as words, everything else as it prints."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return " ".join(str(item) for item in value)
    return str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def explain(
    T: int, B: int, I: int, H: int, cell: str, dtype: str, device: str,  # noqa: E741
    bidirectional: bool = False, kernel: str = "auto", backend: str | None = None,
) -> str:  # fmt: skip
    """How a layer would run on a GPU: what ``python -m fastrnn.info --explain`` prints.

    Dimension key: T time, B batch, I input, H hidden.

    Args:
        cell: ``"rnn_tanh"``, ``"rnn_relu"``, ``"lstm"`` or ``"gru"``.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"cuda"``, the GPU that is there, or the name of one.
        kernel: ``"auto"``, or the one that is asked for.
        backend: ``"native"`` or ``"triton"``; None: the native one where it is installed.

    Raises:
        RuntimeError: the backend is not available, or ``"cuda"`` and there is no GPU.
        ValueError: unknown cell, dtype, device or kernel, or a kernel that cannot run it.
    """
    if backend is None:
        backend = "native" if _ops.native_error is None else "triton"
    if backend not in ("native", "triton"):
        raise ValueError(f"unknown backend {backend!r}, expected native or triton")
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}, expected one of {', '.join(CELLS)}")
    if dtype not in ("float32", "float64", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}, expected float32, float64, bfloat16 or float16")
    size, D = getattr(torch, dtype).itemsize, 1 + bidirectional
    if backend == "triton":
        rows = _triton_plan(B, H, D, cell, size, device, kernel)
    else:
        rows = _native_plan(T, B, I, H, D, cell, size, device, kernel)
    directions = ", both directions" if bidirectional else ""
    title = f"{cell} {dtype} T={T} B={B} I={I} H={H}{directions} on {device}"
    return f"{title}\n{_table(rows)}"


def _triton_plan(
    B: int, H: int, D: int, cell: str, size: int, device: str, kernel: str
) -> list[tuple[str, str]]:
    if min(B, H) < 1:
        raise ValueError(f"a plan needs T, B, H and D of at least 1, got B={B}, H={H}")
    reason = _backend.triton_error()
    if reason is not None:
        raise RuntimeError(f"plans of the Triton backend are made by it: {reason}")
    plans = importlib.import_module("fastrnn.triton.plan")
    if device in plans.GPUS:
        gpu = plans.GPUS[device]
    else:
        facts = _gpu_facts(plans.GPUS, device)
        gpu = plans.Gpu(facts["multiprocessors"], facts["shared_bytes"])
    tf32 = size == 4 and cuda_graphs.allows_tf32()
    shape = plans.Shape(CELLS[cell].gates, B, H, D, size, False, tf32)
    if kernel not in ("auto", *plans.KERNELS):
        names = ", ".join(("auto", *plans.KERNELS))
        raise ValueError(f"unknown kernel {kernel!r}, expected one of {names}")
    if kernel == "auto":
        kernel = importlib.import_module("fastrnn.triton.passes").asked_kernel()
    try:
        plan = plans.make_plan(shape, gpu, kernel)
    except ValueError as error:
        raise ValueError(f"kernel {kernel!r} cannot run this: {error}") from None
    return [
        ("kernel", f"{plan.kernel}: {plan.why}"),
        ("tiles", f"{plan.tiles()}; {plan.warps} warps, {plan.stages} stages"),
        *(("not", reason) for reason in plan.against),
    ]


def _native_plan(
    T: int, B: int, I: int, H: int, D: int, cell: str, size: int, device: str,  # noqa: E741
    kernel: str,
) -> list[tuple[str, str]]:  # fmt: skip
    if _ops.native_error is not None:
        raise RuntimeError(f"plans are made by the native part: {_ops.native_error}")
    native = importlib.import_module("fastrnn._C")
    facts = _gpu_facts(native.gpus(), device)
    disabled = _is_set("FASTRNN_DISABLE_PERSISTENT")
    if disabled and kernel.startswith("persistent"):
        raise ValueError(f"kernel {kernel!r} cannot run this: FASTRNN_DISABLE_PERSISTENT=1")
    if most := os.environ.get("FASTRNN_MAX_SMS"):
        if not most.isdecimal() or int(most) < 1:
            raise ValueError(f"FASTRNN_MAX_SMS must be a number from 1 on, and is {most}")
        facts = facts | {"multiprocessors": min(facts["multiprocessors"], int(most))}
    plan, backward = (
        native.plan(
            cell=cell, T=T, B=B, I=I, H=H, D=D, item_bytes=size, gpu=facts,
            kernel=kernel, persistent=_is_set("FASTRNN_PERSISTENT") and not disabled,
            tf32=cuda_graphs.allows_tf32(), backward=is_backward,
        )
        for is_backward in (False, True)
    )  # fmt: skip
    of = "block" if plan["kernel"].startswith("persistent") else "direction"
    return [
        ("kernel", f"{plan['kernel']}: {plan['why']}"),
        ("backward", f"{backward['kernel']}: {backward['why']}"),
        ("gate kernel", f"{plan['units']} units a thread, {plan['threads']} threads a {of}"),
        ("grid", f"{plan['blocks']} blocks on {facts['multiprocessors']} multiprocessors"),
        ("input products", f"of {plan['chunk_steps']} steps at a time"),
        ("launches", f"{plan['launches']} in a forward pass"),
        ("weights", plan["weights"]),
        *(("not", reason) for reason in plan["against"]),
    ]


def _is_set(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} must be 0 or 1, and is {value}")
    return value == "1"


def _gpu_facts(known: Mapping[str, Any], device: str) -> dict[str, Any]:
    if device in known:
        return known[device]
    if device != "cuda":
        raise ValueError(f"unknown device {device!r}, expected cuda or one of {', '.join(known)}")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here: name one, for example h200")
    facts: Any = torch.cuda.get_device_properties(0)
    return {
        "capability": (facts.major, facts.minor),
        "multiprocessors": facts.multi_processor_count,
        "shared_bytes": facts.shared_memory_per_block_optin,
        "register_bytes": 4 * facts.regs_per_multiprocessor,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastrnn.info", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = ("T", "B", "I", "H", "CELL", "DTYPE", "DEVICE")
    parser.add_argument("--explain", nargs=7, metavar=names)
    parser.add_argument("--bidirectional", action="store_true", help="with --explain")
    parser.add_argument("--kernel", default="auto", help="with --explain: the one asked for")
    parser.add_argument("--backend", help="with --explain: native or triton")
    options = parser.parse_args(arguments)
    if options.explain is None:
        print(report())
        return 0
    *sizes, cell, dtype, device = options.explain
    try:
        T, B, I, H = map(int, sizes)  # noqa: E741
        given = (options.bidirectional, options.kernel, options.backend)
        print(explain(T, B, I, H, cell, dtype, device, *given))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
