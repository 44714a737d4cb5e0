"""PyTorch's tools around autograd: checkpointing, hooks, saved tensors, dropout, double backward.

Each result obeys the rule of compare.py against the same tool around torch.nn's layer or cell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from drop_in import CELLS, LAYERS, both_libraries
from torch import Tensor, nn
from torch.autograd.graph import (
    GradientEdge,
    get_gradient_edge,
    register_multi_grad_hook,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from training import B, H, I, Net, check_as_torch, data, flat, results, stack

import fastrnn
from compare import check_identical

each = pytest.mark.parametrize("name", LAYERS + CELLS)
each_layer = pytest.mark.parametrize("name", LAYERS)


def bytes_of(tensors: list[Tensor]) -> int:
    """The memory behind tensors, every storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@each
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoint(name: str, reentrant: bool) -> None:
    """With dropout: the second forward pass draws the masks of the first."""

    def run(lib: ModuleType, dtype: torch.dtype, plain: bool = False) -> dict[str, Tensor]:
        net = Net(lib, name, **stack(name)).to(dtype)
        torch.manual_seed(3)
        call = None if plain else partial(checkpoint, net, use_reentrant=reentrant)
        # A reentrant checkpoint cannot run under torch.autograd.grad.
        if not reentrant:
            return results(net, data(dtype), call)
        input = data(dtype).requires_grad_()
        output, *state = (call or net)(input)
        (output.square().sum() + sum(s.sum() for s in state)).backward()
        gradients = {k: p.grad for k, p in net.named_parameters()}
        return {"output": output.detach(), "d input": input.grad, **gradients}

    check_as_torch(run)
    check_identical(run(fastrnn, torch.float32), run(fastrnn, torch.float32, plain=True))


@both_libraries
@each
@pytest.mark.parametrize("preserve", [True, False])
def test_checkpoint_preserves_the_generator(lib: ModuleType, name: str, preserve: bool) -> None:
    net = Net(lib, name, **stack(name))
    input = data().requires_grad_()
    torch.manual_seed(3)
    plain = torch.autograd.grad(net(input)[0].sum(), input)[0]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    output = checkpoint(net, input, use_reentrant=False, preserve_rng_state=preserve)[0]
    assert torch.equal(torch.get_rng_state(), after)
    (again,) = torch.autograd.grad(output.sum(), input)
    drops = bool(stack(name))
    assert torch.equal(torch.get_rng_state(), after) == (preserve or not drops)
    assert torch.equal(plain, again) == (preserve or not drops)


def saved_by(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        return call(), saved


@both_libraries
@each
def test_checkpoint_saves_memory(lib: ModuleType, name: str) -> None:
    """All that a checkpoint holds is its input; the rest comes to be in the backward pass."""
    net, input = Net(lib, name), data(torch.float32, 40, B, I).requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    _, saved = saved_by(lambda: net(input))
    large = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert bytes_of(large) >= 40 * B * (I + H) * 4
    with kept_memory() as plain:
        plain.keep(net(input)[0].sum())
    with kept_memory() as checkpointed:
        output = checkpoint(net, input, use_reentrant=False, preserve_rng_state=False)[0]
        checkpointed.keep(output.sum())
        del output
    assert plain.bytes > 40 * B * H * 4
    assert checkpointed.bytes < 1000


class kept_memory:
    """The bytes of torch's allocator that were taken inside the block and not given back."""

    def __enter__(self) -> kept_memory:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def keep(self, value: Any) -> None:
        self.value = value

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.bytes = sum(e.self_cpu_memory_usage for e in self.profile.key_averages())


@each
def test_save_on_cpu(name: str) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name, **stack(name)).to(dtype)
        torch.manual_seed(3)
        with save_on_cpu():
            return results(net, data(dtype))

    check_as_torch(run)


def to_numpy(t: Tensor) -> Any:
    return t.detach().numpy().copy()


@each
def test_saved_tensors_may_leave_torch(name: str) -> None:
    """All that backward reads may go through the hooks as a copy in numpy."""

    def run(lib: ModuleType, dtype: torch.dtype, hooks: bool = True) -> dict[str, Tensor]:
        net = Net(lib, name, **stack(name)).to(dtype)
        torch.manual_seed(3)
        if not hooks:
            return results(net, data(dtype))
        with saved_tensors_hooks(to_numpy, torch.from_numpy):
            return results(net, data(dtype))

    check_as_torch(run)
    check_identical(run(fastrnn, torch.float32), run(fastrnn, torch.float32, hooks=False))


@both_libraries
@each
def test_nothing_is_kept_beside_the_hooks(lib: ModuleType, name: str) -> None:
    """Once a copy is packed, the graph holds none of the memory behind what was saved."""
    net, input = Net(lib, name, **stack(name)), data(torch.float32, 40, B, I).requires_grad_()
    own = {StorageWeakRef(t.untyped_storage()) for t in (input, *net.parameters())}
    behind: set[StorageWeakRef] = set()

    def pack(t: Tensor) -> Any:
        behind.add(StorageWeakRef(t.untyped_storage()))
        return to_numpy(t)

    with kept_memory() as memory, saved_tensors_hooks(pack, torch.from_numpy):
        memory.keep(net(input)[0].sum())
    behind -= own
    assert behind
    assert all(storage.expired() for storage in behind)
    assert memory.bytes < 1000
    memory.value.backward()
    assert input.grad.any()


