"""SparsityCallback: sparse training for an unchanged LightningModule."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from sparselearn import distributed
from sparselearn.criteria import Criterion
from sparselearn.distributions import Distribution, erk
from sparselearn.errors import SparsityError
from sparselearn.masked_model import Init
from sparselearn.methods import DropGrow, StraightThrough
from sparselearn.optimizer import SparseOptimizer
from sparselearn.selection import Select
from sparselearn.sparsifier import Sparsifier


class SparsityCallback(pl.Callback):
    """Keeps the module sparse from before the sanity check to the end of training.

    The arguments are those of `Sparsifier`, and `save`, a folder: sparse checkpoints (see `sparselearn.checkpoint`) are
    written to `last` in it at the end of training, and to `best` whenever the first ModelCheckpoint with a `monitor`
    saves its best model so far. They hold the weights that validation used: of the average, with WeightAveraging. While
    a decaying method still uses weights outside of its masks, a warning takes the place of the checkpoint.

    Automatic and manual optimization, several optimizers, accumulation,
    16-mixed, bf16-mixed, `gradient_clip_val` (masked gradients are clipped), DDP, `ckpt_path=` resume and
    WeightAveraging (its average has the same zeros) need nothing more. `sparsity/*` metrics go to every logger, at the
    start and at each mask update. With manual optimization, clip after `callback.sparsifier.before_step(optimizer)`.

    After `fit` has begun `sparsifier` holds masks, `summary()` and counts. The callback may be used for another model
    afterwards; `detach()` lets go of the last one.

    Raises:
        SparsityError: as `Sparsifier`; no optimizer trains a sparse weight; an optimizer is a SparseOptimizer already.

    Example:
        trainer = pl.Trainer(callbacks=[SparsityCallback(sl.rigl(stop=7500), sparsity=0.9)])
    """

    def __init__(
        self,
        method: DropGrow | StraightThrough,
        *,
        sparsity: float | None = None,
        distribution: Distribution = erk,
        select: Select = None,
        exclude: Iterable[str] = (),
        overrides: Mapping[str, float] | None = None,
        seed: int = 0,
        support: float | Mapping[str, Tensor] | None = None,
        initial: Criterion | None = None,
        init: Init | None = None,
        density_scaling: bool = False,
        save: str | Path | None = None,
    ) -> None:
        self.sparsifier: Sparsifier | None = None
        self._method = method
        self._options: dict[str, Any] = {
            "sparsity": sparsity,
            "distribution": distribution,
            "select": select,
            "exclude": exclude,
            "overrides": overrides,
            "seed": seed,
            "support": support,
            "initial": initial,
            "init": init,
            "density_scaling": density_scaling,
        }
        self._module: nn.Module | None = None
        self._saved: dict[str, Any] | None = None  # a state that arrived before there was a sparsifier
        self._hooks: list[Any] = []
        self._averages: list[WeightAveraging] = []
        self._folder = None if save is None else Path(save)
        self._best: tuple[str, float | None] = "", None  # path and score of the best model that is saved

    # ---- life ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if self._module is pl_module and self.sparsifier is not None and self._saved is None:
            return  # fit goes on with the same model
        self.sparsifier = Sparsifier(pl_module, self._method, **self._options, state_dict=self._saved)
        self._module = pl_module
        self.sparsifier.on_update(self._mask_averages)
        for callback in self._averages:  # copied from the module when it was dense; validation uses it at once
            average = callback._average_model
            if self._saved is None and average is not None and average.n_averaged == 0:
                average.module.load_state_dict(pl_module.state_dict())
        self._mask_averages()
        self._saved = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sparsifier = self._bound()
        if self._saved is not None:  # sharded strategies restore callbacks only now
            sparsifier.load_state_dict(self._saved)
            self._saved = None
        self._best = _best(trainer)
        self._remove_hooks()
        self._refuse_clipping(trainer)
        trained = False
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SparseOptimizer):
                raise SparsityError(
                    "`configure_optimizers` returned a SparseOptimizer and the trainer has a SparsityCallback. "
                    "Use one of them: return the base optimizer, or drop the callback."
                )
            if not sparsifier.trains(optimizer):
                continue
            trained = True
            self._refuse_fused_scaler(trainer, optimizer)
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        if not trained:
            raise SparsityError(
                "No optimizer of the module trains a sparse weight. Check `configure_optimizers`, `select` and "
                "`exclude`."
            )
        self._log(trainer)

    def _refuse_clipping(self, trainer: pl.Trainer) -> None:
        if trainer.gradient_clip_val is None:
            return
        if self._method.skip_step and trainer.gradient_clip_algorithm == "value":
            raise SparsityError(
                "gradient_clip_algorithm='value' fails on a step without gradients, and this method's updates take the "
                "place of the step. Clip by norm, or pass skip_step=False to the method."
            )
        if getattr(self._method, "penalty_after_clip", False):
            raise SparsityError(
                "This method adds its penalty after clipping, and the trainer clips after its callbacks. Leave out "
                "`gradient_clip_val`, or use SparseOptimizer in a loop of your own."
            )

    def _refuse_fused_scaler(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False) and self._method.skip_step:
            raise SparsityError(
                "A fused optimizer under 16-mixed needs a gradient on every step, but this method's updates take "
                "the place of the step. Pass fused=False to the optimizer or skip_step=False to the method, or use "
                "bf16-mixed."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)
        self._remove_hooks()
        self._save(trainer, pl_module, "last")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_skipped(trainer)
        self._remove_hooks()
        self._saved = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()
        self._averages = []
        if self._saved is not None:  # a validation or test loaded a checkpoint
            if self._module is pl_module:
                self._bound().load_state_dict(self._saved)
            self._saved = None

    def detach(self) -> None:
        """Forget the model; the next `fit` starts anew. The model stays as sparse as it is."""
        self._remove_hooks()
        self.sparsifier, self._module, self._saved, self._averages = None, None, None, []
        for name in ("log", "log_dict"):  # methods of the model, which the trainer puts on every callback
            self.__dict__.pop(name, None)

    def _bound(self) -> Sparsifier:
        if self.sparsifier is None:
            raise SparsityError("SparsityCallback has no sparsifier yet: it is built when `trainer.fit` starts.")
        return self.sparsifier

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- one step ------------------------------------------------------------------------------------------

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._bound().before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is told of an overflow by GradScaler and skips by itself.
        skipped = bool(getattr(optimizer, "found_inf", None))
        if self._bound().in_step(optimizer):
            self._bound().after_step(optimizer, stepped=not skipped)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close_skipped(trainer)
        if self._bound().last_update.get("step") == self._bound().step - 1:
            self._log(trainer)

    def _close_skipped(self, trainer: pl.Trainer) -> None:
        for optimizer in trainer.optimizers:  # GradScaler skipped the step: the post hook did not run
            if self.sparsifier is not None and self.sparsifier.in_step(optimizer):
                self.sparsifier.after_step(optimizer, stepped=False)

    def _mask_averages(self) -> None:
        for callback in self._averages:
            average = callback._average_model  # no public name; tests/test_lightning.py notices if it goes
            if average is not None:
                self._bound().apply_masks(average)

    def _log(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self._bound().metrics(), step=trainer.global_step)

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A straight-through method goes on from its dense weights, so the checkpoint holds those."""
        if self.sparsifier is not None and self._module is pl_module and "state_dict" in checkpoint:
            checkpoint["state_dict"] |= self.sparsifier.dense_state(checkpoint["state_dict"])
        if self._hooks and (best := _best(trainer)) != self._best:  # in training; it is known before it is written
            self._best = best
            self._save(trainer, pl_module, "best")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        """Write a sparse checkpoint, where one is wanted; called by all processes."""
        if self._folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from sparselearn.checkpoint import save  # here, since few need safetensors

        averages = (callback._average_model for callback in self._averages)
        model = next((average.module for average in averages if average is not None), pl_module)
        if self._uses_inactive(model):
            warnings.warn(
                f"The sparse checkpoint `{self._folder / name}` was not written: the model still uses "
                "weights outside of its masks. Train until the method's decay has ended.",
                stacklevel=2,
            )
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        position = {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
        save(model, self._folder / name, masks=self._bound(), metadata=position)
        trainer.strategy.barrier("sparse checkpoint")

    def _uses_inactive(self, model: nn.Module) -> bool:
        weights = dict(model.named_parameters(remove_duplicate=False))
        layers = self._bound().state.layers
        used = any(
            bool(distributed.local(weights[name].detach())[distributed.local(layer.inactive)].any())
            for name, layer in layers.items()
        )
        return distributed.any_rank(used, next(iter(weights.values())).device)


def _best(trainer: pl.Trainer) -> tuple[str, float | None]:
    """Path and score of the best model of the first ModelCheckpoint that has a monitor."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not savers or savers[0].best_model_score is None:
        return "", None
    return savers[0].best_model_path, float(savers[0].best_model_score)
