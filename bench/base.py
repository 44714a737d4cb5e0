"""Another revision of fastrnn as one more rival, in the same process: `bench.run --base REV`.

Two builds of fastrnn cannot be loaded side by side as they are: both would register the operators
`torch.ops.fastrnn`.  So the other one is renamed before it is built: REV is checked out into a
temporary git worktree, the word `fastrnn` is replaced by `fastrnn_base` in every source file there
(package, operators, C++ namespace), and the result is built and imported as `fastrnn_base`.  The
arithmetic is the same, only names differ.  It takes its turns with the others, under the same
threads, allocator and caches, which a child process that is asked over a pipe would not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.environment import ROOT, git
from bench.rivals import BASE, Rival, make_fastrnn

NAME = "fastrnn_base"
SOURCES = {".py", ".pyi", ".toml", ".in", ".h", ".inl", ".cpp", ".cu", ".cuh"}


@contextlib.contextmanager
def base_rival(revision: str) -> Iterator[Rival]:
    """Build that revision and yield it as a rival; ValueError if git does not know it.

    The build needs a compiler and takes as long as that of fastrnn.  One revision per process.
    """
    commit = resolve(revision)
    with tempfile.TemporaryDirectory(prefix="fastrnn-base-") as folder:
        tree = Path(folder) / "tree"
        run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], ROOT)
        try:
            rename(tree)
            build(tree)
            sys.path.insert(0, str(tree))
            try:
                module = importlib.import_module(NAME)
            finally:
                sys.path.remove(str(tree))
            make = functools.partial(make_fastrnn, namespace=module)
            yield Rival(BASE, make, absent=lambda: None)
        finally:
            run(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def resolve(revision: str) -> str:
    """Return the full commit hash of a revision."""
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"git knows no revision {revision!r} here")
    return commit


def rename(tree: Path) -> None:
    """Replace the word fastrnn in the sources of a checkout, and the name of the package."""
    for path in tree.rglob("*"):
        if path.suffix in SOURCES and path.is_file():
            path.write_text(re.sub(r"\bfastrnn\b", NAME, path.read_text()))
    (tree / "fastrnn").rename(tree / NAME)


def build(tree: Path) -> None:
    """Build a checkout in place, with the metadata that the package reads its version from."""
    words = [sys.executable, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"]
    run(words, tree, {"FASTRNN_BUILD": "1", "FASTRNN_CUDA": "0"})


def run(words: list[str], folder: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command in a folder; RuntimeError, with what it printed, if it fails."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")
