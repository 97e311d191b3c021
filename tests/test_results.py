"""RESULTS.md is generated: what is committed follows from the result files, numbers are right, mistakes are named."""

import re
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from sparselearn import SparsityError
from sparselearn.recipes import results, table
from sparselearn.recipes.results import generate
from sparselearn.recipes.results_picture import Curves, draw, drawn
from sparselearn.recipes.table import Row

ROOT = Path(__file__).parent.parent / "recipes"

# As .data/pool.py-like drivers write them: one column with the whole command, and runs that failed.
POOL = """\
cell,error,variant,seed,test_accuracy,test_loss,diverged,training_flops,hardware,torch,commit,sparsity
net variant=dense seed=0,,dense,0,0.90,0.30,False,1.0,a GPU,2.11,aaa,0.0
net variant=dense seed=1,,dense,1,0.92,0.34,False,1.0,a GPU,2.11,aaa,0.0
net variant=rigl sparsity=0.90 seed=0,,rigl,0,0.88,0.40,False,0.25,a GPU,2.11,bbb,0.89991
net variant=rigl sparsity=0.9 seed=1,,rigl,1,0.87,0.50,False,0.25,a GPU,2.11,bbb,0.89991
net variant=rigl sparsity=0.99 seed=0,,rigl,0,0.1,,True,0.1,a GPU,2.11,bbb,0.98992
net variant=rigl sparsity=0.99 seed=1,time,,,,,,,,,,
"""
SECTION = {
    "title": "A net",
    "order": 2,
    "csv": "net.csv",
    "commands": ["sparselearn sweep net"],
    "about": "Ten steps.",
    "tables": [{"by": ["sparsity", "variant"], "show": ["test_accuracy", "test_loss", "training_flops"],
                "against": {"variant": "dense"}, "published": {"heading": "paper", "rows": [[0.9, "rigl", "-0.39"]]}}],
    "picture": {"x": "sparsity", "y": "test_accuracy", "lines": ["variant"], "alt": "accuracy"},
    "remarks": "So it is.",
}  # fmt: skip


def make(folder, section=SECTION, text=POOL):
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / "net.csv").write_text(text)
    (folder / "results" / "net.yaml").write_text(yaml.safe_dump(section))
    return generate(folder / "results", folder / "RESULTS.md")


# ---- what is committed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The committed result files, and what is generated from them."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(ROOT / "results", folder / "results")
    return folder, generate(folder / "results", folder / "RESULTS.md")


def test_the_committed_file_is_what_the_result_files_give(again):
    assert again[1] == (ROOT / "RESULTS.md").read_text(), "run `python -m sparselearn.recipes.results`"


def test_the_committed_pictures_show_the_numbers_of_the_result_files(again):
    named = set(re.findall(r"\]\(results/(\w[^)]*\.png)\)", again[1]))
    assert named == {path.name for path in (ROOT / "results").glob("*.png")}
    for name in named:
        assert drawn(ROOT / "results" / name) == drawn(again[0] / "results" / name) != ""
        # Not drawn again, so these are the committed bytes.
        assert (ROOT / "results" / name).read_bytes() == (again[0] / "results" / name).read_bytes()
        assert (ROOT / "results" / name).stat().st_size < 100_000


def test_every_result_file_stands_in_the_text(again):
    assert {path.name for path in (ROOT / "results").glob("*.csv")} == set(
        re.findall(r"\]\(results/(.*?\.csv)\)", again[1])
    )


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_a_section_by_hand(tmp_path):
    lines = make(tmp_path).splitlines()
    assert lines[lines.index("## A net") :] == [
        "## A net",
        "",
        "Ten steps.",
        "",
        "a GPU, torch 2.11, commits aaa, bbb. [`net.csv`](results/net.csv), made by",
        "",
        "    sparselearn sweep net",
        "",
        "| sparsity | variant | n | test accuracy, % | test loss | training FLOPs / dense | gap to dense | paper |",
        "|---|---|---|---|---|---|---|---|",
        "| 0 | dense | 2 | 91.00 ± 1.41 | 0.320 ± 0.028 | 1.000 | – | – |",
        "| 0.9 | rigl | 2 | 87.50 ± 0.71 | 0.450 ± 0.071 | 0.250 | -3.50 | -0.39 |",
        "| 0.99 | rigl | 1 | 1 of 1 diverged | 1 of 1 diverged | 0.100 | – | – |",
        "",
        "1 of 6 runs did not finish and are not in the table.",
        "",
        "![accuracy](results/net.png)",
        "",
        "So it is.",
    ]
    assert statistics.stdev([88, 87]) == pytest.approx(0.71, abs=0.005)
    assert (tmp_path / "results" / "net.png").read_bytes().startswith(b"\x89PNG")


