"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import sparselearn


def modules():
    found = [m.name for m in pkgutil.walk_packages(sparselearn.__path__, "sparselearn.")]
    for folder in ("kernels", "recipes"):  # mapped from other folders; an editable install may hide them from the walk
        name = f"sparselearn.{folder}"
        package = importlib.import_module(name)
        found += [name, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{name}."))]
    return sorted({"sparselearn", *found})


@pytest.mark.parametrize("name", [n for n in modules() if not n.endswith("__main__")])
def test_examples_of(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_walk_finds_the_folders_and_their_examples():
    found = modules()
    assert {"sparselearn.optimizer", "sparselearn.methods.drop_grow", "sparselearn.kernels"} <= set(found)
    assert {"sparselearn.recipes", "sparselearn.recipes.train"} <= set(found)
    finder = doctest.DocTestFinder()
    examples = [t for name in found for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(examples) >= 10
