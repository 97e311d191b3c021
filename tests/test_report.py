"""`sparselearn report`: the page is sound and loads nothing, its numbers are the run's, and wrong folders are named."""

import argparse
import json
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml

from sparselearn import SparsityError
from sparselearn.config import load
from sparselearn.recipes import report_layers, report_masks, report_runs, report_style
from sparselearn.recipes.report import add_command, command, report
from sparselearn.recipes.train import train
from sparselearn.state import pack

VOID = {"meta", "br", "img", "link", "input", "hr"}
MASKED = [f"sparsity/{name}" for name in ("churn", "survival", "exploration_rate", "gradient_norm", "dead_neurons")] + [
    f"sparsity/density/network.{layer}.weight" for layer in (0, 2)
]
ALL = {"accuracy", "loss", "cost", "churn", "exploration", "gradient-norm", "densities", "fan-out", "masks",
       "layer-densities", "dead-by-layer", "dead-neurons", "weights"}  # fmt: skip


def masks_of(density=0.25, seed=0, shapes=((8, 16), (4, 8))):
    generator = torch.Generator().manual_seed(seed)
    return {f"{2 * i}.weight": torch.rand(s, generator=generator) < density for i, s in enumerate(shapes)}


def saved(masks, weights=None):
    """model.pt of a network with these masks, and its weights."""
    weights = weights or {name: torch.randn(mask.shape) * mask for name, mask in masks.items()}
    layers = {
        f"network.{name}": {"shape": list(mask.shape), "mask": pack(mask), "nnz": int(mask.sum())}
        for name, mask in masks.items()
    }
    return {"model": weights, "sparsifier": {"version": 1, "seed": 0, "layers": layers} if layers else None}


def make(folder, *, masks=None, metrics=MASKED, config=None, facts=None, finished=True, weights=None):
    """A run folder as training leaves it, with known numbers; `masks={}` is a dense run."""
    folder.mkdir(parents=True)
    masks = masks_of() if masks is None else masks
    settings = {"name": "digits", "variant": "rigl", "seed": 3, "max_steps": 40, "description": "a test",
                "data": {"fn": "sparselearn.recipes.data.digits"}, "model": {"fn": "x"}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    (folder / "versions.json").write_text(json.dumps({"hardware": "a CPU", "commit": "c0ffee"}))
    rows = ["step,name,value"]
    for step in (10, 20, 40):
        rows += [f"{step},train_loss,{1 / step}", f"{step},test_accuracy,{step / 50}"]
        rows += [f"{step},{name},{0.01 * step}" for name in metrics]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if finished:
        contents = saved(masks, weights)
        torch.save(contents, folder / "model.pt")
        size = sum(w.numel() for w in contents["model"].values()) + 12  # and biases
        nnz = size - sum(int((~mask).sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        result = {"test_accuracy": 0.975, "sparsity": 1 - (nnz - size + total) / total if total else 0.0, "nnz": nnz,
                  "parameters": size, "training_flops": 0.10401540154015401, "seconds": 61.25, "steps": 40,
                  "diverged": False, "hardware": "a CPU", "commit": "c0ffee"}  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result | (facts or {})))
    return folder


class Page(HTMLParser):
    """Checks that every tag is closed where it should be, and collects what a test asks for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.figures, self.cells = [], [], [], "", [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "figure":
            self.figures.append(dict(attrs)["id"])
        if tag == "td":
            for key, value in attrs:
                self.cells.setdefault(key, []).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A report of a dense and a sparse run."""
    folder = tmp_path_factory.mktemp("two")
    runs = [make(folder / "dense", masks={}, metrics=[], weights=saved(masks_of())["model"]), make(folder / "rigl")]
    return runs, report(runs, folder / "deep" / "report.html", png=True)


# ---- the page ------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(two):
    text = two[1].read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "foreignobject"} & set(page.tags)
    links = [value for key, value in page.attributes if key in ("href", "src", "xlink:href", "srcset", "action")]
    assert links  # the pictures of masks
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_ids_are_unique_and_every_reference_has_one(two):
    text = two[1].read_text()
    ids = [value for key, value in Page(text).attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_every_picture_has_its_place_a_line_and_a_description(two):
    text = two[1].read_text()
    page = Page(text)
    assert set(page.figures) == ALL
    assert page.tags.count("figcaption") == page.tags.count("svg") == len(ALL)
    described = [value for key, value in page.attributes if key == "aria-label"]
    assert len(described) == len(ALL)
    assert any("rigl, test_accuracy: 80.00 % at step 40" in text for text in described)


def test_pngs_lie_beside_the_file(two):
    out = two[1]
    assert {path.name for path in out.parent.glob("*.png")} == {f"report-{name}.png" for name in ALL}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.parent.glob("*.png"))


