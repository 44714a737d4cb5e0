"""What of PyTorch works with a layer, tried with torch.nn's and with fastrnn's: the table in
docs/pytorch.md, which ``python tests/facilities.py`` writes and test_facilities.py holds against
what happens.

A facility is a function of a layer and of an input [T, B, I] in float32 that raises, or returns
pairs of what it found and what is right. Dimension key: T time, B batch, I input, H hidden.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fastrnn

LAYERS = ("LSTM", "GRU", "RNN")
DOC = Path(__file__).parents[1] / "docs" / "pytorch.md"
Pairs = list[tuple[Any, Any]]
Facility = Callable[[nn.Module, Tensor], Pairs]
FACILITIES: dict[str, Facility] = {}


def facility(title: str) -> Callable[[Facility], Facility]:
    def add(function: Facility) -> Facility:
        FACILITIES[title] = function
        return function

    return add


def oracle(layer: nn.Module) -> nn.Module:
    """torch.nn's layer with the same parameters, to be called plainly."""
    return layer.to_torch() if hasattr(layer, "to_torch") else layer


def output_of(layer: nn.Module, input: Tensor) -> Tensor:
    output: Tensor = layer(input)[0]
    return output


def gradients(layer: nn.Module, input: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the input and the parameters, of a loss of what `run` makes of the input."""
    leaf = input.clone().requires_grad_()
    return list(torch.autograd.grad(run(leaf).square().sum(), [leaf, *layer.parameters()]))


def trained(layer: nn.Module, input: Tensor, run: Callable[[Tensor], Tensor]) -> Pairs:
    """Gradients of `run`, and torch.nn's eager ones."""
    plain = oracle(layer)
    right = gradients(plain, input, lambda x: output_of(plain, x))
    return list(zip(gradients(layer, input, run), right, strict=True))


def loss_of(layer: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda p, x: functional_call(layer, p, (x,))[0].square().sum()


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


def members(layer: nn.Module) -> list[nn.Module]:
    """Layers of the same shape with other weights."""
    library = fastrnn if isinstance(layer, fastrnn.modules.Layer) else nn
    return [
        getattr(library, type(layer).__name__)(3, 4) for _ in range(3)
    ]


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@facility("`torch.compile(fullgraph=True)`, inference")
def compiled_inference(layer: nn.Module, input: Tensor) -> Pairs:
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return [(output_of(run, input), output_of(oracle(layer), input))]


@facility("`torch.compile(fullgraph=True)`, training")
def compiled_training(layer: nn.Module, input: Tensor) -> Pairs:
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return trained(layer, input, lambda x: output_of(run, x))


@facility("`torch.compile(dynamic=True)`: one graph for all T and B")
def compiled_dynamic(layer: nn.Module, input: Tensor) -> Pairs:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    found = []
    with torch.no_grad():
        for x in (input, torch.cat([input, input]), torch.cat([input, input], 1)):
            found.append((output_of(run, x), output_of(oracle(layer), x)))
    return [*found, (torch.tensor(counter.frame_count), torch.tensor(1))]


@facility("`torch.export` with dynamic T and B")
def exported(layer: nn.Module, input: Tensor) -> Pairs:
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    shapes = {"input": {0: T, 1: B}, "hx": None}
    with torch.no_grad():
        program = torch.export.export(layer, (input, None), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        run, longer = torch.export.load(file).module(), torch.cat([input, input])
        return [(run(longer, None)[0], output_of(oracle(layer), longer))]


@facility("ONNX by `torch.onnx.export(dynamo=True)`: one node for a layer, of any T and B")
def to_onnx(layer: nn.Module, input: Tensor) -> Pairs:
    import onnxruntime

    import fastrnn.onnx

    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    export = fastrnn.onnx.export
    if not isinstance(layer, fastrnn.modules.Layer):
        export = torch.onnx.export
    with contextlib.redirect_stdout(io.StringIO()):
        program = export(layer.eval(), (input,), dynamic_shapes=shapes, verbose=False)
    kinds = [node.op_type for node in program.model.graph]
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    longer = torch.cat([input, input])
    found = session.run(None, {session.get_inputs()[0].name: longer.numpy()})[0]
    nodes = torch.tensor(kinds.count(type(layer).__name__))
    return [(torch.tensor(found), output_of(oracle(layer), longer)), (nodes, torch.tensor(1))]


@facility("double backward (gradient penalty)")
def gradient_penalty(layer: nn.Module, input: Tensor) -> Pairs:
    def penalty(of: nn.Module) -> list[Tensor]:
        leaf = input.clone().requires_grad_()
        (slope,) = torch.autograd.grad(output_of(of, leaf).sum(), leaf, create_graph=True)
        loss = (slope.norm(dim=-1) - 1).square().sum()
        return list(torch.autograd.grad(loss, [leaf, of.weight_ih_l0, of.weight_hh_l0]))

    return list(zip(penalty(layer), penalty(oracle(layer)), strict=True))


@facility("`torch.func.grad`")
def func_grad(layer: nn.Module, input: Tensor) -> Pairs:
    found, plain = grad(loss_of(layer), argnums=(0, 1))(parameters(layer), input), oracle(layer)
    right = gradients(plain, input, lambda x: output_of(plain, x))
    return [(found[1], right[0]), (found[0]["weight_hh_l0"], right[2])]


@facility("`torch.func.jacrev`")
def func_jacrev(layer: nn.Module, input: Tensor) -> Pairs:
    def last(of: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: output_of(of, x)[-1]

    right = torch.autograd.functional.jacobian(last(oracle(layer)), input)
    return [(jacrev(last(layer))(input), right)]


def slope(layer: nn.Module, input: Tensor) -> Tensor:
    """Of the output, by finite differences in float64, where all of the input grows alike."""
    plain, step = oracle(copy.deepcopy(layer)).double(), 1e-6
    with torch.no_grad():
        above, below = (output_of(plain, input.double() + s) for s in (step, -step))
    return (above - below) / (2 * step)


@facility("forward-mode derivatives: `torch.func.jvp`")
def func_jvp(layer: nn.Module, input: Tensor) -> Pairs:
    found = jvp(lambda x: output_of(layer, x), (input,), (torch.ones_like(input),))[1]
    return [(found, slope(layer, input))]


@facility("forward-mode derivatives: `torch.autograd.forward_ad`")
def dual_numbers(layer: nn.Module, input: Tensor) -> Pairs:
    with forward_ad.dual_level(), torch.no_grad():
        output = output_of(layer, forward_ad.make_dual(input, torch.ones_like(input)))
        return [(forward_ad.unpack_dual(output).tangent, slope(layer, input))]


@facility("`torch.func.hessian`")
def func_hessian(layer: nn.Module, input: Tensor) -> Pairs:
    def loss(of: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: output_of(of, x).square().sum()

    right = torch.autograd.functional.hessian(loss(oracle(layer)), input)
    return [(hessian(loss(layer))(input), right)]


@facility("`vmap` over inputs")
def vmap_inputs(layer: nn.Module, input: Tensor) -> Pairs:
    inputs = torch.stack([input, 2 * input, -input])
    right = torch.stack([output_of(oracle(layer), x) for x in inputs])
    return [(vmap(lambda x: output_of(layer, x))(inputs), right)]


@facility("`vmap` over weights (ensembles)")
def vmap_weights(layer: nn.Module, input: Tensor) -> Pairs:
    layers = members(layer)
    stacked, _ = stack_module_state(layers)
    found = vmap(lambda p: functional_call(layer, p, (input,))[0])(stacked)
    return [(found, torch.stack([output_of(oracle(m), input) for m in layers]))]


@facility("per-sample gradients: `vmap(grad(...))`")
def per_sample_gradients(layer: nn.Module, input: Tensor) -> Pairs:
    samples = input.transpose(0, 1).unsqueeze(2)  # [B, T, 1, I]
    found = vmap(grad(loss_of(layer)), in_dims=(None, 0))(parameters(layer), samples)
    plain = oracle(layer)
    right = [gradients(plain, x, lambda y: output_of(plain, y))[1] for x in samples]
    return [(found["weight_ih_l0"], torch.stack(right))]


@facility("`torch.utils.checkpoint`")
def checkpointed(layer: nn.Module, input: Tensor) -> Pairs:
    return trained(
        layer, input, lambda x: checkpoint(lambda y: output_of(layer, y), x, use_reentrant=False)
    )


@facility("`torch.autograd.graph.save_on_cpu`")
def saved_on_cpu(layer: nn.Module, input: Tensor) -> Pairs:
    with torch.autograd.graph.save_on_cpu():
        return trained(layer, input, lambda x: output_of(layer, x))


@facility("`torch.autocast` in bfloat16 on this CPU")
def autocast(layer: nn.Module, input: Tensor) -> Pairs:
    with torch.autocast("cpu", torch.bfloat16):
        found = output_of(layer, input)
    return [((found.float() * 8).round(), (output_of(oracle(layer), input) * 8).round())]


@facility("`torch.use_deterministic_algorithms`: the same bits again")
def deterministic(layer: nn.Module, input: Tensor) -> Pairs:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            gradients(layer, input, lambda x: output_of(layer, x)) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [(torch.tensor(same), torch.tensor(True))]


@facility("`DistributedDataParallel`")
def data_parallel(layer: nn.Module, input: Tensor) -> Pairs:
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(layer)
        return trained(layer, input, lambda x: output_of(wrapped, x))


@facility("FSDP2: `fully_shard`")
def sharded(layer: nn.Module, input: Tensor) -> Pairs:
    from torch.distributed.fsdp import fully_shard

    right = output_of(oracle(layer), input).detach()
    with one_process():
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(layer, mesh=mesh)
        output = output_of(layer, input)
        output.sum().backward()
        return [(output.detach(), right)]


def answer(library: ModuleType, title: str) -> str:
    """``yes``, or what happens instead, for each of the layers."""
    answers = {name: _try(library, name, FACILITIES[title]) for name in LAYERS}
    if len(set(answers.values())) == 1:
        return answers["LSTM"]
    return "; ".join(f"{name} {text}" for name, text in answers.items())


def _try(library: ModuleType, name: str, run: Facility) -> str:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, input = getattr(library, name)(3, 4), torch.randn(5, 2, 3)
    with warnings.catch_warnings(), _silence():
        warnings.simplefilter("ignore")
        try:
            pairs = run(layer, input)
        except ImportError:
            raise
        except Exception:  # whatever it is: the table says that it does not work
            return "raises"
    right = all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)
        for a, b in pairs
    )
    return "yes" if right else "wrong"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What compilers and exporters write on their way to an error."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def table() -> str:
    rows = ["| | torch.nn | fastrnn |", "|---|---|---|"]
    rows += [f"| {t} | {answer(nn, t)} | {answer(fastrnn, t)} |" for t in FACILITIES]
    return "\n".join(rows)


def write() -> None:
    """The table in place of the one that is there."""
    lines = DOC.read_text().splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("|")]
    lines[rows[0] : rows[-1] + 1] = table().splitlines()
    version = torch.__version__.partition("+")[0]
    text = "\n".join(lines) + "\n"
    DOC.write_text(re.sub(r"torch \d+\.\d+\.\d+", f"torch {version}", text))


if __name__ == "__main__":
    write()
    print(DOC.read_text())
