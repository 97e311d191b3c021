"""Data sets as tensors on the training device, and a loader whose batches depend on (seed, step) alone.

What a recipe's `data` callable returns is a `Data`; this file has the smallest sets, the modules beside it the others.
"""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselearn.errors import SparsityError

# Where Fashion-MNIST's IDX files may lie: torchvision's layout, and that of Debian's dataset-fashion-mnist.
FASHION_PLACES = ("", "FashionMNIST/raw", "raw")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class Data(Protocol):
    """A training and a test set, as a recipe uses them."""

    @property
    def classes(self) -> int:
        """How many outputs a network needs for these labels."""

    def to(self, device: torch.device) -> "Data":
        """The data where training takes place; a set that is read from disk stays there."""

    def example(self) -> Tensor:
        """Up to two test inputs as the network gets them, on the CPU: what operations are counted with."""

    def batches(self, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1) -> Any:
        """The whole run's training batches (inputs, labels), a sized iterable with a state of its own; see `Batches`.

        Args:
            batch_size: over all ranks.
            steps: batches in the run.
        """

    def chunks(self, rank: int = 0, world: int = 1) -> Any:
        """The test set's batches. A set that is costly to read may give each rank its own part."""


class Split(NamedTuple):
    """Inputs (float32 and normalised, or int64 tokens) and labels (int64) for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(*(t.to(device) for t in self))

    @property
    def classes(self) -> int:
        return int(max(self.train_y.max(), self.test_y.max())) + 1

    def example(self) -> Tensor:
        return self.test_x[:2].cpu()

    def batches(self, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1) -> "Batches":
        return Batches(self.train_x, self.train_y, batch_size, steps, seed, rank, world)

    def chunks(self, rank: int = 0, world: int = 1) -> "Chunks":
        return Chunks(self.test_x, self.test_y)  # all of it on every rank: it lies in memory anyway


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


def fashion_mnist(root: str = "data", download: bool = False, flat: bool = False) -> Split:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 images [n, 1, 28, 28], or [n, 784] if `flat`.

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
    if flat:
        train_x, test_x = train_x.flatten(1), test_x.flatten(1)
    return Split(train_x, labels[0], test_x, labels[1])


class Augment(Protocol):
    """Random changes to a batch of inputs, apart from the drawing of the random numbers."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, k] int64: an epoch's random numbers, a row for each example."""

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """The changed inputs; `draws` [batch, k] are the rows of these examples."""


class Chunks:
    """All examples in order, in chunks of `size`, each as `prepare` gives it: the evaluation loader."""

    def __init__(
        self, x: Tensor, y: Tensor, size: int = 2000, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.x, self.y, self.size, self.prepare = x, y, size, prepare

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.size), self.y.split(self.size), strict=True):
            yield (x if self.prepare is None else self.prepare(x)), y


class Batches:
    """Training batches by step: each epoch is a permutation drawn from (seed, epoch), and so are its augmentations.

    The whole run is one pass over this loader, and its position is its state, so that a resumed run sees the batches
    that the interrupted one would have seen. With several ranks each takes every world-th example of a batch. The
    random numbers come from the CPU's generator: a batch is the same on every device and for every number of ranks.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1,
        augment: Augment | None = None,
    ) -> None:  # fmt: skip
        if batch_size > len(x):
            raise SparsityError(f"`batch_size` is {batch_size}, but there are only {len(x)} training examples.")
        self.x, self.y, self.batch_size, self.steps, self.seed = x, y, batch_size, steps, seed
        self.rank, self.world, self.augment = rank, world, augment
        self.position = 0
        self._plan: tuple[int, Tensor, Tensor | None] | None = None

    def __len__(self) -> int:
        return self.steps

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """The order of the examples, and their random numbers."""
        if self._plan is None or self._plan[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            draws = self.augment.draw(len(self.x), generator).to(self.x.device) if self.augment is not None else None
            self._plan = (epoch, order, draws)
        return self._plan[1:]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch = len(self.x) // self.batch_size  # the rest of an epoch is left out, another one each time
        start = self.position if self.position < self.steps else 0
        for step in range(start, self.steps):
            epoch, index = divmod(step, per_epoch)
            order, draws = self._epoch(epoch)
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size][self.rank :: self.world]
            self.position = step + 1
            x = self.x[chosen]
            yield (x if self.augment is None or draws is None else self.augment(x, draws[chosen])), self.y[chosen]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