def test_a_picture_appears_where_its_data_exist(tmp_path):
    dense = make(tmp_path / "dense", masks={}, metrics=[], weights=saved(masks_of())["model"])
    assert set(Page(report([dense], tmp_path / "a.html").read_text()).figures) == {
        "accuracy",
        "loss",
        "cost",
        "weights",
    }
    old = make(tmp_path / "old", metrics=["sparsity/grown_fraction"])
    figures = set(Page(report([old], tmp_path / "b.html").read_text()).figures)
    assert figures == ALL - {"exploration", "gradient-norm", "densities", "dead-neurons"}
    extra = make(tmp_path / "extra", metrics=["sparsity/flips"])
    assert "others" in Page(report([extra], tmp_path / "c.html").read_text()).figures


def test_the_numbers_of_the_table_are_those_of_the_result(two):
    page = Page(two[1].read_text())
    results = [json.loads((run / "result.json").read_text()) for run in two[0]]
    for key in ("test_accuracy", "sparsity", "nnz", "parameters", "training_flops", "seconds"):
        assert [float(v) for v in page.cells[f"data-{key.replace('_', '-')}"]] == [r[key] for r in results]
    assert page.cells["data-hardware"] == ["a CPU"] * 2
    assert page.cells["data-commit"] == ["c0ffee"] * 2
    assert "97.50 %" in page.text
    assert f"{100 * results[1]['sparsity']:.4f} %" in page.text
    assert "0.104 × dense" in page.text
    assert "1 min 01 s" in page.text


def test_a_run_keeps_its_colour_in_every_picture(two):
    text = two[1].read_text()
    figures = dict(re.findall(r"<figure class='[^']*' id='([^']*)'>(.*?)</figure>", text, re.S))
    assert "--run1" in figures["churn"]  # the dense run has none, and the other one is still the second
    assert "--run0" not in figures["churn"]
    assert all(name in figures["accuracy"] for name in ("--run0", "--run1", ">dense<", ">rigl<"))


def test_everything_from_files_is_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>&'\"$_{"
    masks = {f"a{evil}.weight": mask for mask in masks_of().values()}
    folders = [
        make(tmp_path / name, masks=masks, metrics=[f"sparsity/{evil}", f"sparsity/density/{evil}", f"{evil}loss"],
             config={"name": evil, "description": evil, "variant": evil, "seed": evil, name: evil},
             facts={"hardware": evil, "commit": evil})
        for name in (evil, f"_{evil}")
    ]  # fmt: skip
    text = report(folders, tmp_path / "out.html").read_text()
    page = Page(text)
    assert "<img" not in text
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.text.count(evil) > 10
    assert page.cells["data-hardware"] == [evil, evil]


def test_more_runs_than_colours(tmp_path):
    runs = [make(tmp_path / f"run{i}", masks=masks_of(seed=i), metrics=[]) for i in range(9)]
    text = report(runs, tmp_path / "out.html").read_text()
    assert "The first 4 of 9 runs." in Page(text).text
    assert report_style.color(8) == report_style.color(0)
    assert report_style.dash(8) != report_style.dash(0)


# ---- reading -------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_reported_as_far_as_it_is(tmp_path):
    folder = make(tmp_path / "run", finished=False)
    with (folder / "metrics.csv").open("a") as file:
        file.write("45,train_lo")  # training writes at this moment
    page = Page(report([folder], tmp_path / "a.html").read_text())
    assert "run is not finished: logged up to step 40 of 40; it has no checkpoint yet." in page.text
    assert "unfinished" in page.text
    assert "masks" not in page.figures
    contents = saved(masks_of())
    state = {f"network.{name}": w for name, w in contents["model"].items()}
    torch.save({"state_dict": state, "callbacks": {"SparsityCallback": contents["sparsifier"]}}, folder / "last.ckpt")
    page = Page(report([folder], tmp_path / "b.html").read_text())
    assert {"masks", "weights", "fan-out"} <= set(page.figures)


def test_different_recipes_are_shown_with_a_warning(tmp_path):
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", config={"name": "other", "max_steps": 80}, facts={"hardware": "a GPU", "diverged": True})
    text = Page(report([a, b], tmp_path / "out.html").read_text()).text
    assert "different recipes (digits, other)" in text
    assert "different numbers of steps (40, 80)" in text
    assert "different hardware" in text
    assert "b diverged" in text