def test_sections_come_in_their_order(tmp_path):
    make(tmp_path)
    (tmp_path / "results" / "zoo.yaml").write_text(yaml.safe_dump(SECTION | {"title": "First", "order": 1}))
    text = generate(tmp_path / "results", tmp_path / "RESULTS.md")
    assert text.index("## First") < text.index("## A net")


def test_only_fitting_rows_are_in_a_table(tmp_path):
    spec = {"by": ["variant"], "show": ["test_accuracy"], "where": [{"variant": "rigl", "sparsity": 0.9}]}
    text = make(tmp_path, SECTION | {"tables": [spec]})
    assert "| rigl | 2 | 87.50 ± 0.71 |" in text
    assert "| dense |" not in text


def test_settings_of_a_sweep_win_over_what_was_measured(tmp_path):
    (tmp_path / "s.csv").write_text("set sparsity,set seed,sparsity,test_accuracy\n0.9,0,0.8991,0.5\n")
    (row,) = table.read(tmp_path / "s.csv")
    assert (row.get("sparsity"), row.values["sparsity"], row.get("nothing")) == ("0.9", "0.8991", "")


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_a_picture_is_drawn_again_when_its_numbers_change(tmp_path):
    make(tmp_path)
    picture = tmp_path / "results" / "net.png"
    first, when = drawn(picture), picture.stat().st_mtime_ns
    make(tmp_path)
    assert picture.stat().st_mtime_ns == when
    make(tmp_path, text=POOL.replace("0.88,", "0.89,"))
    assert drawn(picture) != first


def test_curves_by_hand(tmp_path):
    make(tmp_path)
    curves = Curves.of(table.read(tmp_path / "results" / "net.csv"), SECTION["picture"])
    assert list(curves.lines) == ["dense", "rigl"]  # the diverged one has no place in a mean
    assert curves.lines["dense"] == [(0.0, pytest.approx(91), pytest.approx(2**0.5))]
    assert curves.lines["rigl"] == [(0.9, pytest.approx(87.5), pytest.approx(0.5**0.5))]
    assert (curves.xlabel, curves.ylabel) == ("sparsity", "test accuracy, %")


def test_words_are_drawn_below_each_other(tmp_path):
    rows = [
        Row({"variant": v, "density_scaling": s}, {"test_loss": 1.5}) for v in ("a", "b") for s in ("true", "false")
    ]
    curves = Curves.of(rows, {"x": "variant", "y": "test_loss", "lines": ["density_scaling"]})
    assert set(curves.lines) == {"density scaling", "test loss"}
    draw([curves], "words", tmp_path / "x.png")
    assert drawn(tmp_path / "x.png") == curves.digest()


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tabels": []}, "a section has no key `tabels`. Closest: `tables`"),
        ({"tables": [{"by": ["variant"]}]}, "a table needs the key `show`."),
        ({"tables": [{"by": ["variant"], "show": ["accuracy"]}]}, "there is no measure `accuracy`; there are"),
        ({"tables": [{"by": ["variant"], "show": ["nnz"], "where": [{"variant": "x"}]}]}, "no finished run fits"),
        ({"tables": [{"by": ["seed"], "show": ["nnz"], "against": {"variant": "dense"}}]}, "it names 2."),
        ({"tables": [SECTION["tables"][0] | {"published": {"heading": "p", "rows": [[0.5, "x", 1]]}}]}, "('0.5', 'x')"),
        ({"picture": {"x": "sparsity"}}, "a picture needs the key `y`."),
        ({"csv": ["net.csv", "lost.csv"]}, "There is no results file"),
    ],
)  # fmt: skip
def test_mistakes_in_a_section_are_named(tmp_path, change, message):
    with pytest.raises(SparsityError, match=re.escape(message)):
        make(tmp_path, SECTION | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n", "has no rows"), ("a,b\n1\n", "line 2 has not as many values as the header"), ("a\n1,2\n", "line 2")],
)
def test_damaged_result_files_are_named(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(SparsityError, match=message):
        table.read(tmp_path / "x.csv")


def test_the_command_says_what_it_wrote_and_what_is_missing(tmp_path, capsys):
    make(tmp_path)
    arguments = ["--folder", str(tmp_path / "results"), "--out", str(tmp_path / "R.md")]
    assert results.main(arguments) == 0
    assert capsys.readouterr().out == f"Results: {tmp_path / 'R.md'}\n"
    with pytest.raises(SystemExit):
        results.main(["--folder", str(tmp_path / "nowhere"), "--out", str(tmp_path / "R.md")])
    assert "has no section" in capsys.readouterr().err
