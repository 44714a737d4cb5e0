"""Two processes that compute together, for the tests of torch.distributed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # that a task may take


class Pair:
    """Runs functions in two processes at once: ``pair(task, *arguments)`` returns what
    ``task(rank, *arguments)`` returned in each.

    The processes are kept from call to call, because importing torch takes seconds. They have one
    thread each and meet through a file (gloo). After a failure they are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = 0
        self.workers: list[Any] = []
        self.pipes: list[connection.Connection] = []

    def __call__(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self.workers:
            self._start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((task, arguments)))
        results: dict[int, Any] = {}
        while len(results) < 2:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = connection.wait(waiting, SECONDS)
            error = "" if ready else f"no answer for {SECONDS} seconds"
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = "the process ended"
                if error:
                    error = f"process {rank} of 2: {error}"
                    break
            if error:
                self.close()
                raise RuntimeError(error)
        return [results[0], results[1]]

    def _start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # before the processes import torch
        try:
            for rank in range(2):
                ours, theirs = context.Pipe()
                store = str(self.folder / f"store{self.starts}")
                worker = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
                worker.start()
                theirs.close()
                self.workers.append(worker)
                self.pipes.append(ours)
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        for pipe in self.pipes:
            pipe.close()
        self.workers, self.pipes = [], []


def _work(rank: int, store: str, pipe: connection.Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    while True:
        try:
            task, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = task(rank, *arguments), ""
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
