"""Whether the libraries compute the same: checked before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Workload, bind
from bench.measure import Call
from bench.rivals import FASTRNN, TORCH_NN
from fastrnn import parity

# Libraries other than fastrnn are only checked to compute the same thing at all.
OTHERS_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


def check(workload: Workload, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
    """Compare each call's results with those of torch.nn in float64.

    fastrnn has to satisfy the rule of fastrnn.parity for the output, every final state and, in
    training, every gradient; other libraries have to be within OTHERS_ALLOWED, and have to return
    as much.  Gives per library whether it passed, and its worst tensor.
    """
    precise = in_float64(workload)
    expected = named(bind(precise.module, precise)(), workload)
    same_dtype = named(calls[TORCH_NN](), workload)
    allowed = OTHERS_ALLOWED[workload.case.dtype]
    verdicts = {}
    for name, call in calls.items():
        if name == TORCH_NN:
            continue
        got = named(call(), workload)
        if name == FASTRNN:
            worst = parity.worst(parity.compare(got, same_dtype, expected))
            verdicts[name] = {"ok": worst.ok, "worst": str(worst)}
            continue
        missing = [key for key in expected if key not in got]
        if missing:
            verdicts[name] = {"ok": False, "worst": f"does not return {', '.join(missing)}"}
            continue
        errors = {key: parity.error(got[key].reshape(y.shape), y) for key, y in expected.items()}
        key = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))  # NaN first
        verdicts[name] = {
            "ok": errors[key] <= allowed,
            "worst": f"{key}: error {errors[key]:.3g}, allowed {allowed:.3g}",
        }
    return verdicts


def in_float64(workload: Workload) -> Workload:
    state = workload.state
    return replace(
        workload,
        module=copy.deepcopy(workload.module).double(),
        input=workload.input.to(torch.float64),
        state=tuple(s.double() for s in state)
        if isinstance(state, tuple)
        else None
        if state is None
        else state.double(),
        cotangent=workload.cotangent.double(),
    )


def named(results: Sequence[Any], workload: Workload) -> dict[str, Tensor]:
    """Name the results of a call, which may end early."""
    states = ["h_n", "c_n"] if workload.cell == "lstm" else ["h_n"]
    parameters = [name for name, _ in workload.module.named_parameters()]
    names = ["output", *states]
    if workload.mode == "training":
        names += [f"d {name}" for name in ["input", *parameters]]
    return {name: as_tensor(result) for name, result in zip(names, results, strict=False)}


def as_tensor(array: Any) -> Tensor:
    """Convert what a library returns; bfloat16 of other libraries to float32."""
    if isinstance(array, Tensor):
        return array
    import numpy as np

    array = np.asarray(array)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return torch.tensor(array)  # a copy: the library may write there again
