"""The `sparselearn` command: texts, exit codes, and one small run of each kind."""

import json
import subprocess
import sys

import pytest

from sparselearn import __version__
from sparselearn.cli import main
from sparselearn.recipes import data

SMALL = ["max_steps=50", "method.every=10", "eval_every=0"]


def test_help_has_examples(capsys):
    for command, example in [
        ([], "sparselearn sweep digits variant=dense,static,rigl seed=0,1,2 --out runs/digits"),
        (["train"], "sparselearn train fashion_mnist variant=set method.every=200 seed=1 --out runs/set --resume"),
        (["sweep"], "sparselearn sweep digits variant=dense,static,rigl"),
        (["recipes"], "sparselearn recipes"),
    ]:
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        assert example in capsys.readouterr().out


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "usage: sparselearn" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_recipes_lists_all_with_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[::2]]
    assert names == sorted(names)
    assert {"digits", "fashion_mnist", "cifar10_resnet18", "gpt_bytes"} <= set(names)
    assert all("variants: dense, static, " in line and "rigl" in line for line in lines[1::2])


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom sparselearn.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('pytorch_lightning', 'omegaconf', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, capsys):
    assert main([command, "digits", "sparsty=0.9", "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: `digits.yaml`: unknown key `sparsty`. Closest: `sparsity`, `support`, `variant`.\n"
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["exclude=[networc.*]"],
            "`exclude` pattern 'networc.*' matched no parameter. Closest names: ",
        ),
        (["batch_size=1500"], "`batch_size` is 1500, but there are only 1437 training examples."),
        (["accumulate=3"], "`batch_size` 64 must be a multiple of accumulate x devices = 3."),
    ],
)
def test_a_mistake_that_shows_later_leaves_nothing_behind(changes, line, tmp_path, capsys):
    assert main(["train", "digits", *SMALL, *changes, "--quiet", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
    assert not (tmp_path / "run").exists()


def test_missing_data_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "nowhere")
    assert main(["train", "fashion_mnist", "data.root=elsewhere", "--quiet", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: Fashion-MNIST's `train-images-idx3-ubyte` was not found under `elsewhere`. Let torchvision fetch it "
        "with `data.download=true`, point `data.root=` to it, or run `apt-get install dataset-fashion-mnist`."
    )


def test_nothing_to_resume(tmp_path, capsys):
    assert main(["train", "digits", *SMALL, "--quiet", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "error: There is nothing to resume in" in capsys.readouterr().err


def test_train_and_keys_after_an_option(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "digits", "--out", str(out), "--quiet", *SMALL, "seed=3"]) == 0
    assert "sparsity 89.998 %, 2,852 of 26,122 parameters nonzero" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["seed"] == 3


def test_an_unknown_option_is_refused(tmp_path):
    for words in (["train", "digits", "--nonsense"], ["recipes", "a=1"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2


def test_a_failed_run_of_a_parallel_sweep_is_one_line(tmp_path, capsys):
    # The network does not fit the data: the run itself fails, in its own process.
    grid = ["sweep", "digits", "variant=dense", "max_steps=50", "model.sizes=[3,10]"]
    assert main([*grid, "--jobs", "2", "--quiet", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: The run `variant=dense,max_steps=50,")
