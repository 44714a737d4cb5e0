"""Gradient parity with torch.nn: the tolerance rule, and a check that runs anywhere.

    python -m fastrnn.parity [--device cpu] [--dtype float32 bfloat16] [--backend NAME]

runs every layer and its torch.nn counterpart on the same values, compares outputs, final states and
all gradients with a float64 run of torch.nn, prints one line per configuration and exits with 1 if
any fails. It needs torch only and takes some seconds. It runs on one CPU thread: the problems are
too small for more.

The rule: `error(got) <= 2 * error(torch.nn, same dtype and device) + k eps`, where
`error(y) = max|y - y64| / (1 + max|y64|)`, `y64` is torch.nn in float64 on the same values, eps is
the dtype's machine epsilon and k is 64 in float64, 16 in float32 and 4 in the 16-bit types.
It asks for numbers as good as torch.nn's own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import info

# Room for luck, in units of the dtype's machine epsilon: two correct programs that sum in different
# orders round differently, and where torch.nn happens to hit the float64 value twice its error
# leaves none. Measured with textbook loops that sum the recurrent product in reverse order, on 6000
# random configurations and all their gradients: the largest of `error(loops) - 2 * error(torch.nn)`
# was 16 (float64), 7.3 (float32), 1.9 (bfloat16) and 1.1 (float16) epsilons. In float64 torch.nn is
# its own reference, so that this constant is the whole allowance there.
ROOM = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
EPS = {dtype: k * torch.finfo(dtype).eps for dtype, k in ROOM.items()}
NO_PROJECTIONS = "LSTM with projections is not supported with oneDNN"  # torch.nn warns of itself


@dataclass(frozen=True)
class Comparison:
    """One tensor of `got` beside the same tensor of torch.nn."""

    name: str
    error: float
    torch_error: float
    allowed: float
    problem: str = ""  # a difference that is not a matter of size

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.allowed

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: error {self.error:.3g}, torch.nn {self.torch_error:.3g}, "
            f"allowed {self.allowed:.3g}"
        )


def error(y: Tensor, y64: Tensor, where: Tensor | None = None) -> float:
    """`max|y - y64| / (1 + max|y64|)`, over the elements `where` is true if given."""
    y, y64 = y.detach().double(), y64.detach().double()
    if where is not None:
        y, y64 = y[where], y64[where]
    if y64.numel() == 0:
        return 0.0
    return ((y - y64).abs().max() / (1 + y64.abs().max())).item()


def compare(
    got: Mapping[str, Tensor], torch_same: Mapping[str, Tensor], ref64: Mapping[str, Tensor]
) -> list[Comparison]:
    """Compare all tensors of `got` with torch.nn's in the same dtype by the rule.

    Names, shapes and dtypes must be torch.nn's. NaN and infinities must stand where torch.nn in
    the same dtype, or in float64, has them; sizes are compared where all three are finite.
    """
    result = []
    for name in sorted({*got, *torch_same}, key=[*torch_same, *got].index):
        if name not in got or name not in torch_same:
            problem = "missing" if name in torch_same else "not in torch.nn's result"
            result.append(Comparison(name, 0.0, 0.0, 0.0, problem))
        else:
            result.append(_compare_tensor(name, got[name], torch_same[name], ref64[name]))
    return result


def _compare_tensor(name: str, got: Tensor, torch_same: Tensor, y64: Tensor) -> Comparison:
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(got, what), getattr(torch_same, what)
        if mine != theirs:
            return Comparison(name, 0.0, 0.0, 0.0, f"{what} {mine}, torch.nn has {theirs}")
    got, torch_same, y64 = got.detach(), torch_same.detach(), y64.detach().to(got.device)
    if not (_same_kind(got, torch_same) | _same_kind(got, y64)).all():
        return Comparison(name, 0.0, 0.0, 0.0, "NaN or infinity not where torch.nn has it")
    finite = got.isfinite() & torch_same.isfinite() & y64.isfinite()
    torch_error = error(torch_same, y64, finite)
    return Comparison(name, error(got, y64, finite), torch_error, 2 * torch_error + EPS[got.dtype])


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: both finite, both NaN, or the same infinity."""
    both_finite = a.isfinite() & b.isfinite()
    return both_finite | (a.isnan() & b.isnan()) | (a.isinf() & (a.double() == b.double()))


