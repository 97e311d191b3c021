"""What a user installs: the package list, typing, the import order, and the built wheel."""

import ast
import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparselearn": "sparselearn", "sparselearn.kernels": "kernels", "sparselearn.recipes": "recipes"}

# Bottom to top. A module imports from its own row and from those below it, without cycles.
# "sparselearn" itself, the package's front door, stands on the core and under the edge.
LAYERS = [
    ["errors"],
    ["checks"],
    ["kernels"],
    ["schedules", "structures", "criteria", "distributions"],
    ["methods"],
    ["state", "distributed", "selection"],
    ["scaling", "statistics", "first_masks"],
    ["latent", "fused_update"],
    ["masked_model"],
    ["sparsifier"],
    ["release"],
    ["optimizer", "wrappers"],
    ["flops"],
    ["sparselearn"],
    ["modules"],
    ["lightning", "checkpoint", "config"],
    ["recipes", "cli", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
EXTRAS = ["pytorch_lightning", "torchvision", "omegaconf", "matplotlib", "rich", "scipy", "sklearn"]


def source_files() -> dict[str, Path]:
    """Module name -> file, for every module of the three folders."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join([package, *parts])] = path
    return modules


def layer_of(module: str) -> str:
    """`sparselearn.methods.drop_grow` -> `methods`."""
    return module.split(".")[1] if "." in module else module


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The absolute names that a file imports, with their lines; lazy and typing-only ones included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield (full if full in modules else source), node.lineno


def all_imports() -> list[tuple[str, str, str]]:
    """(module, imported name, "file:line") for the whole package."""
    modules = source_files()
    return [
        (module, target, f"{path.relative_to(ROOT)}:{line}")
        for module, path in modules.items()
        for target, line in imports_of(module, path, modules)
    ]


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "sparselearn"


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the outer make's and python's settings, and show its output if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "PYTHONPATH"}}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


def test_listed_packages_are_the_tree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    folders = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(listed) == sorted(folders)
    for package in listed:
        parent = max((p for p in FOLDERS if f"{package}.".startswith(f"{p}.")), key=len)
        folder = ROOT / FOLDERS[parent] / package.removeprefix(parent).strip(".").replace(".", "/")
        assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} lacks an __init__.py"


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_every_file_is_type_checked() -> None:
    # READY= : this interpreter has the tools already, so make must not set up .venv.
    result = run("make", "--no-print-directory", "types", "READY=", f"RUN={sys.executable}")
    found = re.search(r"(?:no issues found in|checked) (\d+) source file", result.stdout)
    assert found, result.stdout + result.stderr
    assert int(found[1]) == len(source_files())


def test_every_module_has_a_layer() -> None:
    unknown = sorted({m for m in source_files() if layer_of(m) not in LEVEL})
    assert not unknown, f"give these modules a place in LAYERS: {unknown}"


def test_imports_run_downward() -> None:
    graph: dict[str, set[str]] = {}
    wrong = []
    for module, target, place in all_imports():
        if not is_ours(target) or layer_of(module) not in LEVEL:
            continue
        graph.setdefault(module, set())
        if target != module:
            graph[module].add(target)
        # Recipes and the command are the top: they may use everything, each other included.
        if LEVEL[layer_of(module)] < LEVEL.get(layer_of(target), -1):
            wrong.append(f"{place}: {module} imports {target} from above it")
        if layer_of(target) not in LEVEL:
            wrong.append(f"{place}: {target} does not exist or has no layer")
    assert not wrong, "\n".join(wrong)
    # A package's front door re-exports its parts; that is no cycle between the parts.
    doors = {m for m, path in source_files().items() if path.name == "__init__.py"}
    below_top = {m: t - doors for m, t in graph.items() if layer_of(m) not in LAYERS[-1] and m not in doors}
    tuple(TopologicalSorter(below_top).static_order())  # raises CycleError, which names the cycle


def test_core_imports_torch_and_numpy_alone() -> None:
    allowed = sys.stdlib_module_names | {"torch", "numpy", "sparselearn"}
    wrong = [
        f"{place}: {target}"
        for module, target, place in all_imports()
        if LEVEL.get(layer_of(module), 0) <= LEVEL["sparselearn"]
        and layer_of(module) != "kernels"  # imported lazily, see the test below
        and target.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_stand_alone() -> None:
    allowed = sys.stdlib_module_names | {"torch", "numpy", "triton", "numba", "llvmlite"}
    wrong = [
        f"{place}: {target}"
        for module, target, place in all_imports()
        if layer_of(module) == "kernels"
        and target.split(".")[0] not in allowed
        and not f"{target}.".startswith(("sparselearn.kernels.", "sparselearn.errors."))
    ]
    assert not wrong, "\n".join(wrong)


def test_mapped_folders_are_imported_by_their_package_name() -> None:
    # `import kernels` would be a second copy of the module, or somebody else's package of that name.
    wrong = [
        f"{place}: {target}" for _, target, place in all_imports() if target.split(".")[0] in {"kernels", "recipes"}
    ]
    assert not wrong, "\n".join(wrong)


def test_import_leaves_extras_alone() -> None:
    slow = [*EXTRAS, "triton", "numba", "torch.distributed.tensor", "torch._dynamo", "sympy"]  # half a second each
    code = f"import sys, sparselearn; print([name for name in {slow} if name in sys.modules])"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    result = run("git", "ls-files", "-z")
    assert result.returncode == 0, result.stderr
    return [p for name in result.stdout.split("\0") if name and (p := ROOT / name).is_file() and not p.is_symlink()]


def test_tracked_files_are_small() -> None:
    large = {str(p.relative_to(ROOT)): size for p in tracked_files() if (size := p.stat().st_size) > 1_000_000}
    assert not large, f"over 1 MB (bytes): {large}"


def test_tracked_files_name_no_machine_path() -> None:
    # Not after a letter, dot or slash: an address or a relative path may hold such a folder.
    machine_path = re.compile(rb"(?<![\w./~-])/(work|home|root)/")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100].decode(errors='replace')}"
        for path in tracked_files()
        if b"\0" not in (content := path.read_bytes())
        for number, line in enumerate(content.splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(300)
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build")
def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    """Build sdist and, from it, the wheel; install that alone; train from a folder without our sources."""

    def succeed(*command: object, cwd: Path = tmp_path) -> str:
        result = run(*command, cwd=cwd)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    succeed(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1

    environment = tmp_path / "venv"
    succeed(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    succeed(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    # Our dependencies are lent by the environment that runs the tests: torch is gigabytes. A .pth file puts
    # them behind the wheel, and the editable install's own .pth is not followed through it.
    lent = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    site = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    modules = "sparselearn, sparselearn.recipes, sparselearn.kernels"
    code = f"import {modules}; print(*(m.__file__ for m in ({modules})))"
    for file in succeed(python, "-c", code, cwd=elsewhere).split():
        assert Path(file).is_relative_to(site), f"{file} is not the wheel's copy"
    installed = {str(p.relative_to(site)) for p in (site / "sparselearn").rglob("*")}
    assert "sparselearn/py.typed" in installed
    configs = [p.name for p in (ROOT / "recipes" / "configs").glob("*.yaml")]
    assert installed >= {f"sparselearn/recipes/configs/{name}" for name in configs}

    command = environment / "bin" / "sparselearn"
    succeed(command, "train", "digits", "max_steps=200", "--out", tmp_path / "run", cwd=elsewhere)
    assert any((tmp_path / "run").iterdir())
