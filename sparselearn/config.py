"""Recipes as YAML: loaded, checked and resolved before anything is built.

A recipe names importable callables (`fn: sparselearn.rigl`); other keys are their arguments, checked against the
signature. A value "ref:package.name" is that object itself, a nested mapping with `fn` is a callable with its arguments
bound. Times (`TIMES`) are optimizer steps; a float in (0, 1] for one of them is a fraction of `max_steps`.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparselearn.errors import SparsityError, closest
from sparselearn.schedules import check_run

GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay CUDA graphs
MODES = ("default", *GRAPHS, "max-autotune-no-cudagraphs")
TIMES = ("every", "start", "stop", "steps", "prune_start", "prune_stop", "stop_exploration", "warmup")
CALLABLES = ("data", "model", "method", "distribution", "optimizer", "schedule")


@dataclass
class Config:
    """One training run. The variant's keys win over the base's, the command line's over both."""

    name: str = MISSING
    description: str = ""
    reference: str = ""  # the paper's table row that the recipe follows, if any
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    max_steps: int = MISSING  # optimizer steps
    batch_size: int = 128  # over all devices and micro-batches
    accumulate: int = 1  # micro-batches in an optimizer step
    extend: float = 1.0  # lengthens the run: max_steps, and with it all times that are fractions of it
    warmup: Any = 0  # steps of linear warm-up, then `schedule`
    schedule: dict[str, Any] = field(default_factory=lambda: {"fn": "sparselearn.recipes.rates.cosine"})
    decay_vectors: bool = True  # false: no weight decay for norms, biases and other one-dimensional parameters
    label_smoothing: float = 0.0
    gradient_clip_val: float | None = None
    precision: str = "32-true"
    channels_last: bool = False  # images in this memory order; with bf16-mixed convolutions are faster on a GPU
    # true, or a mode of torch.compile, for training steps; the first takes up to a minute. "reduce-overhead" replays
    # CUDA graphs, for steps that wait for Python rather than for the GPU, as those of small images do.
    compile: Any = False
    devices: int = 1
    accelerator: str = "auto"
    eval_every: int = 0  # optimizer steps; 0 evaluates at the end only
    seed: int = 0
    variant: str = "rigl"
    variants: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] | None = None
    sparsity: float = 0.0
    distribution: dict[str, Any] = field(default_factory=lambda: {"fn": "sparselearn.distributions.erk"})
    select: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    support: float | None = None  # density of a random support that weights never leave
    overrides: dict[str, float] = field(default_factory=dict)
    init: str | None = None
    density_scaling: bool = False


