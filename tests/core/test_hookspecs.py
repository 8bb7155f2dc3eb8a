"""The contract holds together: every hook is documented and tested, and plugins stay on their side of it."""

import ast
import importlib.metadata
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pluggy
import pytest

from modelport import hookspecs
from modelport.config import EngineConfig
from modelport.plugin import Checkpoint, ModelInfo, PluginError, load_plugins

ROOT = Path(__file__).parents[2]
NAMES = ("API_VERSION", "Architecture", "hookimpl")
AUTHOR_SURFACE = ("kernels", "batch", "config", "modeling", "plugin", "hookspecs", "inputs")

_manager = pluggy.PluginManager("modelport")
HOOKS = [name for name in dir(hookspecs) if _manager.parse_hookspec_opts(hookspecs, name)]
_source = ast.parse(inspect.getsource(hookspecs))
SIGNATURES = {
    node.name: f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    for node in _source.body
    if isinstance(node, ast.FunctionDef)
}


def section(text: str, title: str) -> str:
    """The part of a Markdown text under the heading `### title`."""
    match = re.search(rf"^### `{title}`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


@pytest.mark.parametrize("hook", HOOKS)
def test_docstring_says_what_each_argument_the_return_the_kind_and_where_it_runs(hook):
    doc = inspect.getdoc(getattr(hookspecs, hook)) or ""
    kind = "First result." if _manager.parse_hookspec_opts(hookspecs, hook)["firstresult"] else "Collected."
    assert re.search(rf"^{kind} Runs in: (front end|every worker|front end and every worker)\.$", doc, re.MULTILINE)
    for argument in inspect.signature(getattr(hookspecs, hook)).parameters:
        assert f":param {argument}:" in doc
    assert (":return:" in doc) == (not SIGNATURES[hook].endswith("-> None"))


@pytest.mark.parametrize("hook", HOOKS)
def test_guide_has_a_section_with_the_exact_signature(hook):
    text = section((ROOT / "docs" / "plugins.md").read_text(), hook)
    assert f"def {SIGNATURES[hook]}" in text, f"docs/plugins.md: '### `{hook}`' lacks this signature"
    doc = inspect.getdoc(getattr(hookspecs, hook)) or ""
    text = " ".join(text.split())
    where = re.search(r"^(First result|Collected)\. Runs in: .*$", doc, re.MULTILINE)
    assert where
    assert where[0] in text, f"docs/plugins.md: '### `{hook}`' should say: {where[0]}"


def test_guide_describes_no_hook_that_is_gone():
    titles = re.findall(r"^### `(\w+)`$", (ROOT / "docs" / "plugins.md").read_text(), re.MULTILINE)
    assert sorted(titles) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_of_its_name(hook):
    found = re.compile(rf"^(?:async )?def test_hook_{hook}(?:_\w+)?\(", re.MULTILINE)
    assert any(found.search(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))


def modules(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"nothing in {folder}"
    return paths


def test_no_hook_is_called_inside_the_engine():
    for path in modules("core/engine"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "hook":
                pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno} uses .hook; hooks are for start-up")


def imported(path: Path, package: str, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import; `from a import b` counts as `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the insides of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def test_plugins_import_the_author_surface_only():
    for path in modules("plugins"):
        inside = path.relative_to(ROOT / "plugins")
        package = ".".join(("modelport", "plugins", *inside.parts[:-1]))
        allowed = [*NAMES, *AUTHOR_SURFACE, f"plugins.{inside.parts[0]}"]
        if inside.parts[0] == "multimodal":
            allowed.append("plugins.text")
        for line, name in imported(path, package, ast.walk(ast.parse(path.read_text()))):
            inner = name.removeprefix("modelport.")
            if inner == name:
                continue
            assert any(f"{inner}.".startswith(f"{a}.") for a in allowed), (
                f"{path.relative_to(ROOT)}:{line} imports {name}; plugins may import {', '.join(AUTHOR_SURFACE)}"
            )


def test_no_plugin_imports_transformers_at_module_level():
    for path in modules("plugins"):
        for line, name in imported(path, "", at_import(ast.parse(path.read_text()))):
            assert name.split(".")[0] != "transformers", (
                f"{path.relative_to(ROOT)}:{line} imports transformers, which costs seconds; do it in a function"
            )


# --- hooks in use ----------------------------------------------------------------------------------------------------


@pytest.fixture
def only_asked_for(monkeypatch):
    """No plugin is installed; the vendor's module can be imported."""
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(()))
    monkeypatch.delenv("MODELPORT_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(ROOT / "tests" / "vendor" / "acme-modelport")


def test_hook_register_architectures(only_asked_for):
    plugins = load_plugins(["acme_modelport"])
    acme = plugins.find(["AcmeForCausalLM"])
    assert plugins.architectures == {"AcmeForCausalLM": acme}
    assert plugins.records[0].provides == ("AcmeForCausalLM",)
    assert plugins.hook.register_architectures()[0][0].name == "AcmeForCausalLM"
    assert acme.config.model_validate(acme.tiny).hidden_size == 32
    with pytest.raises(PluginError, match="near names: AcmeForCausalLM"):
        plugins.find(["AcmeForCasualLM"])


def test_hook_transform_model(only_asked_for):
    torch = pytest.importorskip("torch")
    plugins = load_plugins(["acme_modelport"])
    acme = plugins.find(["AcmeForCausalLM"])

    def kinds(tiny: dict) -> tuple[set[str], set[str]]:
        config = acme.config.model_validate(tiny)
        with torch.device("meta"):
            model = acme.model_class()(config)
        before = {name for name, _ in model.named_parameters()}
        engine, checkpoint = EngineConfig(model="tiny"), Checkpoint(Path("tiny"), "tiny")
        info = ModelInfo(acme, config, engine, checkpoint, torch.float32, torch.device("cpu"), iter)
        assert plugins.hook.transform_model(model=model, info=info) == []
        assert {name for name, _ in model.named_parameters()} == before, "the checkpoint's names still fit"
        assert all(parameter.is_meta for parameter in model.parameters())
        kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("norm")}
        return kinds, {name for name, module in model.named_modules() if type(module).__name__ == "ClampedNorm"}

    swapped, where = kinds(acme.tiny)
    assert swapped == {"ClampedNorm"}
    assert where >= {"model.norm", "model.layers.0.attention_norm", "model.layers.1.ffn_norm"}
    assert kinds({**acme.tiny, "norm_clamp": 0.0}) == ({"RMSNorm"}, set())
