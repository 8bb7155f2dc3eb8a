"""`modelport new-plugin`: a package for one's own model, which installs and passes its conformance test at once.

Decision: the templates are a whole working package called acme-foo, so a new one is a copy with four words replaced.
They are data beside the built-in plugins. `--from` starts from a built-in family instead of the plain decoder.
"""

import argparse
import keyword
import re
import sys
from importlib import resources
from pathlib import Path

from modelport.discovery import installed_plugins

_TEMPLATES = ("modelport.plugins", "scaffold")
_FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "gitignore.txt": ".gitignore",
    "workflow.yml.txt": ".github/workflows/test.yml",
    "acme_foo/__init__.py.txt": "acme_foo/__init__.py",
    "acme_foo/model.py.txt": "acme_foo/model.py",
    "tests/test_conformance.py.txt": "tests/test_conformance.py",
}
_MODEL = "acme_foo/model.py"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the package and of its folder, such as acme-foo")
    parser.add_argument("--architecture", metavar="NAME", help="name in config.json (default: AcmeFooForCausalLM)")
    parser.add_argument(
        "--from", dest="origin", metavar="FAMILY", help="start from this plugin's model, or from this architecture"
    )


def run(args: argparse.Namespace) -> int:
    folder = write_package(Path(args.name), args.architecture, args.origin)
    print(f"wrote {folder}/; now:")
    print(f"  cd {folder} && pip install -e '.[test]' && pytest")
    print(f"then put your model in {folder}/{_module(folder.name)}/model.py")
    return 0


def write_package(folder: Path, architecture: str | None = None, origin: str | None = None) -> Path:
    """Write the package `folder.name` as a new folder.

    :param architecture: its name in `config.json`; made from the package's name by default.
    :param origin: plugin or architecture whose source to start from, instead of a plain decoder.
    :return: the folder.
    :raises ValueError: a name cannot be used, or there is no such origin.
    :raises FileExistsError: there is such a folder already.
    """
    name = folder.name
    _check_name(name)
    if architecture is None:
        parts = name.split("-")
        parts = parts[:-1] if parts[-1] == "modelport" and len(parts) > 1 else parts
        architecture = "".join(part.capitalize() for part in parts) + "ForCausalLM"
    if not architecture.isidentifier():
        raise ValueError(
            f"--architecture {architecture!r} is no architecture's name; write what config.json has in "
            f'"architectures", such as AcmeFooForCausalLM'
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name, or remove it first")
    words = {
        "AcmeFooForCausalLM": architecture,
        "AcmeFoo": architecture.partition("For")[0] or architecture,
        "acme_foo": _module(name),
        "acme-foo": name,
    }
    templates = resources.files(_TEMPLATES[0]).joinpath(_TEMPLATES[1])
    texts = {}
    for template, target in _FILES.items():
        text = templates.joinpath(*template.split("/")).read_text(encoding="utf-8")
        texts[_replaced(target, words)] = _replaced(text, words)
    if origin is not None:
        from modelport.cli.copied_model import copied_model  # it loads the plugins

        texts[_replaced(_MODEL, words)] = copied_model(origin, architecture, words["AcmeFoo"])
    for target, text in texts.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def _module(name: str) -> str:
    return name.replace("-", "_")


def _replaced(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda match: words[match[0]], text)  # the longest of them stands first


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        cure = f"how about {better!r}?" if _NAME.fullmatch(better) else "such as 'acme-foo'"
        raise ValueError(f"{name!r} cannot name a package: write small letters, digits and single hyphens; {cure}")
    module = _module(name)
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module == "modelport":
        raise ValueError(
            f"{name!r} would hide Python's or modelport's own {module!r}; put a name before it: 'acme-{name}'"
        )
    for record in installed_plugins():
        if record.name == name:
            raise ValueError(
                f"{name!r} is the name of an installed plugin, {record}; put a name before it: 'acme-{name}'"
            )