def packaged() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    folder = Path(str(resources.files("sparselearn.recipes") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str, changes: list[str] | None = None) -> Config:
    """The resolved recipe: a path or a packaged name, then its variant, then `key=value` changes.

    Raises:
        SparsityError: an unknown recipe, variant or key, a value of the wrong type, an argument that a callable
            does not take, a time out of range. One line, before anything is built.
    """
    known = packaged()
    path = known.get(source, Path(source))
    if not path.is_file():
        raise SparsityError(
            f"There is no recipe `{source}`: neither a file nor one of {', '.join(known)}. See `sparselearn recipes`."
        )
    try:
        base = OmegaConf.load(path)
        if not OmegaConf.is_dict(base):
            raise SparsityError(f"`{path.name}`: a recipe must be a mapping of keys to values.")
        dotted = OmegaConf.from_dotlist(_checked_changes(changes or []))
        name = OmegaConf.select(dotted, "variant") or OmegaConf.select(base, "variant") or Config.variant
        variants = OmegaConf.select(base, "variants") or {}
        if variants and name not in variants:
            raise SparsityError(f"`{path.name}` has no variant `{name}`; it has: {', '.join(variants)}.")
        chosen = variants.get(name, {}) if variants else {}
        for variant in variants.values():  # a mistake in any of them is found now, not when it is chosen
            OmegaConf.merge(OmegaConf.structured(Config), variant)
        merged = OmegaConf.merge(OmegaConf.structured(Config), base, chosen, dotted)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SparsityError(_one_line(error, path)) from error
    except yaml.YAMLError as error:
        raise SparsityError(f"`{path.name}`: this is not YAML: {' '.join(str(error).split())}") from error
    assert isinstance(config, Config)  # for mypy: to_object of a structured Config is one
    _check_numbers(config)
    _resolve_times(config)
    for key in CALLABLES:
        check(key, getattr(config, key))
    if config.method is not None:
        check_run(build("method", config.method), config.max_steps)
    return config


def _checked_changes(changes: list[str]) -> list[str]:
    for change in changes:
        if "=" not in change or change.startswith("="):
            raise SparsityError(f"`{change}` must have the form key=value, as in sparsity=0.95.")
    return changes


def _one_line(error: OmegaConfBaseException, path: Path) -> str:
    key = str(error.full_key or error.key or "")
    if "not in" in str(error):
        names = list(Config.__dataclass_fields__)
        return f"`{path.name}`: unknown key `{key}`. Closest: {closest(key, names)}."
    return f"`{path.name}`: `{key}`: {str(error).splitlines()[0]}."


def _check_numbers(config: Config) -> None:
    for key, least in {"max_steps": 1, "batch_size": 1, "accumulate": 1, "devices": 1, "eval_every": 0}.items():
        if (value := getattr(config, key)) < least:
            raise SparsityError(f"`{key}` must be at least {least}; got {value}.")
    if config.max_steps * config.extend < 1:
        raise SparsityError(f"`extend` must leave at least one of {config.max_steps} steps; got {config.extend:g}.")
    if config.compile not in (False, True, *MODES):
        raise SparsityError(f"`compile` is false, true or one of {', '.join(MODES)}; got {config.compile!r}.")
    if config.compile in GRAPHS and config.accumulate > 1:  # pytorch issues 96693 and 169545: wrong, or an error
        raise SparsityError(
            f"`compile` {config.compile} replays CUDA graphs, in which torch does not add up the gradients of "
            f"`accumulate` {config.accumulate} micro-batches. Set compile=true, or accumulate=1."
        )
    if not 0 <= config.sparsity < 1:
        raise SparsityError(f"`sparsity` is the fraction of zeros and must lie in [0, 1); got {config.sparsity:g}.")


def _resolve_times(config: Config) -> None:
    config.max_steps, config.extend = round(config.max_steps * config.extend), 1.0  # once, though it be loaded again

    def steps(where: str, value: object) -> object:
        if not isinstance(value, float):
            return value
        if 0 < value <= 1:
            return max(1, round(value * config.max_steps))
        if not value.is_integer():
            raise SparsityError(f"`{where}` must be a whole number of optimizer steps or a fraction in (0, 1].")
        return int(value)

    def walk(where: str, node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, dict):
                walk(f"{where}.{key}", value)
            elif key in TIMES:
                node[key] = steps(f"{where}.{key}", value)

    walk("method", config.method)
    config.warmup = steps("warmup", config.warmup)
    if not isinstance(config.warmup, int) or config.warmup < 0:
        raise SparsityError(f"`warmup` must be a number of optimizer steps or a fraction; got {config.warmup!r}.")


def find(name: str, where: str) -> Any:
    """The object with this dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SparsityError(f"`{where}`: there is no `{name}` to import ({error}).") from error


def _arguments(where: str, spec: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    if "fn" not in spec:
        raise SparsityError(f"`{where}` needs a key `fn` with an importable name, as in fn: sparselearn.rigl.")
    fn = find(str(spec["fn"]), f"{where}.fn")
    if not callable(fn):
        raise SparsityError(f"`{where}.fn`: `{spec['fn']}` cannot be called; it is of type {type(fn).__name__}.")
    return fn, {key: _value(f"{where}.{key}", value) for key, value in spec.items() if key != "fn"}


def _value(where: str, value: Any) -> Any:
    if isinstance(value, str) and value.startswith("ref:"):
        return find(value[4:], where)
    if isinstance(value, dict) and "fn" in value:
        fn, arguments = _arguments(where, value)
        _bind(where, str(value["fn"]), fn, (), arguments)
        return _call(where, str(value["fn"]), fn, arguments)
    return value


def _bind(where: str, name: str, fn: Callable[..., Any], first: tuple[Any, ...], arguments: dict[str, Any]) -> None:
    signature = inspect.signature(fn)
    try:
        signature.bind(*first, **arguments)
    except TypeError as error:
        raise SparsityError(f"`{where}`: `{name}` {error}. Its arguments: {signature}.") from error


def _call(where: str, name: str, fn: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return fn(**arguments)
    except TypeError as error:
        raise SparsityError(f"`{where}`: `{name}` refused its arguments: {error}.") from error


def check(where: str, spec: Mapping[str, Any] | None) -> None:
    """Raises where the callable does not exist or does not take these arguments. Builds the method only."""
    if spec is None:
        return
    fn, arguments = _arguments(where, spec)
    first: dict[str, tuple[Any, ...]] = {"distribution": ({}, 0.5), "optimizer": ([],), "schedule": (0, 1, 0)}
    _bind(where, str(spec["fn"]), fn, first.get(where, ()), arguments)
    if where == "method":
        _call(where, str(spec["fn"]), fn, arguments)


def build(where: str, spec: Mapping[str, Any], *first: Any, **more: Any) -> Any:
    """Call the callable of a recipe."""
    fn, arguments = _arguments(where, spec)
    return fn(*first, **arguments, **more)


def bound(where: str, spec: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable with the recipe's arguments bound."""
    fn, arguments = _arguments(where, spec)
    return partial(fn, **arguments)


def to_yaml(config: Config) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