@both_libraries
@each
def test_backward_frees_the_graph(lib: ModuleType, name: str) -> None:
    net, input = Net(lib, name), data(torch.float32, 40, B, I).requires_grad_()
    own = {StorageWeakRef(t.untyped_storage()) for t in (input, *net.parameters())}
    loss, saved = saved_by(lambda: net(input)[0].sum())
    behind = {StorageWeakRef(t.untyped_storage()) for t in saved} - own
    del saved
    assert not all(storage.expired() for storage in behind)
    loss.backward()
    assert all(storage.expired() for storage in behind)


def structure(value: Any) -> Any:
    """Tuples and lists as they are, shapes in place of tensors."""
    if isinstance(value, (tuple, list)):
        return type(value), [structure(item) for item in value]
    return tuple(value.shape) if isinstance(value, Tensor) else value


@each
def test_module_hooks(name: str) -> None:
    """Every kind of hook is called with what torch.nn's is called with, in its order."""
    calls: dict[tuple[ModuleType, torch.dtype], list[Any]] = {}

    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        seen: dict[str, Tensor] = {}
        called = calls.setdefault((lib, dtype), [])

        def record(kind: str, *values: Any) -> None:
            called.append((kind, structure(values)))
            for i, t in enumerate(flat(values)):
                seen[f"{kind} {len(called)} {i}"] = t.detach().clone()

        net.core.register_forward_pre_hook(
            lambda m, args, kwargs: record("before", args, tuple(kwargs)), with_kwargs=True
        )
        net.core.register_forward_hook(lambda m, args, out: record("after", args, out))
        net.core.register_full_backward_pre_hook(lambda m, out: record("before backward", out))
        net.core.register_full_backward_hook(lambda m, in_, out: record("backward", in_, out))
        return results(net, data(dtype)) | seen

    check_as_torch(run)
    mine, theirs = calls[fastrnn, torch.float32], calls[nn, torch.float32]
    assert {kind for kind, _ in theirs} == {"before", "after", "before backward", "backward"}
    assert mine == theirs


@each
def test_what_hooks_return_is_used(name: str) -> None:
    def run(lib: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Net(lib, name).to(dtype)
        net.core.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        net.core.register_full_backward_pre_hook(lambda m, out: (out[0] * 3, *out[1:]))
        net.core.register_full_backward_hook(lambda m, in_, out: (in_[0] * 5, *in_[1:]))
        net.core.weight_hh_l0.register_hook(lambda g: g * 7) if name in LAYERS else None
        return results(net, data(dtype))

    check_as_torch(run)


@both_libraries
@each
def test_post_accumulate_grad_hook(lib: ModuleType, name: str) -> None:
    """An optimizer in the backward pass: each gradient is used once, complete, and let go."""
    net, plain = Net(lib, name), Net(lib, name)
    plain(data())[0].sum().backward()
    order: list[Tensor] = []

    def step(p: Tensor) -> None:
        order.append(p)
        with torch.no_grad():
            p.sub_(p.grad)
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    net(data())[0].sum().backward()
    assert {id(p) for p in order} == {id(p) for p in net.parameters()}
    assert len(order) == len({id(p) for p in order})
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        assert torch.equal(p, q - q.grad)


@both_libraries
@each
def test_multi_grad_hook(lib: ModuleType, name: str) -> None:
    net, seen = Net(lib, name), []
    register_multi_grad_hook(tuple(net.core.parameters()), seen.append)
    net(data())[0].sum().backward()
    ((*gradients,),) = seen
    assert [g.shape for g in gradients] == [p.shape for p in net.core.parameters()]


@both_libraries
@each
def test_hooks_of_graph_nodes(lib: ModuleType, name: str) -> None:
    """Of the node that made the output, and of the one that accumulates a weight's gradient."""
    core, input = Net(lib, name).core, (data() if name in LAYERS else data()[0]).requires_grad_()
    weight = next(core.parameters())

    def output() -> Tensor:
        return flat(core(input))[0]

    plain = torch.autograd.grad(output().sum(), [input, weight])
    y, calls = output(), []
    y.grad_fn.register_prehook(
        lambda grads: calls.append("pre") or tuple(None if g is None else 2 * g for g in grads)
    )
    y.grad_fn.register_hook(lambda grads_in, grads_out: calls.append("post"))
    node = get_gradient_edge(weight).node
    node.register_hook(lambda grads_in, grads_out: calls.append("weight"))
    y.sum().backward()
    torch.testing.assert_close(input.grad, 2 * plain[0])
    torch.testing.assert_close(weight.grad, 2 * plain[1])
    assert sorted(calls) == ["post", "pre", "weight"]
    # Gradients with respect to an edge of the graph instead of a tensor.
    edges: list[GradientEdge | Tensor] = [get_gradient_edge(weight), input]
    y = output()
    again = torch.autograd.grad([get_gradient_edge(y)], edges, [torch.ones_like(y)])
    assert torch.equal(again[0], plain[1])
    assert torch.equal(again[1], plain[0])


@each_layer
def test_dropout_comes_from_the_generator(name: str) -> None:
    """The masks are torch.nn's, the generator is left where torch.nn leaves it, and a fork of it
    is left alone."""
    mine, theirs = Net(fastrnn, name, **stack(name)), Net(nn, name, **stack(name))
    states = []
    for net in (mine, theirs):
        torch.manual_seed(3)
        net(data())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(3)
    first = mine(data())[0]
    assert not torch.equal(first, mine(data())[0])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        assert torch.equal(mine(data())[0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(mine(data())[0], first)


