"""CIFAR-10 and CIFAR-100, held on the training device as bytes and augmented there."""

import io
import itertools
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.recipes.data import Batches, Chunks, Split


class Pixels:
    """Bytes to normalised floats, and the usual random crop, flip and cutout, all examples of a batch at once.

    Args:
        mean, std: of each channel, [C, 1, 1] float32, of pixel values in [0, 1].
        padding: a crop starts up to so many pixels outside the image, on either side.
        mirror: the pixels outside mirror those inside (edge included); otherwise they are black.
        cutout: side of a square around a random pixel that is set to the mean (arXiv 1708.04552); 0 for none.
    """

    def __init__(self, mean: Tensor, std: Tensor, size: int, padding: int, mirror: bool, cutout: int) -> None:
        self.mean, self.std, self.size = mean, std, size
        self.padding, self.mirror, self.cutout = padding, mirror, cutout

    def to(self, device: torch.device) -> "Pixels":
        return Pixels(self.mean.to(device), self.std.to(device), self.size, self.padding, self.mirror, self.cutout)

    def normalised(self, x: Tensor) -> Tensor:
        """float32 [n, C, H, W] of uint8 [n, C, H, W]."""
        return (x.float() / 255 - self.mean) / self.std

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 5]: row and column of the crop, whether to flip, row and column of the cutout."""
        ends = (2 * self.padding + 1, 2 * self.padding + 1, 2, self.size, self.size)
        return torch.stack([torch.randint(end, (n,), generator=generator) for end in ends], 1)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """float32 [n, C, H, W] of uint8 [n, C, H, W] and the rows of `draw`."""
        top, left, flip, row, column = draws.unsqueeze(2).unbind(1)  # [n, 1] each
        along = torch.arange(self.size, device=x.device)
        rows = top - self.padding + along  # [n, H], of the image that the crop is taken from
        columns = left - self.padding + torch.where(flip == 1, self.size - 1 - along, along)
        examples, channels = (torch.arange(k, device=x.device) for k in x.shape[:2])
        inside_rows, inside_columns = rows, columns
        if self.mirror:
            inside_rows, inside_columns = (torch.where(i < 0, -1 - i, i) for i in (rows, columns))
            inside_rows, inside_columns = (
                torch.where(i >= self.size, 2 * self.size - 1 - i, i) for i in (inside_rows, inside_columns)
            )
        crop = x[
            examples[:, None, None, None],
            channels[None, :, None, None],
            inside_rows.clamp(0, self.size - 1)[:, None, :, None],
            inside_columns.clamp(0, self.size - 1)[:, None, None, :],
        ]
        if not self.mirror:
            seen_rows, seen_columns = ((i >= 0) & (i < self.size) for i in (rows, columns))
            crop = crop * (seen_rows[:, None, :, None] & seen_columns[:, None, None, :])
        result = self.normalised(crop)
        if self.cutout:
            low, high = -(self.cutout // 2), (self.cutout + 1) // 2  # [pixel + low, pixel + high), cut at the border
            gone_rows, gone_columns = ((along >= pixel + low) & (along < pixel + high) for pixel in (row, column))
            result.masked_fill_(gone_rows[:, None, :, None] & gone_columns[:, None, None, :], 0.0)
        return result


class Images(NamedTuple):
    """Square images as bytes [n, C, H, W] with labels, and what makes inputs of them."""

    split: Split
    pixels: Pixels

    @property
    def classes(self) -> int:
        return self.split.classes

    def to(self, device: torch.device) -> "Images":
        return Images(self.split.to(device), self.pixels.to(device))

    def example(self) -> Tensor:
        return self.pixels.normalised(self.split.test_x[:2]).cpu()

    def batches(self, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1) -> Batches:
        return Batches(self.split.train_x, self.split.train_y, batch_size, steps, seed, rank, world, self.pixels)

    def chunks(self, rank: int = 0, world: int = 1) -> Chunks:
        return Chunks(self.split.test_x, self.split.test_y, prepare=self.pixels.normalised)


def images(split: Split, padding: int = 4, mirror: bool = False, cutout: int = 0) -> Images:
    """Images with the training set's own mean and standard deviation of each channel."""
    channels = range(split.train_x.shape[1])
    values = [split.train_x[:, c].float() / 255 for c in channels]  # channel by channel: a quarter of the memory
    mean = torch.stack([v.mean() for v in values]).view(-1, 1, 1)
    std = torch.stack([v.std() for v in values]).view(-1, 1, 1)
    return Images(split, Pixels(mean, std, split.train_x.shape[-1], padding, mirror, cutout))


