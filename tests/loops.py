"""What the transforms of torch.func mean, as loops over torch.nn: the oracle of their tests.

`Func` has torch.func's own transforms and runs fastrnn's layers; `Loops` has the same by loops and
torch.autograd, and runs torch.nn's. A test writes what it does once, as a function of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import fastrnn
from cases import Problem, make_layer
from fastrnn import _ops

# Marks of tests that must run on the kernels: the reference says that it runs by a warning.
NO_REFERENCE = [
    pytest.mark.filterwarnings(
        "error" if _ops.native_error is None else "ignore:fastrnn runs its slow reference"
    )
]


class Func:
    """torch.func over fastrnn."""

    library = fastrnn
    vmap = staticmethod(torch.func.vmap)
    grad = staticmethod(torch.func.grad)
    jacrev = staticmethod(torch.func.jacrev)
    jacfwd = staticmethod(torch.func.jacfwd)
    hessian = staticmethod(torch.func.hessian)

    @staticmethod
    def call(module: torch.nn.Module, weights: dict[str, Tensor], *arguments: Any) -> Any:
        return torch.func.functional_call(module, weights, arguments)


class Loops:
    """Loops over torch.nn."""

    library = torch.nn

    @staticmethod
    def call(module: torch.nn.Module, weights: dict[str, Tensor], *arguments: Any) -> Any:
        if isinstance(module, torch.nn.RNNBase):
            module._flat_weights = [weights[name] for name in module._flat_weights_names]
            return module(*arguments)
        return torch.func.functional_call(module, weights, arguments)

    @staticmethod
    def vmap(f: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, **_: Any) -> Any:
        def mapped(*arguments: Any) -> Any:
            flat, spec = pytree.tree_flatten(arguments)
            dims = pytree._broadcast_to_and_flatten(in_dims, spec)
            assert dims is not None
            sizes = {t.shape[d] for t, d in zip(flat, dims, strict=True) if d is not None}
            (size,) = sizes
            results = []
            for s in range(size):
                own = [
                    t if d is None else t.select(d, s) for t, d in zip(flat, dims, strict=True)
                ]
                results.append(pytree.tree_flatten(f(*pytree.tree_unflatten(own, spec))))
            out_spec = results[0][1]
            places = pytree._broadcast_to_and_flatten(out_dims, out_spec)
            assert places is not None
            columns = zip(*(leaves for leaves, _ in results), strict=True)
            whole = [torch.stack(c, d) for c, d in zip(columns, places, strict=True)]
            return pytree.tree_unflatten(whole, out_spec)

        return mapped

    @staticmethod
    def grad(f: Callable[..., Tensor], argnums: int = 0) -> Callable[..., Any]:
        def gradient(*arguments: Any) -> Any:
            given, leaves, spec = _with_leaves(arguments, argnums)
            with torch.enable_grad():
                found = _gradients(f(*given), leaves)
            return pytree.tree_unflatten(found, spec)

        return gradient

    @staticmethod
    def jacrev(f: Callable[..., Tensor], argnums: int = 0) -> Callable[..., Any]:
        """Of one tensor by the leaves of one argument."""

        def rows(*arguments: Any) -> Any:
            given, leaves, spec = _with_leaves(arguments, argnums)
            with torch.enable_grad():
                value = f(*given)
                each = [_gradients(v, leaves) for v in value.flatten()]
            stacked = [
                torch.stack([row[i] for row in each]) if each else t.new_empty(0, *t.shape)
                for i, t in enumerate(leaves)
            ]
            shaped = [s.reshape(value.shape + s.shape[1:]) for s in stacked]
            return pytree.tree_unflatten(shaped, spec)

        return rows

    jacfwd = jacrev

    @staticmethod
    def hessian(f: Callable[..., Tensor], argnums: int = 0) -> Callable[..., Any]:
        """Of a number by one tensor."""
        return Loops.jacrev(Loops.grad(f, argnums), argnums)


def _with_leaves(arguments: tuple[Any, ...], argnum: int) -> tuple[list[Any], list[Tensor], Any]:
    """The arguments, the tensors of one of them made such that gradients by them can be asked."""
    leaves, spec = pytree.tree_flatten(arguments[argnum])
    leaves = [t.clone() if t.requires_grad else t.clone().requires_grad_() for t in leaves]
    given = list(arguments)
    given[argnum] = pytree.tree_unflatten(leaves, spec)
    return given, leaves, spec


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def runner(side: Any, problem: Problem) -> Callable[..., tuple[Tensor, ...]]:
    """f(weights, input, states): output and final states of a layer of this problem. Packed data
    is given as its rows."""
    module = make_layer(side.library, problem.cell, problem.case, problem.dtype)
    module.requires_grad_(False).train(problem.case.training)
    packed = problem.arguments()[0] if problem.case.lengths is not None else None

    def run(
        weights: dict[str, Tensor], input: Tensor, states: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        data: Any = input
        if isinstance(packed, PackedSequence):
            data = PackedSequence(
                input, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
            )
        hx: Any = None if not states else tuple(states) if len(states) == 2 else states[0]
        output, state = side.call(module, weights, data, hx)
        if isinstance(output, PackedSequence):
            output = output.data
        return (output, *(state if isinstance(state, tuple) else (state,)))

    return run


def arguments(problem: Problem) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """Weights, input and states of a problem, for `runner`."""
    input, _, leaves = problem.arguments()
    weights = {
        k: v.to(problem.dtype)
        for k, v in problem.values.items()
        if k not in ("input", "h_0", "c_0")
    }
    data = input.data if isinstance(input, PackedSequence) else input
    states = tuple(leaves[k].detach() for k in ("h_0", "c_0") if k in leaves)
    return weights, data.detach(), states


def many(size: int, tree: Any, dim: int = 0) -> Any:
    """`size` different versions of each tensor, along a new dimension."""

    def versions(t: Tensor) -> Tensor:
        scales = torch.linspace(0.5, 1.5, max(size, 1), dtype=t.dtype)[:size]
        noise = 0.1 * torch.randn(size, *t.shape, dtype=t.dtype)
        whole = t * scales.view(-1, *[1] * t.dim()) + noise
        return whole.movedim(0, dim)

    return pytree.tree_map(versions, tree)


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a result, by their place."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def both(what: Callable[[Any], Any]) -> Iterator[dict[str, Tensor]]:
    """The result of a function of `Func` and of `Loops`, from the same random numbers."""
    for side in (Func, Loops):
        torch.manual_seed(1)
        yield named(what(side))
