"""A family's source as the beginning of another package: only what one architecture needs, under new names."""

import ast
import difflib
import inspect
import json
import re
from importlib import import_module
from textwrap import indent
from typing import Any

from modelport.plugin import Architecture, PluginError, Plugins, load_plugins

_KEPT = ("modelport_api",)


def copied_model(origin: str, name: str, stem: str) -> str:
    """Source of a plugin module that has one architecture of another plugin.

    :param origin: a plugin, whose first architecture it is, or an architecture.
    :param name: the new architecture's name; `stem` names its classes.
    :raises PluginError: there is no such plugin or architecture, or its parts lie in several modules.
    """
    architecture, module = _find(load_plugins(), origin)
    source = inspect.getsource(import_module(module))
    tree = ast.parse(source)
    own = {n: node for node in tree.body for n in _names(node)}
    classes = {architecture.model_class().__name__: stem, architecture.config.__name__: f"{stem}Config"}
    if missing := [c for c in classes if not isinstance(own.get(c), ast.ClassDef)]:
        raise PluginError(f"{origin!r} takes {', '.join(missing)} from elsewhere; start from a family of one module")
    register = _register(architecture, name)
    needed, wanted = set(_KEPT), [*_used(ast.parse(register))]
    while wanted:
        used = wanted.pop()
        if used not in needed:
            needed.add(used)
            if used in own:
                wanted += _used(own[used])
    parts = [f'"""{stem}, begun as a copy of {architecture.name}."""']
    after_block = False
    for node, text in _with_text(tree, source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in needed]
            if kept:
                node.names, whole = kept, len(kept) == len(node.names)
                parts.append(text if whole else ast.unparse(node))
        elif needed & _names(node) and "register_architectures" not in _names(node):
            parts.append(text if not after_block or text.startswith("\n\n") else f"\n\n{text.lstrip()}")
            after_block = isinstance(node, ast.ClassDef | ast.FunctionDef)
    text = "\n".join([parts[0], "", "\n".join(parts[1:]).lstrip("\n"), "", "", register])
    return re.sub(rf"\b({'|'.join(classes)})\b", lambda match: classes[match[0]], text)


def _find(plugins: Plugins, origin: str) -> tuple[Architecture, str]:
    for record in plugins.records:
        if record.name == origin and record.provides:
            return plugins.find(record.provides[:1]), record.module
        if origin in record.provides:
            return plugins.find([origin]), record.module
    names = [record.name for record in plugins.records if record.provides]
    near = difflib.get_close_matches(origin, [*names, *plugins.architectures])
    cure = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise PluginError(f"no plugin or architecture {origin!r} to start from; {cure}")


def _register(architecture: Architecture, name: str) -> str:
    """The hook, written out for one architecture."""
    lines = [f'"{name}",', f"{architecture.model_class().__name__},", f"{architecture.config.__name__},"]
    for field in ("rename", "weights", "ignore", "tasks", "reference", "tiny", "variants", "expected_failures"):
        value = getattr(architecture, field)
        if value != Architecture.__dataclass_fields__[field].default and value != {}:
            lines += f"{field}={_literal(value)},".splitlines()
    body = "\n".join(f"            {line}" for line in lines)
    return (
        "@hookimpl\ndef register_architectures() -> list[Architecture]:\n"
        f"    return [\n        Architecture(\n{body}\n        )\n    ]\n"
    )


def _literal(value: Any) -> str:
    if callable(value):
        return value.__name__
    if isinstance(value, dict):
        entries = "".join(f"{_literal(k)}: {_literal(v)},\n" for k, v in value.items())
        return f"{{\n{indent(entries, '    ')}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(v)}, ' for v in value).removesuffix(' ' if len(value) == 1 else ', ')})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _names(node: ast.stmt) -> set[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _used(node: ast.AST) -> list[str]:
    return [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]


def _with_text(tree: ast.Module, source: str) -> list[tuple[ast.stmt, str]]:
    """Each statement with its lines, and with the comments and blank lines before it."""
    lines, found, end = source.splitlines(), [], 0
    for node in tree.body:
        text = "\n".join(lines[end : node.end_lineno])
        end = node.end_lineno or end
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # not the docstring
            found.append((node, text))
    return found
