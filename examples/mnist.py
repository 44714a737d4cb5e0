"""Reads the MNIST images and labels from their IDX files, plain or gzip-compressed.

An IDX file of bytes is: two zero bytes, the type code 0x08, the number of dimensions, one
big-endian 32-bit size per dimension, then the bytes themselves in C order.  A file that is not
exactly that is refused with an error that names it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08
CLASSES = 10

Bytes = NDArray[np.uint8]


def load_mnist(folder: str | Path) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Return training images, training labels, test images, test labels.

    Images are [N, rows, columns] of 0..255, labels [N] of 0..9.  The folder holds the four files
    under their usual names: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
    `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each plain or with `.gz`; some mirrors
    spell them with a dot, `train-images.idx3-ubyte`.

    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged file, OSError
    for what cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}")
    train_images, train_labels = _load_pair(folder, "train")
    test_images, test_labels = _load_pair(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{folder}: training images are {_by(train_images.shape[1:])} pixels, "
            f"test images {_by(test_images.shape[1:])}"
        )
    return train_images, train_labels, test_images, test_labels


def read_idx(path: str | Path, dimensions: int) -> Bytes:
    """Read one IDX file of bytes with the given number of dimensions."""
    path = Path(path)
    content = _read(path)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{path}: truncated: {len(content)} bytes, the header alone has {header}")
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != expected:
        raise ValueError(
            f"{path}: wrong magic number 0x{content[:4].hex()}, expected 0x{expected.hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    size = math.prod(shape)
    if len(content) - header != size:
        problem = "truncated" if len(content) - header < size else "too long"
        raise ValueError(
            f"{path}: {problem}: {len(content) - header} bytes of data, "
            f"the header announces {_by(shape)} = {size}"
        )
    if size == 0:
        raise ValueError(f"{path}: empty: the header announces {_by(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _load_pair(folder: Path, part: str) -> tuple[Bytes, Bytes]:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_path}: label {labels.max()}, expected 0 to {CLASSES - 1}")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    for path in (folder / spelling for spelling in (name, f"{name}.gz", dotted, f"{dotted}.gz")):
        if path.is_dir():
            raise FileNotFoundError(f"{path}: a folder, expected a file")
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder / name}: no such file, nor with .gz, nor as {dotted}")


def _read(path: Path) -> bytes:
    if path.suffix != ".gz":
        try:
            return path.read_bytes()
        except OSError as error:
            raise OSError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror}") from error


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
