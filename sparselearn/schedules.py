"""Schedules: values that change with the optimizer step, and the steps on which masks change.

A `Schedule` is any function of the optimizer step. Those below are small frozen dataclasses with lower-case
names, so that a method prints as it was written, compares by value and can be sent to another process.
Before `start` each has its first value, from `stop` on its last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from sparselearn.errors import SparsityError

Schedule = Callable[[int], float]
DensitySchedule = Callable[[int, float], float]  # (step, final density) -> density


def _check_range(name: str, start: int, stop: int) -> None:
    if start < 0 or stop <= start:
        raise SparsityError(
            f"`{name}` needs 0 <= start < stop (optimizer steps); got start={start}, stop={stop}. "
            "Choose a later stop or an earlier start."
        )


def _check_ascending(name: str, steps: tuple[int, ...]) -> None:
    if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
        raise SparsityError(f"`{name}` needs steps that ascend, at least one of them, from 0 on; got {steps}.")


def checked_fraction(value: float, step: int | None = None) -> float:
    """The drop fraction, or a clear error."""
    if not 0 <= value <= 1:
        at = "" if step is None else f" at step {step}"
        raise SparsityError(f"`drop_fraction` must lie in [0, 1]; got {value}{at}.")
    return value


def check_density(name: str, value: float) -> None:
    """Raises where this is no density."""
    if not 0 < value <= 1:
        raise SparsityError(f"`{name}` must lie in (0, 1]; got {value}. It is a density: 0.1 for 90 % zeros.")


def _progress(step: int, start: int, stop: int) -> float:
    return min(max((step - start) / (stop - start), 0.0), 1.0)


@dataclass(frozen=True)
class constant:
    """The same value at every step.

    >>> constant(0.3)(1000)
    0.3
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class linear:
    """initial + (final - initial)·τ with τ = (step - start) / (stop - start), held outside [start, stop].

    >>> linear(1.0, stop=10)(5)
    0.5
    """

    initial: float
    stop: int
    start: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_range("linear", self.start, self.stop)

    def __call__(self, step: int) -> float:
        return self.initial + (self.final - self.initial) * _progress(step, self.start, self.stop)


@dataclass(frozen=True)
class cosine:
    """final + (initial - final)/2 · (1 + cos(πτ)): RigL's drop fraction (arXiv 1911.11134, §3(2)).

    >>> [round(cosine(0.3, stop=6)(t), 3) for t in (0, 2, 3, 4, 6)]
    [0.3, 0.225, 0.15, 0.075, 0.0]
    """

    initial: float
    stop: int
    start: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_range("cosine", self.start, self.stop)

    def __call__(self, step: int) -> float:
        tau = _progress(step, self.start, self.stop)
        return self.final + 0.5 * (self.initial - self.final) * (1 + math.cos(math.pi * tau))


@dataclass(frozen=True)
class inverse_power:
    """final + (initial - final)·(1 - τ)^k (arXiv 1911.11134, App. G; k = 1 is linear).

    >>> inverse_power(0.8, stop=10, k=2)(5)
    0.2
    """

    initial: float
    stop: int
    start: int = 0
    final: float = 0.0
    k: float = 3.0

    def __post_init__(self) -> None:
        _check_range("inverse_power", self.start, self.stop)

    def __call__(self, step: int) -> float:
        tau = _progress(step, self.start, self.stop)
        return self.final + (self.initial - self.final) * math.pow(1 - tau, self.k)


@dataclass(frozen=True)
class cubic:
    """final + (initial - final)·(1 - τ)³: gradual pruning's sparsity (arXiv 1710.01878, eq. 1).

    >>> [round(cubic(0.0, 0.9, stop=4)(t), 4) for t in range(5)]
    [0.0, 0.5203, 0.7875, 0.8859, 0.9]
    """

    initial: float
    final: float
    stop: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_range("cubic", self.start, self.stop)

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1 - _progress(step, self.start, self.stop)) ** 3