def test_a_step_that_was_repeated_after_a_resume_counts_once(tmp_path):
    folder = make(tmp_path / "run")
    with (folder / "metrics.csv").open("a") as file:
        file.write("20,train_loss,7.5\n30,train_loss,nan\n")
    values = report_runs.read_run(folder, "run").series["train_loss"]
    assert list(values) == [10, 20, 30, 40]
    assert values[20] == 7.5
    report([folder], tmp_path / "out.html")  # a gap, no error


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def flip_a_bit(folder):
    contents = torch.load(folder / "model.pt", weights_only=True)
    contents["sparsifier"]["layers"]["network.0.weight"]["mask"][0] ^= 1
    torch.save(contents, folder / "model.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "metrics.csv").unlink(), r"metrics\.csv` is missing: a run without metrics"),
        (replace("metrics.csv", ""), r"metrics\.csv` is empty"),
        (replace("metrics.csv", "a,b\n"), r"line 1 must be the header `step,name,value`; it is \['a', 'b'\]"),
        (edit("metrics.csv", "0.8\n", "0.8x\n"), r"line 21 must be `step,name,value` with numbers; it is \['40'"),
        (edit("metrics.csv", "10,train", "ten,train"), r"line 2 must be `step,name,value` with numbers"),
        (edit("metrics.csv", "10,train_loss,0.1", "10,train_loss"), r"line 2 must be"),
        (replace("result.json", "{"), r"result\.json` cannot be read"),
        (replace("result.json", "[1]"), r"result\.json` must hold keys and values; it holds list"),
        (edit("result.json", "0.975", '"good"'), r"`test_accuracy` must be a number; it is 'good'"),
        (edit("result.json", '"nnz": ', '"nnz": 1'), r"nonzero parameters, but the masks in model\.pt make"),
        (replace("config.yaml", "a: [1"), r"config\.yaml` cannot be read"),
        (replace("model.pt", "not a zip"), r"model\.pt` cannot be read"),
        (flip_a_bit, r"`network\.0\.weight` has \d+ active weights, \d+ were recorded"),
    ],
)  # fmt: skip
def test_a_damaged_file_gives_one_clear_error(damage, message, tmp_path):
    folder = make(tmp_path / "run")
    damage(folder)
    with pytest.raises(SparsityError, match=message) as error:
        report([folder], tmp_path / "out.html")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.html").exists()


def test_folders_that_are_no_runs(tmp_path):
    run = make(tmp_path / "sweep" / "a")
    out = tmp_path / "out.html"
    for folders, message in [
        ([], "needs at least one run"),
        ([tmp_path / "nothing"], "There is no folder"),
        ([tmp_path / "sweep"], r"is no run: it has no config.yaml.* It holds 1 runs: write `.*sweep/\*/` for all"),
        ([run, run], "was given twice"),
    ]:
        with pytest.raises(SparsityError, match=message):
            report(folders, out)
    with pytest.raises(SparsityError, match="must name a file"):
        report([run], tmp_path)
    with pytest.raises(SparsityError, match=r"`--layer` '1.\*' matched no masked layer of these runs. Closest: "):
        report([run], out, layers=["1.*"])


def test_code_in_a_model_file_is_not_run(tmp_path):
    folder = make(tmp_path / "run")
    torch.save({"model": argparse.Namespace(), "sparsifier": None}, folder / "model.pt")
    with pytest.raises(SparsityError, match=r"model\.pt` cannot be read"):
        report([folder], tmp_path / "out.html")


# ---- what the pictures are made of ---------------------------------------------------------------------------


def run_with(tmp_path, masks, **options):
    return report_runs.read_run(make(tmp_path / "run", masks=masks, **options), "run")


def test_numbers_that_a_run_lacks_are_left_open(tmp_path):
    """A diverged run has no loss, a run on a CPU no GPU memory."""
    run = make(tmp_path / "run", facts={"test_loss": None, "gpu_mb": None, "size_mb": 1.5, "diverged": True})
    page = Page(report([run], tmp_path / "out.html").read_text())
    assert page.cells["data-size-mb"] == ["1.5"]
    assert "data-test-loss" not in page.cells
    assert "1.500 MB" in page.text


def test_unused_inputs_by_hand():
    mask = torch.zeros(2, 3, 2, 1, dtype=torch.bool)
    mask[1, 0, 1] = mask[0, 2, 0] = True
    assert report_layers.unused(mask) == 1


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "h.0.attn.c_attn.weight", "attn.qkv.weight"])
def test_densities_of_packed_heads_by_hand(name, tmp_path):
    mask = torch.zeros(12, 2, dtype=torch.bool)  # three parts of 2 heads of 2 rows, 4 weights a head
    mask[0] = mask[2, 1] = mask[7] = mask[10:] = True
    run = run_with(tmp_path, {name: mask}, config={"model": {"fn": "x", "heads": 2}})
    heads = report_masks.head_densities(run)
    assert {part: values.tolist() for part, values in heads.items()} == {
        "query": [[0.5, 0.25]], "key": [[0.0, 0.5]], "value": [[0.0, 1.0]]
    }  # fmt: skip


