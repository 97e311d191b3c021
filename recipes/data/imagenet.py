"""Images in folders, one for each class, read and augmented by worker processes: ImageNet, or your own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sparselearn.errors import SparsityError
from sparselearn.recipes.data import Batches, Split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set
TEST_BATCH = 256  # images over which one rank evaluates at a time


class _Seeds:
    """An `Augment` of example numbers: adds the seed of each example's random changes in this epoch."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2**62, (n, 1), generator=generator)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        return torch.stack([x, draws[:, 0]], 1)


class _Seeded(Dataset[Any]):
    """The images by (number, seed): the same random changes whichever process makes them, and whenever."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> Any:
        number, seed = key
        with torch.random.fork_rng(devices=[]):  # without workers this is the generator that dropout uses
            torch.default_generator.manual_seed(seed)
            return self.images[number]


def _loader(images: Dataset[Any], workers: int, **batching: Any) -> DataLoader[Any]:
    # A generator of its own: otherwise a loader draws from the one that dropout uses.
    return DataLoader(
        images,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **batching,
    )


class FolderBatches:
    """As `Batches`, for images that workers read ahead: its position is the last batch given out, not the last read."""

    def __init__(self, images: ImageFolder, plan: Batches, workers: int) -> None:
        self.images, self.plan, self.workers = images, plan, workers
        self.position = 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        start = self.position if self.position < len(self) else 0
        self.plan.position = start
        keys = (pairs.tolist() for pairs, _ in self.plan)
        loader = _loader(_Seeded(self.images), self.workers, batch_sampler=keys)
        for step, batch in enumerate(loader, start):
            self.position = step + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Folders(NamedTuple):
    """A training and a test set of images in folders; float32 [n, 3, size, size]."""

    train: ImageFolder
    test: ImageFolder
    workers: int

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    def to(self, device: torch.device) -> "Folders":
        return self  # the trainer moves each batch

    def example(self) -> Tensor:
        return torch.stack([self.test[i][0] for i in range(min(2, len(self.test)))])

    def batches(self, batch_size: int, steps: int, seed: int, rank: int = 0, world: int = 1) -> FolderBatches:
        numbers = torch.arange(len(self.train))
        plan = Batches(numbers, numbers, batch_size, steps, seed, rank, world, _Seeds())
        return FolderBatches(self.train, plan, self.workers)

    def chunks(self, rank: int = 0, world: int = 1) -> Any:
        if len(self.test) < world:
            raise SparsityError(f"There are only {len(self.test)} test images for {world} devices. Use fewer devices.")
        part = Subset(self.test, range(rank, len(self.test), world))
        return _loader(part, self.workers, batch_size=TEST_BATCH)


def image_folder(
    root: str = "data/imagenet", size: int = 224, workers: int = 8, rand_augment: bool = False, synthetic: int = 0
) -> Folders | Split:
    """`root/train` and `root/val` with a folder of images for each class, as torchvision's ImageFolder reads them.

    Training images are random resized crops, flipped at random; test images are resized to size · 256/224 and cropped
    in the centre (the evaluation of ResNet, arXiv 1512.03385).

    Args:
        size: side of the inputs in pixels.
        workers: processes that read images, for each device.
        rand_augment: RandAugment (arXiv 1909.13719), as in torchvision's reference for ViT.
        synthetic: in place of the folders, so many images of noise in 1000 classes, held on the training device: what
            the network can be trained at, without the reading.

    Raises:
        SparsityError: the folders are not there (the message says how to get ImageNet), hold no images, or not the same
            classes.
    """
    if synthetic:
        return _noise(synthetic, size)
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    changes = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    if rand_augment:
        changes.append(transforms.RandAugment())
    centre = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    train = _images(root, "train", transforms.Compose([*changes, *normalise]))
    test = _images(root, "val", transforms.Compose([*centre, *normalise]))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise SparsityError(
            f"`{root}`: `train` and `val` must have the same class folders; {len(odd)} are in one of them only: "
            f"{', '.join(odd[:3])}."
        )
    return Folders(train, test, workers)


def _noise(n: int, size: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, size, size, generator=generator), torch.randint(1000, (n,), generator=generator)
    y[0] = 999  # so that the network needs 1000 outputs
    return Split(x, y, x[:64], y[:64])


def _images(root: str, part: str, change: Any) -> ImageFolder:
    if not (Path(root) / part).is_dir():
        raise SparsityError(
            f"There is no folder `{Path(root) / part}`. Point `data.root=` to a folder with `train` and `val`, each "
            "with one folder of images per class. For ImageNet, put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
            f"and ILSVRC2012_devkit_t12.tar.gz (free at image-net.org after signing in) into `{root}` and unpack them "
            f"with `python -c \"from torchvision.datasets import ImageNet; [ImageNet('{root}', p) for p in ('train', "
            "'val')]\"`."
        )
    try:
        return ImageFolder(str(Path(root) / part), change)
    except FileNotFoundError as error:
        raise SparsityError(
            f"`{Path(root) / part}` must hold a folder of images for each class ({' '.join(str(error).split())})."
        ) from error
