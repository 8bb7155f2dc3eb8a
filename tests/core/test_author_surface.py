"""What vendors import stays as it is: every public name of the author surface, with its signature, is on record.

`make surface` runs this file, which writes the record again, `tests/core/author_surface.txt`. It is made from source
without importing anything, so that it reads the same under every version of Python and torch.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("author_surface.txt")
COMMAND = "make surface"
FILES = ("__init__.py", "plugin.py", "hookspecs.py", "config.py", "batch.py")
FOLDERS = ("core/modeling", "core/inputs", "kernels")
KIT = "core/testing"  # of this only what its __init__.py offers
API = next(
    node.value.value
    for node in ast.parse((ROOT / "core" / "__init__.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "API_VERSION"
)


def surface() -> list[str]:
    paths = [ROOT / "core" / name for name in FILES]
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).glob("*.py"))
    lines = [f"API {API}"]
    for path in paths:
        inside = path.relative_to(ROOT).with_suffix("")
        parts = inside.parts[1:] if inside.parts[0] == "core" else inside.parts
        module = ".".join(("modelport", *(part for part in parts if part != "__init__")))
        if not any(part.startswith("_") for part in parts if part != "__init__"):
            lines += [f"{module}: {line}" for line in members(ast.parse(path.read_text()))]
    offered = ast.parse((ROOT / KIT / "__init__.py").read_text())
    for line in members(offered):
        if ", from " in line:
            name, home = line.split(", from modelport.testing.")
            inside = members(ast.parse((ROOT / KIT / f"{home}.py").read_text()))
            lines += [f"modelport.testing: {found}" for found in inside if re.match(rf"(class )?{name}\b", found)]
    return lines


def members(module: ast.Module) -> Iterator[str]:
    """One line for each public name: of functions and methods the signature, of fields the type and the default."""
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) if public(name):
                yield signature(node)
            case ast.ClassDef(name=name) if public(name):
                decorators = "".join(f" @{ast.unparse(d)}" for d in node.decorator_list)
                yield f"class {name}({', '.join(map(ast.unparse, node.bases))}){decorators}"
                yield from (f"{name}.{line}" for line in fields_and_methods(node))
            case ast.Assign(targets=[ast.Name(id=name)]) if public(name) and not isinstance(node.value, ast.Call):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) if public(name):
                yield f"{name} = {ast.unparse(node.value)}"
            case ast.AnnAssign(target=ast.Name(id=name)) if public(name):
                yield f"{name}: {ast.unparse(node.annotation)}"
            case ast.ImportFrom(module=home, names=names):
                yield from (f"{alias.name}, from {home}" for alias in names if alias.asname == alias.name)
            case ast.If(body=body):  # TYPE_CHECKING
                yield from members(ast.Module(body, []))


def fields_and_methods(node: ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        match child:
            case ast.FunctionDef(name=name) if public(name) or name in ("__init__", "__call__"):
                if not any(
                    ast.unparse(d).startswith(("model_validator", "field_validator")) for d in child.decorator_list
                ):
                    yield signature(child)
            case ast.AnnAssign(target=ast.Name(id=name)) if public(name):
                if isinstance(child.value, ast.Call):  # a description may be written better at any time
                    child.value.keywords = [word for word in child.value.keywords if word.arg != "description"]
                default = f" = {ast.unparse(child.value)}" if child.value else ""
                yield f"{name}: {ast.unparse(child.annotation)}{default}"


def signature(node: ast.FunctionDef) -> str:
    decorators = "".join(f" @{ast.unparse(d)}" for d in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}{decorators}"


def public(name: str) -> bool:
    return not name.startswith("_")


def test_what_vendors_import_is_what_is_on_record() -> None:
    recorded, found = RECORD.read_text().splitlines(), surface()
    changes = [line for line in difflib.ndiff(recorded, found) if line[0] in "+-"]
    if not changes:
        return
    if any(line[0] == "-" for line in changes):
        advice = (
            f"Lines went or changed, and plugins of other people import these names. Where only an argument or a field "
            f"with a default was added, run `{COMMAND}`. Everything else breaks plugins that are written for API "
            f"{API}: keep the old name or argument working beside the new one, or raise API_VERSION in "
            f"core/__init__.py, say in docs/plugins.md what plugins have to change, and then run it."
        )
    else:
        advice = f"There are new names. Are they meant for authors, typed and documented? Then run `{COMMAND}`."
    raise AssertionError("\n".join(["the author surface changed:", *changes, advice]))


def test_the_record_sees_each_kind_of_name() -> None:
    """What the record would miss could change without notice."""
    source = ast.parse(
        "from a import B as B\nfrom a import c\nLIMIT = 3\nmark = Marker('x')\nT: int = 1\n_hidden = 2\n"
        "def f(x: int, *, y: str = 'a') -> int: ...\ndef _g(): ...\n"
        "@dataclass(frozen=True)\nclass K(P):\n"
        "  n: int = 4\n  def __init__(self, z): ...\n  def run(self): ...\n  def _own(self): ...\n"
    )
    assert list(members(source)) == [
        "B, from a",
        "LIMIT",
        "mark = Marker('x')",
        "T: int",
        "f(x: int, *, y: str='a') -> int",
        "class K(P) @dataclass(frozen=True)",
        "K.n: int = 4",
        "K.__init__(self, z)",
        "K.run(self)",
    ]


if __name__ == "__main__":
    RECORD.write_text("\n".join(surface()) + "\n")
