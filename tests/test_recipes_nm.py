"""The N:M recipes: every variant and pattern takes steps on small data and ends exactly sparse."""

import random
import struct

import pytest
import torch

from sparselearn import NM
from sparselearn.config import build, load
from sparselearn.recipes.train import train

PATTERNS = [(2, 4), (1, 4), (1, 8), (1, 16)]
VARIANTS = ["static", "ste", "sr_ste", "mdgf", "sdgf", "rigl"]
SMALL = {
    "fashion_nm": ["batch_size=4", "max_steps=4"],
    "gpt_nm": ["data.context=8", "model.context=8", "model.depth=1", "batch_size=4", "max_steps=4"],
}


def pattern(variant, n, m):
    """The changes that the recipes' comments tell."""
    where = "method" if variant in ("sdgf", "rigl") else "method.structure"
    changes = [f"variant={variant}", f"{where}.n={n}", f"{where}.m={m}", f"sparsity={1 - n / m}"]
    return [*changes, "method.kind=geometric"] if variant == "sdgf" and n > 1 else changes


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder, choose = tmp_path_factory.mktemp("data"), random.Random(0)
    for part, n in (("train", 8), ("t10k", 4)):
        images = bytes(choose.randrange(256) for _ in range(n * 784))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28) + images)
        labels = bytes(i % 10 for i in range(n))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, n) + labels)
    (folder / "text.txt").write_text("".join(choose.choices("abcdef ", k=400)))
    return folder


def run(recipe, roots, out, *changes):
    return train(load(recipe, [f"data.root={roots}", *SMALL[recipe], *changes]), out, progress=False)


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize(
    ("variant", "n", "m"), [*(("sdgf", n, m) for n, m in PATTERNS), *((v, 1, 16) for v in VARIANTS), ("mdgf", 2, 4)]
)
def test_a_variant_ends_with_its_pattern_in_all_but_first_and_last_layers(recipe, variant, n, m, roots, tmp_path):
    often = ["method.every=1"] if variant == "rigl" else []
    result = run(recipe, roots, tmp_path, *pattern(variant, n, m), *often)
    assert result["sparsity"] == 1 - n / m
    saved = torch.load(tmp_path / "model.pt", weights_only=False)["model"]
    plain = ("0.weight", "14.weight") if recipe == "fashion_nm" else ("embedding.weight", "head.weight", "positions")
    for name, weight in saved.items():
        if weight.ndim > 1 and name not in plain:
            mask = weight != 0
            assert NM(n, m).topk(weight.abs(), NM(n, m).budget(weight.shape, 0.5)).logical_or(~mask).all(), name
        elif weight.ndim > 1:
            assert (weight != 0).all(), name


@pytest.mark.parametrize(("recipe", "size"), [("fashion_nm", 1_086_000), ("gpt_nm", 3_356_000)])
def test_the_networks_have_the_size_that_is_told(recipe, size):
    network = build("model", load(recipe).model)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(size, rel=0.002)


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pattern_of_every_variant_loads_with_its_times(recipe, variant):
    for n, m in PATTERNS:
        config = load(recipe, pattern(variant, n, m))
        assert config.sparsity == 1 - n / m
        assert config.method.get("stop", round(0.75 * config.max_steps)) == round(0.75 * config.max_steps)
        method = build("method", config.method)
        if variant in ("mdgf", "sdgf"):
            assert method.structure == NM(n, m)
            assert config.method["start"] == config.warmup
