"""Reading run folders for `sparselearn report`: what training left there, checked, as plain values."""

import csv
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.state import unpack

NUMBERS = ("test_accuracy", "sparsity", "nnz", "parameters", "training_flops", "inference_flops", "size_mb", "seconds",
           "steps")  # fmt: skip
MAYBE = ("test_loss", "gpu_mb", "examples_per_second")  # null where a run diverged, had no GPU, or was too short
PREFIX = "network."  # of the network within the LightningModule


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        label: the shortest end of the folder's path that no other run of the report has.
        config: the resolved recipe.
        facts: result.json over versions.json; the former is missing until the run is finished.
        series: metric -> step -> value; a step that a resumed run repeated has its last value.
        weights: weights of two or more dimensions by name, float32 on the CPU; empty before the first checkpoint.
        masks: bool, by the same names; empty for a dense run.
    """

    folder: Path
    label: str
    config: dict[str, Any]
    facts: dict[str, Any]
    finished: bool
    series: dict[str, dict[int, float]]
    weights: dict[str, Tensor] = field(repr=False)
    masks: dict[str, Tensor] = field(repr=False)

    @property
    def step(self) -> int:
        """The last step that anything was logged at."""
        return max((max(values) for values in self.series.values()), default=0)

    @property
    def nnz(self) -> int:
        """Active weights of the masked layers."""
        return sum(int(mask.sum()) for mask in self.masks.values())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs, in the order given.

    Raises:
        SparsityError: a folder is no run or was given twice, or one of its files is missing or damaged.
    """
    folders = [Path(folder) for folder in folders]
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise SparsityError(f"`{folders[index]}` was given twice. Name every run once.")
    return [read_run(folder, label) for folder, label in zip(folders, labels(places), strict=True)]


def labels(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ.

    >>> labels([Path("/a/one/rigl"), Path("/a/two/rigl")])
    ['one/rigl', 'two/rigl']
    """
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path, label: str) -> Run:
    """One folder that `sparselearn train` made."""
    if not (folder / "config.yaml").is_file():
        raise SparsityError(_no_run(folder))
    config = _mapping(folder / "config.yaml")
    result = _mapping(folder / "result.json") if (folder / "result.json").exists() else None
    versions = _mapping(folder / "versions.json") if (folder / "versions.json").exists() else {}
    for key in (*NUMBERS, *MAYBE):
        value = (result or {}).get(key, 0)
        if value is None and key in MAYBE:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SparsityError(f"`{folder / 'result.json'}`: `{key}` must be a number; it is {value!r}. {_AGAIN}")
    series = _metrics(folder / "metrics.csv", torn=result is None)
    run = Run(folder, label, config, {**versions, **(result or {})}, result is not None, series, {}, {})
    _tensors(run)
    return run


_AGAIN = "The file was changed or cut off; restore it, or train the run again."


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder `{folder}`. Give the folder of a run, the --out of `sparselearn train`."
    message = f"`{folder}` is no run: it has no config.yaml, which `sparselearn train` writes first."
    inside = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    if inside:
        return f"{message} It holds {len(inside)} runs: write `{folder}/*/` for all of them."
    return f"{message} Give the folder that was the --out of training."


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds keys and values."""
    try:
        text = path.read_text()
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise SparsityError(f"`{path}` cannot be read ({reason}). {_AGAIN}") from error
    if not isinstance(value, dict):
        raise SparsityError(f"`{path}` must hold keys and values; it holds {type(value).__name__}. {_AGAIN}")
    return {str(key): item for key, item in value.items()}


def _metrics(path: Path, torn: bool) -> dict[str, dict[int, float]]:
    """metrics.csv by name and step. `torn`: the run is not finished, its last line may be half written."""
    if not path.is_file():
        raise SparsityError(f"`{path}` is missing: a run without metrics has nothing to report. {_AGAIN}")
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise SparsityError(f"`{path}` cannot be read ({error}). {_AGAIN}") from error
    if torn and lines and not lines[-1].endswith("\n"):
        lines.pop()
    series: dict[str, dict[int, float]] = {}
    for number, row in enumerate(csv.reader(lines), 1):
        if number == 1 and row == ["step", "name", "value"]:
            continue
        try:
            step, name, value = row
            if number == 1 or int(step) < 0 or not name:
                raise ValueError
            series.setdefault(name, {})[int(step)] = float(value)
        except ValueError:
            required = "the header `step,name,value`" if number == 1 else "`step,name,value` with numbers"
            raise SparsityError(f"`{path}` line {number} must be {required}; it is {row}. {_AGAIN}") from None
    if not lines:
        raise SparsityError(f"`{path}` is empty; its first line must be the header `step,name,value`. {_AGAIN}")
    return {name: dict(sorted(values.items())) for name, values in series.items()}


def _tensors(run: Run) -> None:
    """Weights and masks from model.pt, or from the last checkpoint of a run that is not finished."""
    path = run.folder / ("model.pt" if run.finished else "last.ckpt")
    if not path.exists():
        return
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = saved["model" if run.finished else "state_dict"]
        sparsifier = saved["sparsifier"] if run.finished else saved["callbacks"].get("SparsityCallback")
        for name, tensor in model.items():
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.is_floating_point():
                run.weights[name.removeprefix(PREFIX)] = tensor.float()
        for name, layer in (sparsifier or {"layers": {}})["layers"].items():
            mask = unpack(layer["mask"], torch.Size(layer["shape"]))
            if int(mask.sum()) != layer["nnz"]:
                raise SparsityError(f"`{name}` has {int(mask.sum())} active weights, {layer['nnz']} were recorded")
            run.masks[name.removeprefix(PREFIX)] = mask
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise SparsityError(f"`{path}` cannot be read ({type(error).__name__}: {reason}). {_AGAIN}") from error
    if lost := [n for n, mask in run.masks.items() if n not in run.weights or run.weights[n].shape != mask.shape]:
        raise SparsityError(f"`{path}` has a mask for `{lost[0]}` but no weight of its shape. {_AGAIN}")
    _check_count(run)


def _check_count(run: Run) -> None:
    """result.json and the masks must tell the same number."""
    if run.masks and run.finished and {"nnz", "parameters"} <= run.facts.keys():
        size = sum(mask.numel() for mask in run.masks.values())
        seen = run.nnz + run.facts["parameters"] - size
        if seen != run.facts["nnz"]:
            raise SparsityError(
                f"`{run.folder}`: result.json says {run.facts['nnz']:,} nonzero parameters, but the masks in model.pt "
                f"make {seen:,}. The two files are not of one run; train it again."
            )


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every value of a recipe, without the variants, which are merged in already."""
    for key, value in config.items():
        if isinstance(value, dict) and value and prefix + str(key) != "variants":
            yield from flat(value, f"{prefix}{key}.")
        elif prefix + str(key) not in ("variants", "description", "reference"):
            yield prefix + str(key), "–" if value is None else str(value)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs: key -> one text a run."""
    settings = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    table = {key: [setting.get(key, "–") for setting in settings] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}
