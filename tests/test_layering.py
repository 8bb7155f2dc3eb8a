"""Imports point downward: the contracts of pyproject.toml, checked over the whole package.

The checker wants a package that lies in one folder, so it gets a copy of the tree in the shape that a wheel gives it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNPACKED = shutil.ignore_patterns("__pycache__", "*.so", "build")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "core", tmp_path / "modelport", ignore=UNPACKED)
    for name in ("kernels", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / "modelport" / name, ignore=UNPACKED)
    (tmp_path / "modelport" / "kernels.py").rename(tmp_path / "modelport" / "kernels" / "__init__.py")
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", command, str(ROOT / "pyproject.toml")],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_imports_point_downward(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("kernels/norm.py", "import modelport.config", "imports point downward"),
        ("engine/cache.py", "def f():\n    from modelport.plugins.text import llama", "the core imports no plugin"),
        ("plugins/text/llama.py", "from modelport.engine.cache import BlockPool", "plugins import the author surface"),
    ],
)
def test_the_contracts_bite(tree: Path, file: str, line: str, contract: str) -> None:
    path = tree / "modelport" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert [text for text in broken if text.startswith(contract)], done.stdout + done.stderr
