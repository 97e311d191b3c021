"""The notebooks run, and print what their text says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(600)  # seconds, on a machine that does other things too


def printed(name: str, **changes: str) -> str:
    """Run a notebook and return what its cells printed. A change replaces what is assigned to a name."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for variable, value in changes.items():
        pattern, found = re.compile(rf"^{variable} = .*$", re.M), 0
        for cell in notebook.cells:
            cell.source, n = pattern.subn(f"{variable} = {value}", cell.source)
            found += n
        assert found == 1, variable
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def numbers(text: str, line: str, what: str) -> float:
    found = re.search(rf"^{line} .*?{what} +([\d.,e-]+)", text, re.M)
    assert found, (line, what)
    return float(found[1].replace(",", ""))


def test_mask_dynamics() -> None:
    text = printed("mask_dynamics")
    assert min(numbers(text, name, "test accuracy") for name in ("RigL", "SET", "static")) > 0.94
    assert numbers(text, "static", "explored") == pytest.approx(0.1, abs=0.001)
    assert numbers(text, "static", "first connections kept") == 1
    assert 0.15 < numbers(text, "RigL", "explored") < numbers(text, "SET", "explored")
    on_empty = {n: numbers(text, n, "on empty pixels") for n in ("at the start", "RigL", "SET")}
    assert on_empty["RigL"] < 0.7 * on_empty["at the start"]
    assert on_empty["RigL"] < on_empty["SET"]


def test_structured_vs_unstructured() -> None:
    text = printed("structured_vs_unstructured")
    for name in ("unstructured", "constant fan-in", "1:8", "blocks of 4x4"):
        assert numbers(text, name, "nnz") == 10_240  # (64 + 256) * 256 / 8
        assert numbers(text, name, "mean test accuracy") > 0.94
    assert re.search(r"constant fan-in +fan-in +32 to +32", text)
    assert not re.search(r"unstructured +fan-in +32 to +32", text)
    assert float(re.search(r"8,192 values of 65,536; largest difference ([\d.e-]+)", text)[1]) < 1e-4


def test_kernel_crossover() -> None:
    """At small size: times are not looked at, but that every form computes the same and every case has a number."""
    text = printed("kernel_crossover", **{"n_in, n_out": "128, 256", "batches": "[1, 16, 64]"})
    assert all(float(found) < 1e-5 for found in re.findall(r"largest difference ([\d.e-]+)", text))
    found = re.findall(r"(\d+)% (\w+) +batch +(\d+): +([\d.]+) x dense \[([\d.]+), ([\d.]+)\]", text)
    assert len(found) == 3 * 2 * 3
    assert all(float(low) <= float(median) <= float(high) for *_, median, low, high in found)
    assert len(re.findall(r"crossover: (?:\d+ rows|beyond 64 rows|never faster)", text)) == 6
