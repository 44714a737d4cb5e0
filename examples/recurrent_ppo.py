"""Trains an agent with a memory by proximal policy optimisation (PPO), once with fastrnn's resets
and once as it has to be done with torch.nn, and compares the two.

    python examples/recurrent_ppo.py

prints the returns and the times and draws them into recurrent_ppo.png (--plot FILE; --plot ""
draws nothing).

The task: an environment shows one of four cues, then noise for 5 to 30 steps, then asks for the
cue.  The answer ends the episode and is all that is rewarded, 1 if it is right; without memory one
of four is.  Episodes begin and end inside the rows [steps, environments] that are collected, so an
update over such rows has to begin with a new state in the middle of them:

    fastrnn     layer(observations, state, resets=starts): one call over all rows
    torch.nn    every episode, or what a row has of it, becomes a row of its own, padded to the
                longest of them; the outputs are gathered again

Both agents start from the same weights, and of the same rollout they learn the same but for
rounding; once rounding has changed an action, their rollouts differ.

After Schulman and others, Proximal Policy Optimization Algorithms, 2017, with advantages after
High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2016.

Exits with 1 if the losses of the first update differ by more than 1e-4, with 2 if the arguments
are unusable.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from digits import check_plot, positive, seed, threads
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import one_hot, smooth_l1_loss
from tqdm import tqdm

import fastrnn

CUES, NOISE = 4, 3
OBSERVED = CUES + 1 + NOISE  # the cue, whether it is asked for, noise
SHORTEST, LONGEST = 5, 30  # steps between the cue and the question
EPOCHS, PARTS = 4, 4  # passes over a rollout, and parts of its rows, each an update of the weights
LEARNING_RATE, CLIP, ENTROPY, MAX_NORM = 3e-3, 0.2, 0.01, 0.5
DISCOUNT, LAMBDA = 0.8, 0.8  # gamma and lambda
MAX_LOSS_DIFFERENCE = 1e-4


class Recall:
    """Environments that ask for a cue they have shown, B side by side."""

    def __init__(self, count: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.cue = torch.zeros(count, dtype=torch.long)
        self.left = torch.zeros(count, dtype=torch.long)  # steps until the question
        self.starts = torch.ones(count, dtype=torch.bool)  # whether an episode begins
        self._restart()

    def observe(self) -> Tensor:
        """[B, OBSERVED]"""
        shown = one_hot(self.cue, CUES) * self.starts[:, None]
        asks = (self.left == 0)[:, None]
        noise = torch.randn(len(self.cue), NOISE, generator=self.random)
        return torch.cat([shown, asks, noise], 1)

    def step(self, answers: Tensor) -> Tensor:
        """The rewards [B] of these answers; episodes that have ended begin anew."""
        self.starts = self.left == 0
        rewards = (self.starts & (answers == self.cue)).float()
        self.left -= 1
        self._restart()
        return rewards

    def _restart(self) -> None:
        count = len(self.cue)
        cue = torch.randint(CUES, (count,), generator=self.random)
        left = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=self.random)
        self.cue = torch.where(self.starts, cue, self.cue)
        self.left = torch.where(self.starts, left, self.left)


def with_resets(layer: nn.Module, input: Tensor, state: Any, starts: Tensor) -> Tensor:
    """Output [T, B, H] of a layer of fastrnn over [T, B, I], where starts [T, B] mark the steps
    that begin with zeros in place of the state."""
    output: Tensor = layer(input, state, resets=starts)[0]
    return output


def split_and_padded(layer: nn.Module, input: Tensor, state: Any, starts: Tensor) -> Tensor:
    """The same of a layer of torch.nn: pieces [longest, pieces, I], each from a start (or the
    beginning of its row) to the next."""
    steps, batch, width = input.shape
    begins = starts.clone()
    begins[0] = True
    of_rows = begins.T.flatten()  # row after row
    piece = of_rows.long().cumsum(0) - 1
    first = of_rows.nonzero()[:, 0]
    step = torch.arange(batch * steps) - first[piece]
    pieces = input.new_zeros(int(step.max()) + 1, len(first), width)
    pieces[step, piece] = input.transpose(0, 1).flatten(0, 1)
    entering = first[first % steps == 0] // steps  # rows whose first piece begins with the state
    of_first = piece[entering * steps]
    keeps = (~starts[0]).to(input.dtype)[:, None]

    def begin(s: Tensor) -> Tensor:
        return s.new_zeros(1, len(first), s.shape[-1]).index_copy(1, of_first, s * keeps)

    hx = tuple(begin(s) for s in state) if isinstance(state, tuple) else begin(state)
    output: Tensor = layer(pieces, hx)[0]
    return output[step, piece].unflatten(0, (batch, steps)).transpose(0, 1)


class Agent(nn.Module):
    """A policy and a value over the outputs of a recurrent layer."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        super().__init__()
        self.memory = getattr(library, cell.upper())(OBSERVED, hidden)
        self.policy = nn.Linear(hidden, CUES)
        self.value = nn.Linear(hidden, 1)
        nn.init.zeros_(self.policy.weight)  # at first all answers are equally likely

    def judge(self, output: Tensor) -> tuple[Categorical, Tensor]:
        """The odds of the answers, and the values [...], after outputs [..., H]."""
        return Categorical(logits=self.policy(output)), self.value(output)[..., 0]


