"""fastrnn.levels: a function that passes through the transforms of torch.func by itself gives what
torch's own mechanism gives for the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, jacrev, vjp, vmap

from fastrnn.levels import LevelFunction


def product(base: type[Function]) -> type[Function]:
    """x, factor and y -> x * y * factor and the constant 2, with a vmap rule and a derivative that
    can be differentiated again."""

    class Product(base):  # type: ignore[valid-type, misc]
        asked: ClassVar[list[Any]] = []  # what backward was asked for, each time

        @staticmethod
        def forward(x: Tensor, factor: float, y: Tensor | None) -> tuple[Tensor, Tensor]:
            return (x * factor if y is None else x * y * factor), x.new_full((1,), 2.0)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            x, ctx.factor, y = inputs
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
            x, y = ctx.saved_tensors
            if grad is None:
                return None, None, None
            of_x, _, of_y = ctx.needs_input_grad
            Product.asked.append((of_x, of_y))
            dx = Product.apply(grad, ctx.factor, y)[0] if of_x else None
            return dx, None, Product.apply(grad, ctx.factor, x)[0] if of_y else None

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, factor: float, y: Any) -> Any:
            x_dim, _, y_dim = in_dims
            x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
            y = y if y_dim is None else y.movedim(y_dim, 0)
            of_all, two = Product.apply(x, factor, y)
            return (of_all.movedim(0, -1), two), (of_all.dim() - 1, None)

    return Product


OWN, TORCHS = product(LevelFunction), product(Function)


def results(function: type[Function], call: Callable[..., Any]) -> Any:
    function.asked.clear()  # type: ignore[attr-defined]
    return call(lambda x, y=None: function.apply(x, 3.0, y)[0])


def _inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def _parameters(*shape: int) -> list[Tensor]:
    return [t.requires_grad_() for t in _inputs(*shape)]


def total(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *a: f(*a).square().sum()


ONE = torch.tensor([2.0, -1.5], dtype=torch.float64)

CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda f: f(*_inputs(4)),
    "vmap": lambda f: vmap(f)(*_inputs(4, 2)),
    "vmap of one": lambda f: vmap(f, in_dims=(0, None))(_inputs(4, 2)[0], _inputs(2)[1]),
    "vmap, last dimension": lambda f: vmap(f, in_dims=(1, 1))(*_inputs(4, 2)),
    "vmap of nothing of it": lambda f: vmap(lambda z: f(ONE) + z)(_inputs(4, 2)[0]),
    "vmap of vmap": lambda f: vmap(vmap(f))(*_inputs(4, 2, 3)),
    "grad": lambda f: grad(total(f), argnums=(0, 1))(*_inputs(4)),
    "grad of one": lambda f: grad(total(f), argnums=1)(*_inputs(4)),
    "grad of a constant": lambda f: grad(lambda z: (f(*_inputs(4)) * z).sum())(_inputs(4)[0]),
    "grad without the second": lambda f: grad(total(f))(_inputs(4)[0]),
    "grad of grad": lambda f: grad(lambda x, y: grad(total(f))(x, y).sum())(*_inputs(4)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(total(f)))(*_inputs(3)),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1))(*_inputs(3)),
    "vjp": lambda f: vjp(f, *_inputs(3))[1](_inputs(3)[1]),
    "vjp, differentiated outside": lambda f: _outside(f),
    "vmap of grad": lambda f: vmap(grad(total(f), argnums=(0, 1)))(*_inputs(4, 2)),
    "grad of vmap": lambda f: grad(total(vmap(f)), argnums=(0, 1))(*_inputs(4, 2)),
    "vmap of grad of vmap": lambda f: vmap(grad(total(vmap(f))))(*_inputs(4, 2, 3)),
    "grad over a constant that is differentiated": lambda f: grad(
        lambda x: grad(lambda y: total(f)(x, y))(ONE).sum()
    )(ONE + 1),
    "grad with gradients around": lambda f: grad(total(f))(*_parameters(4)),
    "grad without gradients around": lambda f: torch.no_grad()(grad(total(f)))(*_parameters(4)),
    "grad without gradients inside": lambda f: grad(
        lambda x, y: total(f)(x, y) + torch.no_grad()(total(f))(x, y)
    )(*_inputs(4)),
}


def _outside(f: Callable[..., Tensor]) -> Any:
    """The tensors that vjp leaves behind are of a level that is gone."""
    x, y = _parameters(3)
    found = vjp(f, x, y)[1](y)
    return torch.autograd.grad(found[0].square().sum(), (y,))


@pytest.mark.parametrize("name", CALLS)
def test_gives_what_torchs_own_gives(name: str) -> None:
    got, expected = (results(function, CALLS[name]) for function in (OWN, TORCHS))
    flat = [
        list(found) if isinstance(found, tuple) else [found] for found in (got, expected)
    ]
    for one, other in zip(*flat, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
    assert OWN.asked == TORCHS.asked  # type: ignore[attr-defined]


def test_says_the_same_of_forward_mode() -> None:
    """There is no rule for tangents, which both say."""
    for function in (OWN, TORCHS):
        with pytest.raises(RuntimeError, match="jvp"):
            results(function, lambda f: torch.func.jvp(f, _inputs(3)[:1], _inputs(3)[1:]))
