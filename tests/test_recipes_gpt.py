"""The GPT recipe on a small generated text: it learns what a count of bytes cannot know, and resumes exactly."""

import collections
import math
import random
import signal

import pytest
import torch

from sparselearn.config import load
from sparselearn.recipes.train import Classifier, train

TINY = [
    "data.context=16", "model.context=16", "model.width=32", "model.depth=2", "model.heads=2", "batch_size=32",
    "max_steps=120", "eval_every=60", "optimizer.lr=0.003",
]  # fmt: skip
WORDS = ["sparse ", "dense ", "mask ", "grow ", "drop "]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, choose = tmp_path_factory.mktemp("text"), random.Random(0)
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("".join(choose.choices(WORDS, k=2000)))
    return folder


def run(root, out, *changes, resume=False):
    return train(load("gpt_bytes", [f"data.root={root}", *TINY, *changes]), out, resume=resume, progress=False)


def unigram_entropy(root):
    """Nats per byte of the best guess that does not look at the past."""
    counts = collections.Counter(b"".join(path.read_bytes() for path in root.glob("*.txt")))
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


@pytest.mark.parametrize("variant", ["dense", "rigl"])
def test_gpt_learns_more_than_the_frequencies_of_bytes(root, tmp_path, variant):
    result = run(root, tmp_path, f"variant={variant}", *(["method.every=20"] if variant == "rigl" else []))
    entropy = unigram_entropy(root)
    assert 2 < entropy < 3
    assert result["test_loss"] < 0.6 * entropy
    assert math.log(5) / 6 < result["test_loss"]  # nothing beats the entropy of a word, spread over its bytes
    assert result["test_accuracy"] > 0.5
    assert result["sparsity"] == pytest.approx(0.8 if variant == "rigl" else 0.0, abs=1e-3)


def test_an_interrupted_run_goes_on_exactly(root, tmp_path, monkeypatch):
    changes = ["max_steps=12", "eval_every=0", "method.every=4", "accumulate=2", "model.dropout=0.1", "model.tied=true"]
    whole = run(root, tmp_path / "whole", *changes)
    with monkeypatch.context() as patch:
        original, seen = Classifier.training_step, []

        def step(self, *args):
            seen.append(0)
            if len(seen) == 5:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args)

        patch.setattr(Classifier, "training_step", step)
        assert run(root, tmp_path / "part", *changes)["interrupted"]
    resumed = run(root, tmp_path / "part", *changes, resume=True)
    a, b = (torch.load(tmp_path / n / "model.pt", weights_only=False)["model"] for n in ("whole", "part"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole["test_loss"] == resumed["test_loss"]


def test_the_reported_loss_is_the_saved_models(root, tmp_path):
    result = run(root, tmp_path, "max_steps=10", "eval_every=0", "variant=static")
    config = load("gpt_bytes", [f"data.root={root}", *TINY, "variant=static"])
    module = Classifier(config).eval()
    module.network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=False)["model"])
    from sparselearn.recipes.data.text import text_bytes

    split = text_bytes(str(root), context=16)
    with torch.no_grad():
        logits = module(split.test_x).double()
    chosen = logits.log_softmax(-1).gather(-1, split.test_y.unsqueeze(-1))
    assert result["test_loss"] == pytest.approx(-chosen.mean().item(), abs=1e-5)
    assert result["test_accuracy"] == pytest.approx(
        (logits.argmax(-1) == split.test_y).double().mean().item(), abs=1e-6
    )
