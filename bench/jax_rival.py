"""JAX: the layers as `lax.scan` under jit, inference and training, with torch's gates and biases.

One matrix product for the input of all time steps, then a scan over them.
Training is one compiled function: forward, and `vjp` for the gradients.  Inference is given the
weights as JAX likes them, [I, G*H]: transposed, it took up to three times as long.  Unrolling the
scan gained nothing that it did not lose elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import Unsupported, Workload
from bench.measure import Call

_threads = 0  # of JAX's CPU client; 0 before the first


def with_threads(threads: int) -> Any:
    """Return jax with a CPU client of that many threads; calls compiled for another one end.

    XLA gives a client as many threads as NPROC says, which it reads when the client is made.
    """
    global _threads
    import jax

    if threads != _threads:
        os.environ["NPROC"] = str(threads)
        if _threads:
            from jax.extend.backend import clear_backends

            jax.clear_caches()
            clear_backends()
        jax.config.update("jax_platforms", "cpu")
        _threads = threads
    return jax


def make_jax(workload: Workload) -> Call:
    """Compile the workload; the call waits for its results."""
    if not isinstance(workload.input, Tensor):
        raise Unsupported("no packed sequences")
    jax = with_threads(torch.get_num_threads())
    case = workload.case
    layers = partial(forward, step=step_of(workload.cell), reversible=case.D == 2)
    dtype = jax.numpy.dtype(case.dtype)

    def array(tensor: Tensor) -> Any:
        return jax.numpy.asarray(tensor.detach().float().numpy(), dtype=dtype)

    parameters = [array(parameter) for parameter in workload.module.parameters()]
    if workload.mode == "inference":
        parameters = transposed(parameters)
    input, cotangent = array(workload.input), array(workload.cotangent)
    shape = (case.layers * case.D, case.B, case.H)
    count = 2 if workload.cell == "lstm" else 1
    states = (torch.zeros(shape),) * count if workload.state is None else workload.state
    initial = tuple(array(s) for s in (states if isinstance(states, tuple) else (states,)))

    def infer(parameters: Any, input: Any, initial: Any, cotangent: Any) -> Any:
        return layers(parameters, input, initial)

    def train(parameters: Any, input: Any, initial: Any, cotangent: Any) -> Any:
        def output_first(parameters: Any, input: Any) -> Any:
            output, *finals = layers(transposed(parameters), input, initial)
            return output, finals

        output, pull_back, finals = jax.vjp(output_first, parameters, input, has_aux=True)
        d_parameters, d_input = pull_back(cotangent)
        return (output, *finals, d_input, *d_parameters)

    compiled = jax.jit(infer if workload.mode == "inference" else train)
    return lambda: jax.block_until_ready(compiled(parameters, input, initial, cotangent))


def transposed(parameters: list[Any]) -> list[Any]:
    """Turn [G*H, I] into [I, G*H], and leave vectors alone."""
    import jax.numpy as jnp

    return [jnp.transpose(parameter) for parameter in parameters]


Step = Callable[[Any, Any, Any, Any], tuple[Any, ...]]  # state, gates of x, W_hh, b_hh -> state


def forward(
    parameters: list[Any], input: Any, initial: tuple[Any, ...], *, step: Step, reversible: bool
) -> tuple[Any, ...]:
    """Run all layers; returns output and final states.

    The parameters are in torch.nn's order, but transposed.
    """
    import jax.numpy as jnp
    from jax import lax

    directions = 2 if reversible else 1
    finals: list[tuple[Any, ...]] = []  # of every layer and direction, the states
    outputs: list[Any] = []  # of the directions of a layer
    for index in range(len(parameters) // 4):
        weight_ih, weight_hh, bias_ih, bias_hh = parameters[4 * index : 4 * index + 4]
        gates = input @ weight_ih + bias_ih  # [T, B, G*H]

        def body(
            state: tuple[Any, ...], gates: Any, weight: Any = weight_hh, bias: Any = bias_hh
        ) -> tuple[tuple[Any, ...], Any]:
            state = step(state, gates, weight, bias)
            return state, state[0]

        state = tuple(s[index] for s in initial)
        reverse = index % directions == 1
        final, output = lax.scan(body, state, gates, reverse=reverse)
        finals.append(final)
        outputs.append(output)
        if len(outputs) == directions:
            input, outputs = jnp.concatenate(outputs, axis=-1), []
    return (input, *(jnp.stack(states) for states in zip(*finals, strict=True)))


def step_of(cell: str) -> Step:
    """Return torch.nn's formula of one step."""
    import jax.numpy as jnp
    from jax.nn import sigmoid

    def lstm(state: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        h, c = state
        i, f, g, o = jnp.split(x + h @ weight + bias, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        return sigmoid(o) * jnp.tanh(c), c

    def gru(state: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        (h,) = state
        x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ weight + bias, 3, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        return (n + z * (h - n),)

    def rnn(state: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        return (jnp.tanh(x + state[0] @ weight + bias),)

    return {"lstm": lstm, "gru": gru, "rnn": rnn}[cell]
