"""What watches a recipe's run: metrics.csv, the progress bar, and the count of operations and time."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import Logger

from sparselearn.flops import TrainingFlops, gradient_densities
from sparselearn.lightning import SparsityCallback

LAST = "last.ckpt"
SHOWN = 20  # optimizer steps between two losses in a progress bar
WARM = 10  # steps before the rate of examples is measured


class CsvMetrics(Logger):
    """Appends `step,name,value` rows to metrics.csv, so that a resumed run goes on with the same file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is in config.yaml already."""

    @pl.utilities.rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        fresh = not self.path.exists()
        with self.path.open("a") as file:
            if fresh:
                file.write("step,name,value\n")
            file.writelines(f"{step},{name},{value}\n" for name, value in metrics.items() if name != "epoch")


class _Loss:
    """A progress bar with the training loss of every SHOWN-th step; each reading waits for the device."""

    _shown: dict[str, float] | None = None

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        if trainer.global_step % SHOWN == 0 and "train_loss" in trainer.callback_metrics:
            self._shown = {"train_loss": float(trainer.callback_metrics["train_loss"])}
        return super().get_metrics(trainer, module) | (self._shown or {})  # type: ignore[misc,no-any-return]


class Rich(_Loss, RichProgressBar): ...


class Plain(_Loss, TQDMProgressBar): ...


def inner(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyed by the names within the network, not within the LightningModule."""
    return {name.removeprefix("network."): value for name, value in values.items()}


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bookkeeping(pl.Callback):
    """Counts operations and time, and keeps last.ckpt: after each evaluation, at the end, and after a Ctrl-C.

    After the first Ctrl-C training stops at the end of the optimizer step.

    `seconds` is the time within training, evaluations included. `pace` is optimizer steps per second of the training
    steps alone, from the WARM-th step of this process on; None in shorter runs.
    """

    pace: float | None = None

    def __init__(self, folder: Path, sparsity: SparsityCallback | None, flops: TrainingFlops) -> None:
        self.folder, self.sparsity, self.flops = folder, sparsity, flops
        self.stop, self.interrupted, self.seconds = False, False, 0.0
        self._counted, self._first, self._start = 0, 0, 0.0
        self._mark: tuple[int, float] | None = None  # the step from which the pace is measured, and when that was
        self._left = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counted, self._start = trainer.global_step, _now()
        self._first = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left = _now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._mark is not None:
            self._mark = (self._mark[0], self._mark[1] + _now() - self._left)
        if trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._counted:
            return  # between the micro-batches of a step
        self._counted = trainer.global_step
        self._count()
        if self._mark is None and trainer.global_step == self._first + WARM:
            self._mark = (trainer.global_step, _now())
        if self.stop and trainer.global_step < trainer.max_steps:
            self.interrupted = True
            self._save(trainer)
            trainer.should_stop = True

    def _count(self) -> None:
        sparsifier = self.sparsity.sparsifier if self.sparsity is not None else None
        if sparsifier is None:
            self.flops.step({})
            return
        step = sparsifier.step - 1  # the one that was just taken
        updated = sparsifier.last_update.get("step") == step
        gradients = gradient_densities(sparsifier.method, sparsifier.densities, step, updated)
        self.flops.step(inner(sparsifier.densities), inner(gradients))

    def _lap(self) -> None:
        now = _now()
        self.seconds, self._start = self.seconds + now - self._start, now
        if self._mark is not None and self._counted > self._mark[0]:
            self.pace = (self._counted - self._mark[0]) / (now - self._mark[1])

    def _save(self, trainer: pl.Trainer) -> None:
        """Whole or not at all: a run that is killed here can still be resumed."""
        self._lap()
        trainer.save_checkpoint(self.folder / f"{LAST}.tmp")
        if trainer.is_global_zero:
            (self.folder / f"{LAST}.tmp").replace(self.folder / LAST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.interrupted:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "spent": self.flops.spent, "steps": self.flops.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self.flops.spent, self.flops.steps = state_dict["spent"], state_dict["steps"]
