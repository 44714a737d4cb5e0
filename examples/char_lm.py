"""Trains a character-level language model on the sources of Python's standard library.

    python examples/char_lm.py                                        # one process
    torchrun --nproc-per-node 2 examples/char_lm.py                   # two, with DDP
    torchrun --nproc-per-node 2 examples/char_lm.py --parallel fsdp   # two, with FSDP2

and prints the losses, the speed and a text that the model writes.  It runs on the CPU (gloo), or
on one GPU per process (nccl).

The text is cut into --batch-size rows, which are read from left to right, --sequence-length
characters per step; the layer's state is carried from step to step without its gradients.  The
processes share the rows, and --accumulate cuts each one's rows into parts whose gradients are added
up before the processes exchange them.  Neither changes what is learnt: the global batch is the
same, so that one process and several reach the same loss but for rounding.  Training amplifies
rounding once the loss is low and the learning rate is not: with the default settings the losses
were less than 1e-6 apart, but with a constant rate of 2e-3 they were 5e-3 apart after 300 steps.

--save writes the weights of the whole model as a safetensors file, without the optimizer's state;
--load starts from them, with any number of processes.

Exits with 2 if the arguments or a file are unusable.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import check_plot, positive, seed, threads
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import fastrnn
from fastrnn.info import backend_in_use

SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
EMBEDDING = 64
TEXT, HELD_OUT = 450_000, 50_000  # characters
MAX_NORM = 1.0  # of the gradients
PROMPT, SAMPLE, TEMPERATURE = "def ", 300, 0.7


class CharModel(nn.Module):
    """Scores [B, T, S] of the symbols that follow text [B, T], and the state behind it."""

    def __init__(self, cell: str, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS), EMBEDDING)
        layer = getattr(fastrnn, cell.upper())
        self.rnn = layer(EMBEDDING, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, len(SYMBOLS))

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(self.embedding(text), state)  # [B, T, H]
        return self.head(output), state


@dataclass
class Process:
    """This process among all that train together; count 0: alone, without torchrun."""

    rank: int
    count: int
    device: torch.device

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in float64."""
        values = values.double()
        if self.count:
            dist.all_reduce(values)
            values /= self.count
        return values


def start(device: str) -> Process:
    """Meet the other processes that torchrun has started."""
    if "RANK" not in os.environ:
        return Process(0, 0, torch.device(device))
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"more processes than GPUs ({gpus}); --device cpu needs none")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return Process(dist.get_rank(), dist.get_world_size(), torch.device(device))


