"""Examples, the notebook and the README's Python snippets run, and do what they say."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("plain_loop", 0.94),
        ("lightning_callback", 0.94),
        ("own_criterion", 0.9),
        ("own_method", 0.9),
        ("convert_cpu", 0.94),
        ("train_grouped", 0.94),
    ],
)
def test_example_trains(name: str, least: float, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > least
    assert "sparsity 0." in capsys.readouterr().out


@pytest.mark.timeout(600)  # seconds, on a machine that does other things too
def test_quickstart_notebook_runs() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert re.search(r"total +84,480 +0\.1000 +8,448", text)
    assert float(re.search(r"test accuracy (0\.\d+)", text)[1]) > 0.94


def test_notebook_is_stored_without_outputs() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), path.name
            assert not cell.get("execution_count"), path.name


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