@dataclass(frozen=True)
class square_wave:
    """`high` for `high_steps`, then `low` for `low_steps`, again and again from `start`; `low` from `stop` on.

    Before `start` it is `high`. AC/DC's dense and sparse phases (arXiv 2106.12379) are one.

    >>> [square_wave(1.0, 0.1, high_steps=2, low_steps=1, stop=6)(t) for t in range(8)]
    [1.0, 1.0, 0.1, 1.0, 1.0, 0.1, 0.1, 0.1]
    """

    high: float
    low: float
    high_steps: int
    low_steps: int
    stop: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_range("square_wave", self.start, self.stop)
        if self.high_steps < 1 or self.low_steps < 1:
            raise SparsityError(
                f"`square_wave` needs phases of at least one step; got high_steps={self.high_steps}, "
                f"low_steps={self.low_steps}."
            )

    def __call__(self, step: int) -> float:
        if step >= self.stop:
            return self.low
        phase = max(step - self.start, 0) % (self.high_steps + self.low_steps)
        return self.high if phase < self.high_steps else self.low


@dataclass(frozen=True)
class stages:
    """A value that changes at given steps: `values[i]` from `steps[i]` on, `values[0]` before.

    >>> [stages((0, 10, 20), (1.5, 1.25, 1.0))(t) for t in (0, 9, 10, 25)]
    [1.5, 1.5, 1.25, 1.0]
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_ascending("stages", self.steps)
        if len(self.steps) != len(self.values):
            raise SparsityError(
                f"`stages` needs a value for each of its {len(self.steps)} steps; got {len(self.values)}."
            )

    def __call__(self, step: int) -> float:
        return self.values[max(sum(t <= step for t in self.steps) - 1, 0)]


@dataclass(frozen=True)
class alternating:
    """A density that switches between 1 and the final density: dense, then sparse from the first of `steps` on, dense
    again from the second, ... (AC/DC, arXiv 2106.12379).

    >>> [alternating((2, 4, 6))(t, 0.1) for t in range(8)]
    [1.0, 1.0, 0.1, 0.1, 1.0, 1.0, 0.1, 0.1]
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_ascending("alternating", self.steps)

    def __call__(self, step: int, final: float) -> float:
        return final if sum(t <= step for t in self.steps) % 2 else 1.0


@dataclass(frozen=True)
class harmonic_like:
    """A density that falls by gradual pruning's cubic, with K regrowth waves that fade out.

    s(τ) = clip(s_f·(1 - (1 - τ)³) - A·(1 - τ)·s_f·(1 - cos(2πKτ))/2, 0, s_f), s_f = 1 - final density. The formula of
    harmonic annealing (arXiv 2503.15172) was not available; this is our choice, and no fidelity is claimed.

    >>> [round(harmonic_like(stop=8)(t, 0.1), 4) for t in (0, 4, 8)]
    [1.0, 0.2125, 0.1]
    """

    stop: int
    start: int = 0
    amplitude: float = 0.1
    waves: int = 4

    def __post_init__(self) -> None:
        _check_range("harmonic_like", self.start, self.stop)
        if not 0 <= self.amplitude <= 1 or self.waves < 0:
            raise SparsityError(
                f"`harmonic_like` needs an amplitude in [0, 1] and waves >= 0; got {self.amplitude} and {self.waves}."
            )

    def __call__(self, step: int, final: float) -> float:
        tau, sparsity = _progress(step, self.start, self.stop), 1 - final
        wave = self.amplitude * (1 - tau) * sparsity * (1 - math.cos(2 * math.pi * self.waves * tau)) / 2
        return 1 - min(max(sparsity * (1 - (1 - tau) ** 3) - wave, 0.0), sparsity)


@dataclass(frozen=True)
class ramp:
    """A density that moves from `initial` to the final density as `weight` goes from 1 to 0.

    density(step, final) = final + (initial - final)·weight(step). With weight = inverse_power(1, k=3) this is
    gradual magnitude pruning; with a square wave it is AC/DC.

    >>> ramp(linear(1.0, stop=10), initial=1.0)(5, 0.1)
    0.55
    """

    weight: Schedule
    initial: float = 1.0

    def __call__(self, step: int, final: float) -> float:
        return final + (self.initial - final) * self.weight(step)