def cifar10(
    root: str = "data", download: bool = False, padding: int = 4, mirror: bool = False, cutout: int = 0
) -> Images:
    """CIFAR-10: 50,000 + 10,000 images [n, 3, 32, 32] of 10 classes, cropped and flipped at random in training.

    Args:
        root: torchvision's root, above `cifar-10-batches-py`; or an `.npz` file (`read_npz`).
        download: let torchvision download it into root.
        padding, mirror, cutout: see `Pixels`.

    Raises:
        SparsityError: no data there (the message has the command that gets it), or damaged data.
    """
    return images(_read("CIFAR10", root, download), padding, mirror, cutout)


def cifar100(
    root: str = "data", download: bool = False, padding: int = 4, mirror: bool = False, cutout: int = 0
) -> Images:
    """CIFAR-100: as `cifar10`, with 100 classes and `cifar-100-python`."""
    return images(_read("CIFAR100", root, download), padding, mirror, cutout)


def _read(name: str, root: str, download: bool) -> Split:
    if root.endswith(".npz"):
        return read_npz(Path(root))
    from torchvision import datasets

    try:
        parts = [getattr(datasets, name)(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:  # without a network: an OSError
        raise SparsityError(
            f'{name} was not found under `{root}`, or is damaged ({error}). Get it (170 MB) with `python -c "from '
            f"torchvision.datasets import {name}; {name}('{root}', download=True)\"` or with `data.download=true`, or "
            "point `data.root=` to it or to an .npz file."
        ) from error
    tensors = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return Split(*tensors[0], *tensors[1])


def read_npz(path: Path) -> Split:
    """Images and labels from an `.npz` file: uint8 [n, C, H, W] and int64.

    For each PART of train and test it holds `PART_labels` (integers, [n]) and either

    - `PART_images`: uint8 [n, H, W, C], or
    - `PART_jpeg` and `PART_offsets`: all JPEG (or PNG) files one after the other (uint8), file i from byte offsets[i]
      to byte offsets[i + 1] (integers, [n + 1]).

    Raises:
        SparsityError: no such file, another layout, or an image that cannot be decoded.
    """
    if not path.is_file():
        raise SparsityError(f"There is no file `{path}`. Point `data.root=` to an .npz file or to torchvision's root.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise SparsityError(
            f"`{path}` is not an .npz file of plain arrays ({error}). Write it with np.savez."
        ) from error
    return Split(*_part(path, "train", arrays), *_part(path, "test", arrays))


def _part(path: Path, part: str, arrays: dict[str, Any]) -> tuple[Tensor, Tensor]:
    def array(key: str, check: Callable[[Any], bool], what: str) -> Any:
        value = arrays.get(f"{part}_{key}")
        if value is None or not check(value):
            seen = "absent" if value is None else f"{value.dtype} of shape {list(value.shape)}"
            raise SparsityError(
                f"`{path}`: `{part}_{key}` must be {what}; it is {seen}. The layout is described at "
                "sparselearn.recipes.data.cifar.read_npz."
            )
        return value

    labels = array("labels", lambda a: a.ndim == 1 and a.dtype.kind in "iu", "integers [n]")
    n = len(labels)
    if f"{part}_jpeg" in arrays:
        raw = array("jpeg", lambda a: a.ndim == 1 and a.dtype == np.uint8, "uint8 [bytes]").tobytes()
        offsets = array(
            "offsets",
            lambda a: a.shape == (n + 1,) and a.dtype.kind in "iu" and bool((np.diff(a.astype(np.int64)) > 0).all()),
            f"rising integers [{n + 1}], one more than the labels",
        )
        pixels = _decode(path, part, [raw[a:b] for a, b in itertools.pairwise(offsets)])
    else:
        pixels = array(
            "images", lambda a: a.ndim == 4 and a.shape[0] == n and a.shape[1] == a.shape[2] and a.dtype == np.uint8,
            f"uint8 [{n}, size, size, channels]",
        )  # fmt: skip
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _decode(path: Path, part: str, files: list[bytes]) -> Any:
    """uint8 [n, H, W, 3]."""
    from PIL import Image, UnidentifiedImageError

    def decode(file: bytes) -> Any:
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    try:
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(decode, files)))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise SparsityError(
            f"`{path}`: the images in `{part}_jpeg` cannot be decoded to one size ({error}). Write the file again."
        ) from error
