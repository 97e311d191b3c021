"""Recipes: what is refused, with the exact line, and what times and variants resolve to."""

from pathlib import Path

import pytest

from sparselearn import SparsityError
from sparselearn.config import load, packaged, to_yaml


def message(*changes, source="digits"):
    with pytest.raises(SparsityError) as error:
        load(str(source), list(changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


BASE = """
name: mine
data: {fn: sparselearn.recipes.data.digits}
model: {fn: sparselearn.recipes.models.mlp}
optimizer: {fn: torch.optim.SGD, lr: 0.1}
max_steps: 200
"""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("sparsty=0.9", "`digits.yaml`: unknown key `sparsty`. Closest: `sparsity`, `support`, `variant`."),
        ("seed=abc", "`digits.yaml`: `seed`: Value 'abc' of type 'str' could not be converted to Integer."),
        ("max_steps=1.5", "`digits.yaml`: `max_steps`: Value '1.5' of type 'float' could not be converted to Integer."),
        ("variant=rgl", "`digits.yaml` has no variant `rgl`; it has: dense, static, set, rigl, srigl, nm, gmp."),
        ("oops", "`oops` must have the form key=value, as in sparsity=0.95."),
        ("max_steps=0", "`max_steps` must be at least 1; got 0."),
        ("batch_size=0", "`batch_size` must be at least 1; got 0."),
        ("accumulate=0", "`accumulate` must be at least 1; got 0."),
        ("eval_every=-1", "`eval_every` must be at least 0; got -1."),
        ("sparsity=1.5", "`sparsity` is the fraction of zeros and must lie in [0, 1); got 1.5."),
        (
            "compile=graphs",
            "`compile` is false, true or one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs; "
            "got 'graphs'.",
        ),
        (
            "method.stop=2000",
            "`UpdateSchedule` has stop=2000, past the end of a run of 1500 optimizer steps. Give the method times of "
            "this run, or train longer.",
        ),
        ("method.every=2.5", "`method.every` must be a whole number of optimizer steps or a fraction in (0, 1]."),
        ("method.drop_fraction=2", "`drop_fraction` must lie in [0, 1]; got 2."),
        (
            "method.fn=sparselearn.rgl",
            "`method.fn`: there is no `sparselearn.rgl` to import (module 'sparselearn' has no attribute 'rgl').",
        ),
        (
            "method.fn=sparselearn.__version__",
            "`method.fn`: `sparselearn.__version__` cannot be called; it is of type str.",
        ),
        (
            "method.every=abc",
            "`method`: `sparselearn.rigl` refused its arguments: '<' not supported between instances of 'str' and "
            "'int'.",
        ),
        (
            "data.flt=1",
            "`data`: `sparselearn.recipes.data.digits` got an unexpected keyword argument 'flt'. Its arguments: "
            "(flat: bool = True) -> sparselearn.recipes.data.Split.",
        ),
    ],
)
def test_a_mistake_gets_one_clear_line(change, line):
    assert message(change) == line


def test_cuda_graphs_do_not_add_up_gradients():
    wanted = (
        "`compile` reduce-overhead replays CUDA graphs, in which torch does not add up the gradients of `accumulate` 4 "
        "micro-batches. Set compile=true, or accumulate=1."
    )
    assert message("compile=reduce-overhead", "accumulate=4") == wanted
    assert load("digits", ["compile=true", "accumulate=4"]).accumulate == 4


@pytest.mark.parametrize("key", ["method", "model", "optimizer", "distribution", "data"])
def test_an_argument_that_a_callable_does_not_take(key):
    text = message(f"{key}.nonsense=1")
    assert text.startswith(f"`{key}`: `")
    assert "unexpected keyword argument 'nonsense'. Its arguments: (" in text


def test_a_missing_argument_of_a_nested_callable():
    text = message("method.drop_fraction.fn=sparselearn.schedules.cosine", "method.drop_fraction.initial=0.3")
    assert text.startswith(
        "`method.drop_fraction`: `sparselearn.schedules.cosine` missing a required argument: 'stop'."
    )


def test_a_method_without_a_name():
    assert message("variant=dense", "method.every=5") == (
        "`method` needs a key `fn` with an importable name, as in fn: sparselearn.rigl."
    )


def test_an_unknown_recipe():
    assert message(source="digts") == (
        "There is no recipe `digts`: neither a file nor one of "
        + ", ".join(packaged())
        + ". See `sparselearn recipes`."
    )


@pytest.mark.parametrize("text", ["name: [1", "name: {a", "- 1\n- 2", ""])
def test_a_file_that_is_no_recipe(tmp_path, text):
    assert message(source=recipe(tmp_path, text)).startswith("`mine.yaml`: ")


def test_broken_syntax_on_the_command_line():
    assert message("exclude=[1,2").startswith("`digits.yaml`: this is not YAML: while parsing a flow sequence")


def test_a_mistake_in_a_variant_that_is_not_chosen(tmp_path):
    path = recipe(tmp_path, BASE + "variant: a\nvariants: {a: {sparsity: 0}, b: {sparsty: 0.5}}")
    assert message(source=path) == "`mine.yaml`: unknown key `sparsty`. Closest: `sparsity`, `support`, `variant`."


@pytest.mark.parametrize(
    ("written", "steps"), [("0.05", 75), ("0.5", 750), ("1.0", 1500), ("100", 100), ("100.0", 100), ("1", 1)]
)
def test_times_are_steps_or_fractions_of_the_run(written, steps):
    assert load("digits", [f"warmup={written}"]).warmup == steps
    stop = load("digits", ["method.every=0.0001", "method.start=0", f"method.stop={written}"]).method["stop"]
    assert stop == steps
    assert type(stop) is int


def test_a_small_fraction_is_at_least_one_step():
    assert load("digits", ["method.every=0.0001"]).method["every"] == 1


def test_fractions_follow_a_changed_length():
    assert load("digits", ["max_steps=400"]).method["stop"] == 300


def test_only_times_are_fractions():
    assert load("digits", ["method.drop_fraction=0.5"]).method["drop_fraction"] == 0.5


def test_variants_win_over_the_base_and_the_command_line_over_both():
    dense = load("digits", ["variant=dense"])
    assert (dense.method, dense.sparsity, dense.density_scaling) == (None, 0.0, False)
    static = load("digits", ["variant=static", "sparsity=0.8"])
    assert (static.method, static.sparsity, static.density_scaling) == ({"fn": "sparselearn.static"}, 0.8, True)


def test_a_recipe_without_variants(tmp_path):
    assert load(str(recipe(tmp_path, BASE))).method is None


def test_the_resolved_recipe_resolves_to_itself(tmp_path):
    for name in packaged():
        text = to_yaml(load(name))
        assert to_yaml(load(str(recipe(tmp_path, text)))) == text


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("variant", ["dense", "static", "set", "rigl", "gmp"])
def test_every_packaged_variant_loads(name, variant):
    config = load(name, [f"variant={variant}"])
    assert config.name == name
    assert config.description
    assert config.density_scaling == (variant != "dense")