def run_layer(
    module: torch.nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    cotangents: Mapping[str, Tensor] | None = None,
    leaves: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run a recurrent layer and return its outputs and all gradients by name.

    The gradients are those of `sum(output * cotangents["output"]) + sum(h_n * cotangents["h_n"])
    + ...` and are named "d " + parameter, "d input", "d h_0", "d c_0". Tensors that do not require
    grad have no entry. Without cotangents only "output", "h_n" and, for an LSTM, "c_n" are
    returned.

    Args:
        leaves: the tensors that input and states were made from, where those are not leaves
    """
    output, state = module(input, hx)
    outputs = {"output": output.data if isinstance(output, PackedSequence) else output}
    outputs |= zip(("h_n", "c_n"), state if isinstance(state, tuple) else (state,), strict=False)
    if leaves is None:
        leaves = {"input": input.data if isinstance(input, PackedSequence) else input}
        if hx is not None:
            states = hx if isinstance(hx, (tuple, list)) else (hx,)
            leaves |= zip(("h_0", "c_0"), states, strict=False)
    return with_gradients(outputs, {**dict(module.named_parameters()), **leaves}, cotangents)


def with_gradients(
    outputs: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The outputs, and as "d name" the gradient of every leaf that requires one and gets one."""
    result = {name: value.detach() for name, value in outputs.items()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if cotangents is not None and leaves:
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [cotangents[name].to(value) for name, value in outputs.items()],
            allow_unused=True,
        )
        result |= {
            f"d {name}": gradient
            for name, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None
        }
    return result


class Sampler:
    """Random values from a seed, exactly representable in `dtype` and held in float64.

    ReLU's derivative jumps at zero: where rounding alone decides on which side a pre-activation
    falls, two correct programs have different gradients. With `integers`, data are small integers
    and parameters -1, 0 or 1, about one per row of a weight not zero: no pre-activation is rounded.
    """

    def __init__(self, seed: int, dtype: torch.dtype, integers: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.integers = integers

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return value.to(self.dtype).double()

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return 2 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 1

    def data(self, shape: Sequence[int]) -> Tensor:
        return self.normal(shape).round() if self.integers else self.normal(shape)

    def cotangent(self, shape: Sequence[int], rows: int) -> Tensor:
        """Weights of a result in the loss, so that sums over `rows` rows of data are about 1.

        Otherwise sums of many large terms that happen to cancel would decide the comparison.
        """
        return self.normal(shape, max(rows, 1) ** -0.5)

    def parameter(self, shape: Sequence[int], hidden_size: int) -> Tensor:
        value = self.uniform(shape)
        if self.integers:
            density = 1 / shape[-1] if len(shape) == 2 else 0.5
            return value.sign() * (self.uniform(shape).abs() < density)
        # As torch.nn initialises, but where a sum has more terms than there are hidden units: large
        # pre-activations of either sign cancel, and what is left is mostly luck.
        terms = max(hidden_size, shape[-1]) if len(shape) == 2 else hidden_size
        return (value / terms**0.5).to(self.dtype).double()


# Cell -> class, extra arguments.
_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN tanh": ("RNN", {"nonlinearity": "tanh"}),
    "RNN relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "LSTM proj": ("LSTM", {"proj_size": 11}),
    "GRU": ("GRU", {}),
}
# Case -> time steps, or lengths of a packed sequence; arguments of the layer.
_CASES: dict[str, tuple[int | tuple[int, ...], dict[str, Any]]] = {
    "one step": (1, {}),
    "no bias": (12, {"bias": False}),
    "stack": (12, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "packed": ((5, 12, 1, 7), {"bidirectional": True}),
}
_B, _I, _H = 4, 9, 37
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in EPS}


def run_case(
    namespace: Any, cell: str, case: str, dtype: torch.dtype, device: str, compute: torch.dtype
) -> dict[str, Tensor]:
    """Run the layer of `namespace` (torch.nn or fastrnn) in `compute` on values of `dtype`."""
    class_name, extra = _CELLS[cell]
    steps, options = _CASES[case]
    sampler = Sampler(0, dtype, integers=cell == "RNN relu")

    def leaf(*shape: int) -> Tensor:
        return sampler.data(shape).to(device, compute).requires_grad_()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_PROJECTIONS, UserWarning)
        layer: torch.nn.Module = getattr(namespace, class_name)(
            _I, _H, **options, **extra, device=device, dtype=compute
        )
        layer.load_state_dict(
            {name: sampler.parameter(p.shape, _H) for name, p in layer.state_dict().items()}
        )
        D = 2 if options.get("bidirectional") else 1
        LD, P = options.get("num_layers", 1) * D, extra.get("proj_size", _H)
        T = steps if isinstance(steps, int) else max(steps)
        sequence: tuple[int, ...] = (_B, T) if options.get("batch_first") else (T, _B)
        leaves = {"input": leaf(*sequence, _I), "h_0": leaf(LD, _B, P)}
        cotangents = {"h_n": sampler.cotangent((LD, _B, P), T * _B)}
        hx: Any = leaves["h_0"]
        if class_name == "LSTM":
            leaves["c_0"] = leaf(LD, _B, _H)
            cotangents["c_n"] = sampler.cotangent((LD, _B, _H), T * _B)
            hx = (leaves["h_0"], leaves["c_0"])
        data: Tensor | PackedSequence = leaves["input"]
        if not isinstance(steps, int):
            data = pack_padded_sequence(leaves["input"], torch.tensor(steps), enforce_sorted=False)
            sequence = (sum(steps),)
        cotangents["output"] = sampler.cotangent((*sequence, D * P), T * _B)
        return run_layer(layer, data, hx, cotangents, leaves)


