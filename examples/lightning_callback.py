"""The same with Lightning: the module knows nothing of sparsity. python examples/lightning_callback.py"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparselearn as sl
from sparselearn.lightning import SparsityCallback


class Digits(pl.LightningModule):
    """An ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 600) -> float:
    """Trains and returns the test accuracy."""
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    data = DataLoader(TensorDataset(x[:1437], y[:1437]), batch_size=64, shuffle=True)

    sparsity = SparsityCallback(sl.rigl(stop=int(0.75 * steps), every=25), sparsity=0.9, density_scaling=True)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[sparsity], gradient_clip_val=1.0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    model = Digits()
    trainer.fit(model, data)

    accuracy = float((model.net(x[1437:]).argmax(1) == y[1437:]).float().mean())
    assert sparsity.sparsifier is not None  # it is there once `fit` has begun
    print(sparsity.sparsifier.summary())
    print(f"test accuracy {accuracy:.3f} at sparsity {sparsity.sparsifier.sparsity:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