@dataclass
class Rollout:
    """Steps [T, B] of the environments, and the state that entered the first."""

    observations: Tensor
    starts: Tensor
    answers: Tensor
    log_odds: Tensor
    advantages: Tensor
    returns: Tensor
    state: Any

    def of_rows(self, rows: Tensor) -> Rollout:
        chosen = {n: v[:, rows] for n, v in vars(self).items() if n != "state"}
        return Rollout(**chosen, state=map_state(lambda s: s[:, rows], self.state))


def map_state(f: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tuple(map(f, state)) if isinstance(state, tuple) else f(state)


Remember = Callable[[nn.Module, Tensor, Any, Tensor], Tensor]


@dataclass
class Run:
    """An agent that learns, and what was recorded of each update."""

    name: str
    agent: Agent
    remember: Remember
    environments: Recall
    generator: torch.Generator
    state: Any
    returns: list[float] = field(default_factory=list)  # mean of the episodes that ended
    losses: list[float] = field(default_factory=list)  # of the first part of the first epoch
    seconds: list[float] = field(default_factory=list)  # of learning, without collecting

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.agent.parameters(), LEARNING_RATE)

    @torch.no_grad()
    def collect(self, steps: int) -> Rollout:
        entered, found = self.state, []
        for _ in range(steps):
            observation, starts = self.environments.observe(), self.environments.starts
            keeps = (~starts).float()[:, None]
            self.state = map_state(lambda s, keeps=keeps: s * keeps, self.state)
            output, self.state = self.agent.memory(observation[None], self.state)
            odds, value = self.agent.judge(output[0])
            answer = torch.multinomial(odds.probs, 1, generator=self.generator)[:, 0]
            rewards = self.environments.step(answer)
            found.append((observation, starts, answer, odds.log_prob(answer), value, rewards))
        ends = self.environments.starts
        observations, starts, answers, log_odds, values, rewards = map(
            torch.stack, zip(*found, strict=True)
        )
        dones = torch.cat([starts[1:], ends[None]])
        self.returns.append((rewards.sum() / dones.sum()).item())
        # The value behind the last step: the state is looked at once more.
        output, _ = self.agent.memory(self.environments.observe()[None], self.state)
        after = torch.cat([values[1:], self.agent.judge(output)[1]])
        advantages = advantages_of(rewards, values, after, dones)
        return Rollout(
            observations, starts, answers, log_odds, advantages, advantages + values, entered
        )

    def learn(self, rollout: Rollout) -> None:
        begin = time.perf_counter()
        losses = []
        for _ in range(EPOCHS):
            order = torch.randperm(rollout.starts.shape[1], generator=self.generator)
            for rows in order.chunk(PARTS):
                loss = self.loss(rollout.of_rows(rows))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), MAX_NORM)
                self.optimizer.step()
                losses.append(loss.item())
        self.losses.append(losses[0])
        self.seconds.append(time.perf_counter() - begin)

    def loss(self, r: Rollout) -> Tensor:
        output = self.remember(self.agent.memory, r.observations, r.state, r.starts)
        odds, values = self.agent.judge(output)
        ratio = (odds.log_prob(r.answers) - r.log_odds).exp()
        advantages = (r.advantages - r.advantages.mean()) / (r.advantages.std() + 1e-8)
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
        return smooth_l1_loss(values, r.returns) - gain - ENTROPY * odds.entropy().mean()


