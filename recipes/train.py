"""One training run of a recipe, with everything that it needs to be repeated, resumed and compared."""

import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import sparselearn
from sparselearn import config as configs
from sparselearn.config import Config
from sparselearn.errors import SparsityError
from sparselearn.flops import TrainingFlops, layer_flops, model_flops, stored_megabytes
from sparselearn.kernels.timing import commit
from sparselearn.lightning import SparsityCallback
from sparselearn.recipes.callbacks import LAST, SHOWN, Bookkeeping, CsvMetrics, Plain, Rich, inner
from sparselearn.recipes.data import Data
from sparselearn.sparsifier import Sparsifier


class Classifier(pl.LightningModule):
    """A network trained with cross-entropy, with the recipe's optimizer and learning-rate schedule.

    Language modelling is the same task at every position: logits [batch, positions, classes] for labels [batch,
    positions]; `test_loss` is then in nats per token, `test_accuracy` that of the next token.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.network: nn.Module = configs.build("model", config.model)
        self.config = config
        self._schedule = configs.bound("schedule", config.schedule)
        # Of training steps alone: evaluation has other batch sizes. In a tuple, so that it is no second submodule.
        mode = config.compile if isinstance(config.compile, str) else None
        self._trained = (torch.compile(self.network, mode=mode) if config.compile else self.network,)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.channels_last:  # the weights stay as they are: torch converts them, and masks cost no more
            x = x.contiguous(memory_format=torch.channels_last)
        network = self._trained[0] if self.training else self.network
        return network(x)  # type: ignore[no-any-return]

    def _loss(self, logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=label_smoothing)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        # Dropout depends on (seed, micro-batch, rank) alone, so that a resumed run draws as the whole one would have.
        seed = (self.config.seed * 1_000_003 + index) * self.config.devices + self.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks for every kind of device
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self._loss(self(batch[0]), batch[1], self.config.label_smoothing)
        # Where a logger or a progress bar looks; `prog_bar` would wait for the device.
        if (self.trainer.global_step + 1) % math.gcd(SHOWN, _logged_every(self.config)) == 0:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        logits = self(batch[0])
        self.log("test_loss", self._loss(logits, batch[1]), sync_dist=True)
        self.log("test_accuracy", (logits.argmax(-1) == batch[1]).float().mean(), prog_bar=True, sync_dist=True)

    def rate(self, step: int) -> float:
        """The learning rate's factor at an optimizer step."""
        warmup = int(self.config.warmup)
        if step < warmup:
            return (step + 1) / warmup
        return float(self._schedule(step, self.config.max_steps, warmup))

    def configure_optimizers(self) -> Any:
        parameters: list[dict[str, Any]] = [{"params": list(self.parameters())}]
        if not self.config.decay_vectors:
            parameters = [
                {"params": [p for p in self.parameters() if p.ndim > 1]},
                {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ]
        optimizer = configs.build("optimizer", self.config.optimizer, parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _logged_every(config: Config) -> int:
    """Steps between rows of a logger: 50, or fewer in a shorter run, where Lightning would warn."""
    return min(50, config.max_steps * config.accumulate)


def versions() -> dict[str, str]:
    """What the result was made with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "sparselearn": sparselearn.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "pytorch_lightning": version("pytorch-lightning"),
        "python": platform.python_version(),
        "hardware": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores",
    }


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _sparsity_callback(config: Config) -> SparsityCallback | None:
    if config.method is None:
        return None
    return SparsityCallback(
        configs.build("method", config.method),
        sparsity=config.sparsity,
        distribution=configs.bound("distribution", config.distribution),
        select=config.select,
        exclude=config.exclude,
        support=config.support,
        overrides=config.overrides,
        seed=config.seed,
        init=config.init,  # type: ignore[arg-type]
        density_scaling=config.density_scaling,
    )


def train(config: Config, out: str | Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a resolved recipe into the folder `out`; returns what it writes to result.json.

    The folder holds config.yaml (resolved), versions.json, metrics.csv, last.ckpt (Lightning's, for `resume`), model.pt
    (state dict, weights with zeros, and packed masks), result.json (written last).

    Raises:
        SparsityError: the folder holds another run, nothing to resume, missing data; see also `config.load`. A folder
            that was made for the run is removed again.
    """
    folder = Path(out)
    existed = folder.exists()
    try:
        return _train(config, folder, resume, progress)
    except SparsityError:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _train(config: Config, folder: Path, resume: bool, progress: bool) -> dict[str, Any]:
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), config.devices
    if rank == 0:  # the others are started by the first one's trainer, in the same folder
        _claim(folder, config, resume)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tensors in memory need none
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning 2.6 asks torch for its old leaf class
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hardware and advertisement, once a run
    pl.seed_everything(config.seed, verbose=False)
    device = torch.device("cuda", rank) if _on_gpu(config) else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    data: Data = configs.build("data", config.data).to(device)
    micro = config.max_steps * config.accumulate
    if config.batch_size % (config.accumulate * world):
        raise SparsityError(
            f"`batch_size` {config.batch_size} must be a multiple of accumulate x devices = "
            f"{config.accumulate * world}."
        )
    loader = data.batches(config.batch_size // config.accumulate, micro, config.seed, rank, world)
    pl.seed_everything(config.seed, verbose=False)
    module = Classifier(config)
    probe = data.example()
    _check_outputs(module.network, probe, data.classes)
    flops = TrainingFlops(layer_flops(module.network, probe), model_flops(module.network, probe))
    sparsity = _sparsity_callback(config)
    books = Bookkeeping(folder, sparsity, flops)
    callbacks: list[pl.Callback] = [books]
    if sparsity is not None:
        callbacks.insert(0, sparsity)
    if progress:
        callbacks.append(Rich() if sys.stdout.isatty() else Plain(refresh_rate=100))
    trainer = _trainer(config, folder, callbacks, micro, progress)
    previous = _on_interrupt(books)
    try:
        trainer.fit(module, loader, data.chunks(rank, world), ckpt_path=str(folder / LAST) if resume else None)
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
    if books.interrupted:
        return {"interrupted": True, "step": trainer.global_step}
    trainer.limit_val_batches = 1.0
    trainer.validate(module, data.chunks(rank, world), verbose=False)
    return _finish(folder, config, trainer, module, sparsity, books)


def _on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.accelerator in ("auto", "gpu")


def _trainer(config: Config, folder: Path, callbacks: list[pl.Callback], micro: int, progress: bool) -> pl.Trainer:
    """Lightning's trainer for `micro` micro-batches; the whole run is one of its epochs."""
    return pl.Trainer(
        max_steps=config.max_steps,
        max_epochs=1,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=min((config.eval_every or config.max_steps) * config.accumulate, micro),
        limit_val_batches=None if config.eval_every else 0,
        gradient_clip_val=config.gradient_clip_val,
        precision=config.precision,  # type: ignore[arg-type]
        devices=config.devices,
        accelerator=config.accelerator if _on_gpu(config) else "cpu",
        use_distributed_sampler=False,  # the loaders give each rank its part
        callbacks=callbacks,
        logger=CsvMetrics(folder),
        log_every_n_steps=_logged_every(config),
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # `Bookkeeping` keeps one
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _check_outputs(network: nn.Module, example: Tensor, classes: int) -> None:
    """On a GPU a label without an output is an assertion within a kernel."""
    training = network.training
    with torch.no_grad():
        outputs = network.eval()(example).shape[-1]
    network.train(training)
    if outputs < classes:
        raise SparsityError(
            f"The data has {classes} classes, but the network only {outputs} outputs. Set `model.classes=` "
            f"(`model.num_classes=` for torchvision's networks) to {classes}."
        )


def _claim(folder: Path, config: Config, resume: bool) -> None:
    """Make the folder this run's own."""
    recorded = folder / "config.yaml"
    text = configs.to_yaml(config)
    if resume and not (folder / LAST).is_file():
        raise SparsityError(f"There is nothing to resume in `{folder}`: it has no {LAST}. Start without --resume.")
    if recorded.exists() and recorded.read_text() != text and (resume or (folder / LAST).exists()):
        raise SparsityError(
            f"`{folder}` holds a run with another configuration (see its config.yaml). Choose another --out."
        )
    if not resume:
        for old in ("metrics.csv", "result.json", LAST):
            (folder / old).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write(recorded, text)
    write(folder / "versions.json", json.dumps(versions(), indent=1))


def _on_interrupt(books: Bookkeeping) -> Any:
    """The first Ctrl-C asks for a clean stop; a second one breaks off. None outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        books.stop = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    return previous


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6, 3)


def _tensors(states: Iterable[Mapping[Any, Mapping[str, Any]]]) -> Iterator[Tensor]:
    """All tensors in the states of optimizers."""
    for state in states:
        for slots in state.values():
            yield from (value for value in slots.values() if isinstance(value, Tensor))


def _latent(sparsifier: Sparsifier | None) -> list[Tensor]:
    """The dense weights that a straight-through method keeps beside the model's."""
    return [layer.dense for layer in sparsifier.state.layers.values() if layer.dense is not None] if sparsifier else []


def _finish(
    folder: Path, config: Config, trainer: pl.Trainer, module: Classifier, sparsity: SparsityCallback | None,
    books: Bookkeeping,
) -> dict[str, Any]:  # fmt: skip
    sparsifier = sparsity.sparsifier if sparsity is not None else None
    weights = {"model": module.network.state_dict(), "sparsifier": sparsifier.state_dict() if sparsifier else None}
    if trainer.is_global_zero:
        torch.save(weights, folder / "model.pt.tmp")
        (folder / "model.pt.tmp").replace(folder / "model.pt")
    test_loss = float(trainer.callback_metrics["test_loss"])
    size = sum(p.numel() for p in module.network.parameters())
    selected = sum(m.numel() for m in sparsifier.masks.values()) if sparsifier else 0
    result = {
        "recipe": config.name,
        "variant": config.variant,
        "seed": config.seed,
        "steps": trainer.global_step,
        "test_accuracy": round(float(trainer.callback_metrics["test_accuracy"]), 6),
        "test_loss": round(test_loss, 6) if math.isfinite(test_loss) else None,  # JSON has no other word for it
        "sparsity": sparsifier.sparsity if sparsifier else 0.0,
        "nnz": sparsifier.nnz + size - selected if sparsifier else size,
        "parameters": size,
        "diverged": not all(bool(torch.isfinite(p).all()) for p in module.network.parameters()),
        "training_flops": books.flops.fraction,
        "inference_flops": books.flops.forward(inner(sparsifier.densities if sparsifier else {})) / books.flops.total,
        "size_mb": stored_megabytes(module.network, inner(sparsifier.masks if sparsifier else {})),
        "parameter_mb": _megabytes([*module.parameters(), *_latent(sparsifier)]),
        "optimizer_mb": _megabytes(_tensors(optimizer.state for optimizer in trainer.optimizers)),
        "gpu_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if _on_gpu(config) else None,
        "seconds": round(books.seconds, 2),
        "examples_per_second": round(books.pace * config.batch_size, 1) if books.pace else None,
        "learning_rate": config.optimizer.get("lr"),
        "density_scaling": config.density_scaling,
        **versions(),
    }
    if trainer.is_global_zero:
        write(folder / "result.json", json.dumps(result, indent=1))
    return result