@dataclass(frozen=True)
class UpdateSchedule:
    """On which optimizer steps masks change, and what fraction of the active weights then moves.

    Update steps are start, start + every, ... below `stop`; step 0 is the first optimizer step. `start`
    defaults to `every`. `drop_fraction` is a number in [0, 1], annealed to 0 at `stop` by a cosine from
    step 0, or any schedule.

    Differs: RigL's code counts the cosine from its begin step on and may update at step 0; pass start=0
    for the latter.

    >>> [t for t in range(10) if UpdateSchedule(every=3, stop=9).due(t)]
    [3, 6]
    """

    every: int
    stop: int
    start: int | None = None
    drop_fraction: float | Schedule = field(default=0.3)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SparsityError(f"`every` must be at least 1 optimizer step; got {self.every}.")
        _check_range("UpdateSchedule", self.first, self.stop)
        if not callable(self.drop_fraction):
            checked_fraction(self.drop_fraction)

    @property
    def first(self) -> int:
        """The first update step."""
        return self.every if self.start is None else self.start

    @property
    def last(self) -> int:
        """The last update step."""
        return self.first + (self.stop - 1 - self.first) // self.every * self.every

    def due(self, step: int) -> bool:
        """Whether masks change on this step."""
        return self.first <= step < self.stop and (step - self.first) % self.every == 0

    def fraction(self, step: int) -> float:
        """The fraction of active weights dropped on this step."""
        if not callable(self.drop_fraction):
            return cosine(self.drop_fraction, stop=self.stop)(step)
        return checked_fraction(self.drop_fraction(step), step)


@dataclass(frozen=True)
class UpdateSteps:
    """Masks change on these optimizer steps; `drop_fraction` as in `UpdateSchedule`, but without an annealing.

    >>> [t for t in range(10) if UpdateSteps((2, 7)).due(t)]
    [2, 7]
    """

    steps: tuple[int, ...]
    drop_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_ascending("UpdateSteps", self.steps)
        checked_fraction(self.drop_fraction)

    def due(self, step: int) -> bool:
        """Whether masks change on this step."""
        return step in self.steps

    def fraction(self, step: int) -> float:
        """The fraction of active weights dropped on this step."""
        return self.drop_fraction


TIMES = ("start", "stop", "steps", "high_steps", "low_steps")
PER_STEP = ("per_step",)


def check_run(method: Any, steps: int) -> None:
    """Raises where a time of the method (or schedule) lies past the end of a run of this many optimizer steps.

    A dense-to-sparse method would end denser than asked, and a drop fraction would not come to its end.

    >>> check_run(UpdateSchedule(every=10, stop=75), steps=100)
    """
    if not is_dataclass(method) or isinstance(method, type):
        return
    for item in fields(method):
        value = getattr(method, item.name)
        if item.name == "stop" and value is not None and value > steps:
            seen = f"stop={value}"
        elif item.name == "steps" and isinstance(value, tuple) and max(value) >= steps:
            seen = f"step {max(value)}"
        else:
            check_run(value, steps)
            continue
        raise SparsityError(
            f"`{type(method).__name__}` has {seen}, past the end of a run of {steps} optimizer steps. Give the method "
            "times of this run, or train longer."
        )


def scale_schedule(method: Any, k: int) -> Any:
    """The method (or schedule) for a run k times as long: all its times are multiplied, but not `every`.

    As in RigL's extended runs (arXiv 1911.11134, §4.1), where T_end grows with the run and ΔT does not, and for the
    phases of AC/DC (arXiv 2106.12379) as "Rethinking Sparse Optimization" (TMLR 2024) asks. Multiply the warm-up and
    the learning rate's schedule of the run by k, too. Rates per step are divided by k.

    >>> scale_schedule(UpdateSteps((2, 7)), 3)
    UpdateSteps(steps=(6, 21), drop_fraction=0.0)
    """
    if not isinstance(k, int) or k < 1:
        raise SparsityError(f"`scale_schedule` needs a whole number k >= 1, since times are whole steps; got {k}.")
    if not is_dataclass(method) or isinstance(method, type):
        return method
    changed: dict[str, Any] = {}
    for item in fields(method):
        value = getattr(method, item.name)
        if item.name in PER_STEP:
            scaled = value / k
        elif item.name not in TIMES:
            scaled = scale_schedule(value, k)
        elif isinstance(value, tuple):
            scaled = tuple(t * k for t in value)
        else:
            scaled = value if value is None else value * k
        if scaled is not value:
            changed[item.name] = scaled
    return replace(method, **changed) if changed else method
