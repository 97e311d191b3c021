"""SparsityCallback: sparse training for an unchanged LightningModule."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from sparselearn.criteria import Criterion
from sparselearn.distributions import Distribution, erk
from sparselearn.errors import SparsityError
from sparselearn.methods import DropGrow, StraightThrough
from sparselearn.optimizer import SparseOptimizer
from sparselearn.selection import Select
from sparselearn.sparsifier import Init, Sparsifier


class SparsityCallback(pl.Callback):
    """Keeps the module sparse from before the sanity check to the end of training.

    The arguments are those of `Sparsifier`. Automatic and manual optimization, several optimizers, accumulation,
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
