"""Data sets as tensors on the training device, and a loader whose batches depend on (seed, step) alone."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselearn.errors import SparsityError

# Where Fashion-MNIST's IDX files may lie: torchvision's layout, and that of Debian's dataset-fashion-mnist.
FASHION_PLACES = ("", "FashionMNIST/raw", "raw")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    """Inputs (float32, normalised) and labels (int64) for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(*(t.to(device) for t in self))


def _normalised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean(), train.std()
    return (train - mean) / std, (test - mean) / std


def digits(flat: bool = True) -> Split:
    """scikit-learn's 1797 digits of 8x8 (a UCI data set): 1437 for training, 360 for test, a fixed split.

    Inputs are [n, 64], or [n, 1, 8, 8] with flat=False.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_x, test_x = _normalised(*(torch.tensor(p, dtype=torch.float32) for p in parts[:2]))
    if not flat:
        train_x, test_x = train_x.view(-1, 1, 8, 8), test_x.view(-1, 1, 8, 8)
    return Split(train_x, torch.tensor(parts[2]), test_x, torch.tensor(parts[3]))


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes (plain or .gz) as a uint8 tensor of the shape it states.

    Raises:
        SparsityError: not an IDX file of bytes, or shorter or longer than its header says.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise SparsityError(f"`{path}` cannot be unpacked ({error}). Download it again.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise SparsityError(f"`{path}` is not an IDX file of unsigned bytes. Download it again.")
    ndim = raw[3]
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if body.size != int(np.prod(shape)):
        raise SparsityError(f"`{path}` says {shape} but holds {body.size} bytes. Download it again.")
    return torch.from_numpy(body.copy()).view(shape)


def fashion_mnist(root: str = "data", download: bool = False) -> Split:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 images [n, 1, 28, 28].

    Args:
        root: folder with the four `*-ubyte` files, plain or .gz, or torchvision's root above them. The Debian package
            dataset-fashion-mnist is found by itself.
        download: let torchvision download it into root.
    """
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(root, download=True)
    folders = [Path(root) / place for place in FASHION_PLACES] + [DEBIAN_FASHION]

    def read(name: str) -> Tensor:
        for folder in folders:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return read_idx(path)
        raise SparsityError(
            f"Fashion-MNIST's `{name}` was not found under `{root}`. Let torchvision fetch it with "
            "`data.download=true`, point `data.root=` to it, or run `apt-get install dataset-fashion-mnist`."
        )

    images = [read(f"{part}-images-idx3-ubyte").float().unsqueeze(1) / 255 for part in ("train", "t10k")]
    labels = [read(f"{part}-labels-idx1-ubyte").long() for part in ("train", "t10k")]
    train_x, test_x = _normalised(*images)
    return Split(train_x, labels[0], test_x, labels[1])


class Chunks:
    """All examples in order, in chunks of `size`: the evaluation loader."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 2000) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(self.size), self.y.split(self.size), strict=True)


class Batches:
    """Training batches by step: each epoch is a permutation drawn from (seed, epoch).

    The whole run is one pass over this loader, and its position is its state, so that a resumed run sees the batches
    that the interrupted one would have seen. With several ranks each takes every world-th example of a batch.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size > len(x):
            raise SparsityError(f"`batch_size` is {batch_size}, but there are only {len(x)} training examples.")
        self.x, self.y, self.batch_size, self.steps, self.seed = x, y, batch_size, steps, seed
        self.rank, self.world = rank, world
        self.position = 0
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.steps

    def _epoch(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.x), generator=generator).to(self.x.device))
        return self._order[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch = len(self.x) // self.batch_size  # the rest of an epoch is left out, another one each time
        start = self.position if self.position < self.steps else 0
        for step in range(start, self.steps):
            epoch, index = divmod(step, per_epoch)
            chosen = self._epoch(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
            chosen = chosen[self.rank :: self.world]
            self.position = step + 1
            yield self.x[chosen], self.y[chosen]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