def test_densities_of_separate_heads_by_hand(tmp_path):
    masks = {f"l.{i}.{p}_proj.weight": torch.ones(4, 4).bool() for i in range(2) for p in "qkv"}
    masks["l.1.k_proj.weight"] = torch.tensor([[1, 1, 0, 0]] * 2 + [[0] * 4] * 2).bool()
    masks["l.0.up_proj.weight"] = torch.ones(4, 4).bool()
    heads = report_masks.head_densities(run_with(tmp_path, masks, config={"model": {"num_heads": 2}}))
    assert heads["key"].tolist() == [[1, 1], [0.5, 0]]
    assert heads["query"].tolist() == heads["value"].tolist() == [[1, 1], [1, 1]]
    assert "attention" in Page(report([tmp_path / "run"], tmp_path / "o.html").read_text()).figures


def test_fan_out_counts_every_channel(tmp_path):
    mask = torch.zeros(2, 48, dtype=torch.bool)  # 3 channels of 4 x 4
    mask[:, 5] = mask[0, 16 + 5] = mask[1, 32] = True
    picture = report_masks.fan_out([run_with(tmp_path, {"0.weight": mask})])
    assert "run: 0 to 3 weights a pixel, mean 0.2, 0.8 in the middle" in picture.alt


def test_only_images_are_drawn_as_images(tmp_path):
    run = run_with(tmp_path, masks_of(), config={"data": {"fn": "sparselearn.recipes.data.table"}})
    assert report_masks.fan_out([run]) is None


def test_filters_show_sign_size_and_mask():
    weight = torch.tensor([[[[0.5, -1.0], [0.0, 0.3]]], [[[0.2, 0.0], [0.0, 0.0]]]])
    mask = torch.tensor([[[[1, 1], [0, 1]]], [[[1, 0], [0, 0]]]]).bool()
    picture = report_masks._filters(weight, mask)
    assert picture.shape in ((5, 2, 4), (2, 5, 4))
    blue, orange = report_style.tint(torch.ones(1, 1).numpy())[0, 0], picture[0, 1]
    assert picture[0, 0, :3].tolist() == blue[:3].tolist()
    assert picture[0, 0, 3] == pytest.approx(0.12 + 0.88 * 0.5)
    assert orange[3] == pytest.approx(1)
    assert orange[0] > orange[2]  # more red than blue
    assert picture[1, 0].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.22])


def test_first_filters_of_a_convolution(tmp_path):
    folder = make(tmp_path / "run", masks=masks_of(shapes=((6, 3, 3, 3), (4, 6, 3, 3))))
    figures = Page(report([folder], tmp_path / "out.html").read_text()).figures
    assert "first-filters" in figures
    assert "fan-out" not in figures


def test_default_layers_are_sparse_ones(tmp_path):
    masks = masks_of(shapes=((4, 4), (4, 5), (9, 9), (4, 6), (4, 4)))
    masks["0.weight"] = torch.ones(4, 4).bool()
    run = run_with(tmp_path, masks)
    assert report_masks.choose([run], []) == ["2.weight", "4.weight", "8.weight"]
    assert report_masks.choose([run], ["[06].*", "0.weight"]) == ["0.weight", "6.weight"]


def test_names_and_differences(tmp_path):
    a, b = make(tmp_path / "x" / "rigl"), make(tmp_path / "y" / "rigl", config={"optimizer": {"lr": 0.1}, "seed": 4})
    runs = report_runs.read_runs([a, b])
    assert [run.label for run in runs] == ["x/rigl", "y/rigl"]
    assert report_runs.differences(runs) == {"seed": ["3", "4"], "optimizer.lr": ["–", "0.1"]}


# ---- a real run ----------------------------------------------------------------------------------------------


def test_the_command_on_a_real_run(tmp_path, capsys):
    result = train(
        load("digits", ["max_steps=50", "method.every=5", "eval_every=25"]), tmp_path / "run", progress=False
    )
    parser = argparse.ArgumentParser()
    parser_of = add_command(parser.add_subparsers(dest="command"))
    assert "sparselearn report runs/" in parser_of.format_help()
    out = tmp_path / "r.html"
    assert command(parser.parse_args(["report", str(tmp_path / "run"), "--out", str(out), "--layer", "0.*"])) == 0
    assert str(out) in capsys.readouterr().out
    page = Page(out.read_text())
    assert [float(v) for v in page.cells["data-test-accuracy"]] == [result["test_accuracy"]]
    assert [float(v) for v in page.cells["data-sparsity"]] == [result["sparsity"]]
    assert set(page.figures) >= ALL