def load_text() -> tuple[Tensor, Tensor]:
    """Characters to train on and held-out ones, as indices into SYMBOLS: two sets of modules of the
    standard library, every fifth by name, without those that contain other symbols."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("[a-z]*.py"))
    return read(modules[::5], TEXT), read(modules[1::5], HELD_OUT)


def read(files: Sequence[Path], length: int) -> Tensor:
    """The first `length` characters of the files."""
    text = ""
    for path in files:
        content = path.read_text(encoding="utf-8", errors="replace")
        text += content if set(content) <= set(SYMBOLS) else ""
    if len(text) < length:
        raise ValueError(f"{sysconfig.get_path('stdlib')}: too few sources of the standard library")
    return torch.tensor([SYMBOLS.index(symbol) for symbol in text[:length]])


def load_weights(model: CharModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        model.load_state_dict(load(path.read_bytes()))
    except (SafetensorError, RuntimeError) as error:  # damaged, or of another model
        raise ValueError(f"{path}: {error}") from None


def rows_of(text: Tensor, batch: int, process: Process) -> Tensor:
    """This process's share [B / processes, N] of the text, cut into B rows of N characters."""
    rows = text[: len(text) // batch * batch].view(batch, -1)
    return rows.chunk(max(process.count, 1))[process.rank].to(process.device)


def distribute(model: nn.Module, parallel: str, process: Process) -> nn.Module:
    """Let the processes train one model: `ddp`, each has a copy; `fsdp`, each has a part."""
    if not process.count:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(process.device.type, (process.count,))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def exchange_gradients(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether backward exchanges gradients with the other processes or only adds to its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def loss_of_chunk(model: nn.Module, rows: Tensor, index: int, length: int, state: Any) -> Any:
    """The mean loss over `length` characters of each row, and the state behind them, detached."""
    chunk = rows[:, index * length : (index + 1) * length + 1]  # [B, T + 1]
    scores, state = model(chunk[:, :-1], state)
    loss = cross_entropy(scores.flatten(0, 1), chunk[:, 1:].flatten())
    return loss, tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def train(
    model: nn.Module, rows: Tensor, options: argparse.Namespace, process: Process
) -> tuple[Tensor, float]:
    """Train on the rows [B / processes, N]: the loss of the global batch at each step, before the
    update, and the seconds taken."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    parts, length = rows.chunk(options.accumulate), options.sequence_length
    chunks = (rows.shape[1] - 1) // length
    losses = torch.zeros(options.steps, device=process.device)
    hidden = None if process.rank == 0 else True  # rank 0: shown on a terminal
    start = time.perf_counter()
    for step in (bar := tqdm(range(options.steps), leave=False, unit="step", disable=hidden)):
        if step % chunks == 0:  # at the beginning of the rows
            states = [None] * len(parts)
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            with exchange_gradients(model, now=i == len(parts) - 1):
                loss, states[i] = loss_of_chunk(model, part, step % chunks, length, states[i])
                loss /= len(parts)
                loss.backward()
            losses[step] += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{losses[step]:.3f}")
    return process.mean(losses).cpu(), time.perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor, length: int, process: Process) -> float:
    """The mean loss over the rows [B / processes, N] of all processes."""
    losses, state = [], None
    for index in range((rows.shape[1] - 1) // length):
        loss, state = loss_of_chunk(model, rows, index, length, state)
        losses.append(loss)
    return process.mean(torch.stack(losses).mean()).item()


@torch.inference_mode()
def write(model: CharModel, seed: int) -> str:
    """A text that the model continues character by character, drawn from its probabilities."""
    text, state = PROMPT, None
    draws = torch.Generator().manual_seed(seed)
    for i in range(len(PROMPT) + SAMPLE - 1):
        symbol = torch.tensor([SYMBOLS.index(text[i])])
        output, state = model.rnn.step(model.embedding(symbol), state)  # [1, H]
        if i == len(text) - 1:
            odds = (model.head(output[0]) / TEMPERATURE).softmax(0)
            text += SYMBOLS[int(odds.multinomial(1, generator=draws))]
    return text


def plot(losses: Tensor, held_out: float, title: str, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title, fontsize="medium")
    panel.plot(range(1, len(losses) + 1), losses.tolist(), color="#1f4e8c", label="training")
    panel.axhline(held_out, color="#f0a868", linestyle="--", label="held-out, at the end")
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a character-level language model, in one process or under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="lstm", help="layer")
    for name, default, meaning in (
        ("--hidden-size", 256, "hidden units"),
        ("--layers", 1, "recurrent layers"),
        ("--steps", 400, "updates"),
        ("--batch-size", 32, "rows per step, of all processes together"),
        ("--sequence-length", 64, "characters of a row per step"),
        ("--accumulate", 1, "parts of a process's rows per step"),
    ):
        parser.add_argument(name, type=positive, default=default, help=meaning)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam, falls to 0")
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="how processes share the model"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="of all processes",
        default="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=threads, default=torch.get_num_threads(),
        help=f"CPU threads per process, up to the {os.cpu_count()} processors",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and of the sample")
    parser.add_argument("--save", metavar="FILE", default="", help="safetensors file to write")
    parser.add_argument("--load", metavar="FILE", default="", help="safetensors file to start from")
    parser.add_argument("--plot", metavar="FILE", default="", help="picture of the loss to draw")
    options = parser.parse_args(arguments)
    if options.plot and (problem := check_plot(options.plot)):
        parser.error(f"--plot: {problem}")
    if (options.save or options.load) and importlib.util.find_spec("safetensors") is None:
        parser.error("--save and --load: safetensors is not installed")
    save = Path(options.save).absolute()
    if options.save and (save.is_dir() or not os.access(save.parent, os.W_OK)):
        parser.error(f"--save: {options.save}: cannot be written")
    shares = int(os.environ.get("WORLD_SIZE", 1)) * options.accumulate
    if options.batch_size % shares:
        parser.error(f"--batch-size: expected a multiple of processes * accumulate = {shares}")
    if options.batch_size * (options.sequence_length + 1) > HELD_OUT:
        parser.error(f"--batch-size, --sequence-length: too large for {HELD_OUT} held-out symbols")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = CharModel(options.cell, options.hidden_size, options.layers)
    try:
        texts = load_text()
        if options.load:
            load_weights(model, Path(options.load))
        process = start(options.device)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    model = distribute(model.to(process.device), options.parallel, process)
    run(options, model, texts, process)
    if process.count:
        # Together: gloo's threads let go of the tensors of the last collective call some time after
        # it, which must not be while Python ends.
        dist.barrier()
        dist.destroy_process_group()
    return 0


def run(
    options: argparse.Namespace, model: nn.Module, texts: tuple[Tensor, Tensor], process: Process
) -> None:
    """Train, evaluate, and let rank 0 report."""
    how = f", {options.parallel.upper()}" if process.count else ""
    title = (
        f"{options.cell.upper()} of {options.hidden_size} units, {options.layers} layer(s), "
        f"{max(process.count, 1)} process(es){how}"
    )
    if process.rank == 0:
        kind = process.device.type
        threads_used = f"{torch.get_num_threads()} thread(s) each"
        print(f"{title}, {threads_used}, {kind}, backend {backend_in_use(kind)}\n", flush=True)
    rows = [rows_of(text, options.batch_size, process) for text in texts]
    losses, seconds = train(model, rows[0], options, process)
    held_out = evaluate(model, rows[1], options.sequence_length, process)
    # A collective call: rank 0 gets the weights of the whole model, the others an empty dict.
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if process.rank:
        return
    characters = options.steps * options.batch_size * options.sequence_length
    print(f"training loss       {losses[-1]:.6f}  of the global batch, in step {options.steps}")
    print(f"held-out loss       {held_out:.6f}")
    print(f"perplexity          {math.exp(held_out):.3f}")
    print(f"bits per character  {held_out / math.log(2):.3f}")
    print(f"characters/s        {characters / seconds:.0f}  ({seconds:.1f} s of training)")
    if options.save:
        from safetensors.torch import save_file

        save_file(weights, options.save)
        print(f"weights             {options.save}")
    if options.plot:
        plot(losses, held_out, title, options.plot)
        print(f"curve               {options.plot}")
    writer = CharModel(options.cell, options.hidden_size, options.layers)
    writer.load_state_dict(weights)
    print(f"\n{write(writer, options.seed)}")


if __name__ == "__main__":
    sys.exit(main())
