"""The benchmarks of condensed layers compare like with like, and their picture shows what the table says."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sparselearn.kernels.condensed import bench, bench_train, plot
from sparselearn.recipes.bench_condensed import METHODS, Run, state_bytes, summary


@pytest.mark.parametrize("method", METHODS)
def test_masked_and_condensed_training_differ_by_rounding(method: str) -> None:
    args = Namespace(seed=[0], method=[method], sparsity=[0.9], lr=1e-3)
    runs = {form: Run(form, args, 120, 40) for form in ("masked", "condensed")}
    for step in range(110):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 784, generator=g), torch.randint(10, (16,), generator=g)
        for run in runs.values():
            run.step(step, x, y)
    masked, condensed = runs["masked"], runs["condensed"]
    for layer in (0, 2):
        assert torch.equal(condensed.model[layer].mask, masked.sparsifier.masks[f"{layer}.weight"])
    torch.testing.assert_close(condensed.model(x), masked.model(x), atol=1e-2, rtol=1e-2)
    held = [state_bytes(run.model, run.base, run.sparsifier) for run in (masked, condensed)]
    assert held[1] < 0.25 * held[0]


def test_summary_by_hand() -> None:
    line = {"method": "srigl", "sparsity": 0.95, "state_mb": 1.0, "training_mb": 5.0}
    table = [
        line | {"form": "masked", "step_ms": 8.0, "test_accuracy": 0.5},
        line | {"form": "condensed", "step_ms": 2.0, "test_accuracy": 0.6},
    ]
    assert list(summary(table))[1] == (
        "srigl at 95%, condensed: accuracy 0.6000, 2.00 ms a step, 4.00x masked's speed, 5 MB for training, "
        "state 1.0 MB"
    )


def test_inference_and_training_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layer", "40x30", "30x40", "--sparsity", "0.9", "--batch", "1", "8", "--threads", "1", "--rounds", "3"]
    bench.main([*small, "--out", str(tmp_path / "table.csv")])
    assert "90%, batch 1, condensed over dense" in capsys.readouterr().out
    plot.main([str(tmp_path / "table.csv")])
    picture = (tmp_path / "table.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000
    bench_train.main(
        ["--sizes", "20", "30", "30", "4", "--sparsity", "0.9", "--batch", "8", "--threads", "1", "--rounds", "3",
         "--out", str(tmp_path / "train.csv")]
    )  # fmt: skip
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 6


def test_the_picture_shows_medians_over_layers() -> None:
    table = [
        {"sparsity": "0.9", "method": "condensed", "threads": threads, "batch": batch, "over_dense": value}
        for threads, batch, value in [
            ("1", "8", "2"),
            ("1", "8", "9"),
            ("1", "8", "4"),
            ("2", "8", "1"),
            ("1", "1", "5"),
        ]
    ]
    assert plot.medians(table, "0.9", "condensed") == {1: 5.0, 8: 4.0}
    assert plot.medians(table, "0.95", "condensed") == {}