def advantages_of(rewards: Tensor, values: Tensor, after: Tensor, dones: Tensor) -> Tensor:
    """A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t; nothing follows an end."""
    goes_on = (~dones).float()
    errors = rewards + DISCOUNT * goes_on * after - values
    advantages, ahead = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        ahead = errors[t] + DISCOUNT * LAMBDA * goes_on[t] * ahead
        advantages[t] = ahead
    return advantages


def start(options: argparse.Namespace) -> list[Run]:
    ways: list[tuple[str, ModuleType, Remember]] = [
        ("torch.nn, split and padded", nn, split_and_padded),
        ("fastrnn, resets", fastrnn, with_resets),
    ]
    runs = []
    for name, library, remember in ways:
        torch.manual_seed(options.seed)
        agent = Agent(library, options.cell, options.hidden)
        zeros = torch.zeros(1, options.environments, options.hidden)
        state = (zeros, zeros) if options.cell == "lstm" else zeros
        generator = torch.Generator().manual_seed(options.seed)
        recall = Recall(options.environments, options.seed)
        runs.append(Run(name, agent, remember, recall, generator, state))
    return runs


def train(runs: Sequence[Run], options: argparse.Namespace) -> None:
    print("update   return   seconds of learning")
    for update in tqdm(range(1, options.updates + 1), leave=False, unit="update"):
        for run in runs:  # in turns: what disturbs the machine disturbs both
            run.learn(run.collect(options.steps))
        if update % max(1, options.updates // 8) == 0:
            for run in runs:
                seconds = sum(run.seconds)
                tqdm.write(f"{update:6}   {run.returns[-1]:6.2f}   {seconds:7.1f}   {run.name}")


def plot(runs: Sequence[Run], title: str, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for panel, label in zip(figure.subplots(1, 2), ("update", "seconds of learning"), strict=True):
        for run, color, style in zip(runs, ("#9aa0a6", "#1f4e8c"), ("--", "-"), strict=True):
            seconds = torch.tensor(run.seconds).cumsum(0).tolist()
            over = range(1, len(run.returns) + 1) if label == "update" else seconds
            panel.plot(over, run.returns, style, color=color, label=run.name)
        panel.axhline(1 / CUES, color="#f0a868", linewidth=1, label="without memory")
        panel.set_xlabel(label)
        panel.set_ylabel("mean return of an episode")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an agent with a memory, with and without resets inside of rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="lstm", help="layer")
    for name, default, meaning in (
        ("--hidden", 128, "hidden units"),
        ("--environments", 64, "environments side by side, at least 4"),
        ("--steps", 128, "steps of each environment per update"),
        ("--updates", 40, "rollouts to learn from"),
    ):
        parser.add_argument(name, type=positive, default=default, help=meaning)
    parser.add_argument(
        "--threads", type=threads, default=torch.get_num_threads(),
        help=f"CPU threads, up to the {os.cpu_count()} processors",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of weights, environments and answers")
    parser.add_argument(
        "--plot", metavar="FILE", default="recurrent_ppo.png", help="picture to draw, '' for none"
    )
    options = parser.parse_args(arguments)
    if options.plot and (problem := check_plot(options.plot)):
        parser.error(f"--plot: {problem}")
    if options.environments < PARTS:
        parser.error(f"--environments: expected at least {PARTS}, got {options.environments}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    runs = start(options)
    title = (
        f"{options.cell.upper()} of {options.hidden} units, {options.environments} environments, "
        f"{options.steps} steps per update, {torch.get_num_threads()} thread(s)"
    )
    print(title)
    train(runs, options)
    if options.plot:
        plot(runs, title, options.plot)
        print(f"\ncurves: {options.plot}")
    plain, fast = runs
    ratio = sum(plain.seconds) / sum(fast.seconds)
    print(f"\nlearning with resets is {ratio:.1f} times as fast as with rows split and padded")
    print("(collecting is the same for both and not counted)")
    difference = abs(plain.losses[0] - fast.losses[0])
    print(f"difference of the losses of the first update: {difference:.1e} (allowed: 1e-04)")
    if not difference <= MAX_LOSS_DIFFERENCE:
        print("the losses differ by more than 1e-04", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