def check_case(cell: str, case: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    return compare(
        run_case(fastrnn, cell, case, dtype, device, dtype),
        run_case(torch.nn, cell, case, dtype, device, dtype),
        run_case(torch.nn, cell, case, dtype, device, torch.float64),
    )


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """The comparison that failed, or came closest to it."""
    return max(comparisons, key=lambda c: (bool(c.problem), c.error / max(c.allowed, 1e-300)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))
    parser.add_argument("--backend", help="the fastrnn backend to check; default: its own choice")
    options = parser.parse_args(arguments)
    try:
        if torch.device(options.device).type == "meta":
            raise ValueError("it holds no numbers to compare")
        torch.zeros(1, dtype=torch.float64, device=options.device)
    except (ValueError, RuntimeError, AssertionError, TypeError) as problem:
        parser.error(f"--device {options.device}: {str(problem).splitlines()[0]}")
    asked = options.backend or fastrnn.get_backend()
    try:
        with fastrnn.use_backend(asked):
            backend = info.backend_in_use(options.device)
    except (ValueError, RuntimeError) as problem:
        parser.error(str(problem))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fastrnn.use_backend(asked):
            return _report(options.dtype, options.device, backend)
    finally:
        torch.set_num_threads(threads)


def _report(dtypes: Sequence[str], device: str, backend: str) -> int:
    """Run and print every configuration; 1 if one is outside the rule, else 0."""
    failed = 0
    print(
        f"fastrnn {fastrnn.__version__}, torch {torch.__version__}, device {device}, "
        f"backend {backend}\n\n"
        f"{'cell':<10}{'dtype':<10}{'case':<10}{'fastrnn':>10}{'torch.nn':>10}{'allowed':>10}"
        "  tensor"
    )
    for cell in _CELLS:
        for dtype in dtypes:
            for case in _CASES:
                comparisons = check_case(cell, case, _DTYPES[dtype], device)
                bad = [c for c in comparisons if not c.ok]
                failed += bool(bad)
                c = worst(bad or comparisons)
                print(
                    f"{cell:<10}{dtype:<10}{case:<10}{c.error:>10.1e}{c.torch_error:>10.1e}"
                    f"{c.allowed:>10.1e}  {'FAIL ' if bad else ''}{c if c.problem else c.name}"
                )
    room = ", ".join(f"{ROOM[_DTYPES[name]]} ({name})" for name in dtypes)
    print(
        f"\n{len(_CELLS) * len(dtypes) * len(_CASES)} configurations, {failed} outside the rule. "
        "Each row shows the tensor (output, state or\ngradient) closest to what is allowed: twice "
        "torch.nn's error and k machine epsilons,\n"
        f"k = {room}. Errors are relative to float64."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
