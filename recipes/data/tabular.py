"""Tables: two that scikit-learn holds, or any .csv or .npz file."""

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparselearn.errors import SparsityError
from sparselearn.recipes.data import Split

EMBEDDED = ("breast_cancer", "wine")


def table(source: str = "breast_cancer", label: str = "", test: float = 0.2) -> Split:
    """Rows of numbers [n, features] with a class each; every feature standardised by the training rows.

    A fixed, stratified part of the rows is the test set.

    Args:
        source: `breast_cancer` (569 rows of 30 features, 2 classes) or `wine` (178 of 13, 3 classes), UCI sets that
            scikit-learn holds; or a `.csv` file with a header, or an `.npz` file with `x` [n, features] and `y` [n].
        label: the csv's column of classes, numbers or words; the last one by default.
        test: fraction of the rows in the test set.

    Raises:
        SparsityError: an unknown source, a missing file, column or value, or a class with only one row.
    """
    from sklearn.model_selection import train_test_split

    x, words = _rows(source, label)
    _, y = np.unique(words, return_inverse=True)
    try:
        parts = train_test_split(x, y, test_size=test, random_state=0, stratify=y)
    except ValueError as error:
        raise SparsityError(f"`{source}` cannot be split into training and test rows: {error}") from error
    mean, std = parts[0].mean(0), parts[0].std(0)
    std[std == 0] = 1.0  # a feature that never changes tells nothing
    train_x, test_x = (torch.tensor((p - mean) / std, dtype=torch.float32) for p in parts[:2])
    return Split(train_x, torch.from_numpy(parts[2]), test_x, torch.from_numpy(parts[3]))


def _rows(source: str, label: str) -> tuple[Any, Any]:
    """Features float64 [n, features] and classes [n], numbers or words."""
    if source in EMBEDDED:
        from sklearn import datasets

        return getattr(datasets, f"load_{source}")(return_X_y=True)  # type: ignore[no-any-return]
    path = Path(source)
    if path.suffix not in (".csv", ".npz") or not path.is_file():
        raise SparsityError(
            f"`source` must be {', '.join(EMBEDDED)}, or an existing .csv or .npz file; got `{source}`."
        )
    x, y = _read_csv(path, label) if path.suffix == ".csv" else _read_npz(path)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise SparsityError(f"`{source}`: row {row + 1}, feature {column + 1} is not finite. Fill or remove such rows.")
    return x, y


def _read_npz(path: Path) -> tuple[Any, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = np.asarray(file["x"], dtype=np.float64), file["y"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise SparsityError(f"`{path}` must hold numbers `x` [n, features] and classes `y` [n] ({error}).") from error
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise SparsityError(f"`{path}` must hold `x` [n, features] and `y` [n]; got {list(x.shape)}, {list(y.shape)}.")
    return x, y


def _read_csv(path: Path, label: str) -> tuple[Any, Any]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if not rows:
        raise SparsityError(f"`{path}` must have a header and rows; it has {len(header)} columns and no rows.")
    if label and label not in header:
        raise SparsityError(f"`{path}` has no column `{label}`; it has: {', '.join(header)}.")
    target = header.index(label) if label else len(header) - 1
    values = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise SparsityError(f"`{path}`: row {number} has {len(row)} values, the header has {len(header)}.")
        try:
            values.append([float(value) for place, value in enumerate(row) if place != target])
        except ValueError as error:
            raise SparsityError(
                f"`{path}`: row {number}: {error}. Features must be numbers; name the classes with `data.label=`."
            ) from error
    return np.asarray(values, dtype=np.float64), np.asarray([row[target] for row in rows])
