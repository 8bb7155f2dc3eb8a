"""From what the user typed to a checkpoint's files, its configuration and its weights.

Decisions: what exists on disk wins over what a source knows; plugins are asked before the standard layout is read
(`config.json`, `*.safetensors`); everything that can be wrong is found before the first tensor is read; nothing in a
checkpoint is ever executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelport.loading.safetensors import open_safetensors
from modelport.plugin import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from modelport.plugin import Plugins

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


def resolve(
    model: str,
    revision: str | None,
    plugins: Plugins,
    *,
    load_format: str = "auto",
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Find the files of `model`: a local folder or file (`~` is expanded), or a name that a plugin's source knows.

    :raises FileNotFoundError: neither; the message says what was tried and what to do.
    """
    name = str(model)
    if not name.strip():
        raise ValueError(f"model is {name!r}; give a path of a checkpoint, or a name that a source knows")
    path = _expand(name)
    if not path.exists():
        path = None if _is_plainly_a_path(name) else plugins.hook.resolve_checkpoint(model=name, revision=revision)
        if path is None:
            raise FileNotFoundError(_not_found(name, plugins))
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"a plugin resolved {name!r} to {str(path)!r}, which does not exist")
    return Checkpoint(path, name, load_format, trust_remote_code)


def read_config(checkpoint: Checkpoint, plugins: Plugins) -> dict[str, Any]:
    """Return the configuration of a checkpoint as a dictionary with Hugging Face keys.

    :raises FileNotFoundError: there is no `config.json`, and no plugin reads this kind of checkpoint.
    :raises ValueError: it is not a JSON object, or does not name its `architectures`.
    """
    config = plugins.hook.read_config(checkpoint=checkpoint)
    if config is not None:
        return _checked(config, checkpoint.path)
    path = checkpoint.path
    if path.is_file():
        raise FileNotFoundError(_no_reader(path))
    file = path / "config.json"
    if not file.is_file():
        held = sorted(entry.name for entry in path.iterdir())
        raise FileNotFoundError(
            f"{path} holds no config.json (it holds {', '.join(held[:8]) or 'nothing'}), and no plugin reads it; "
            "give the folder of a complete download"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from None
    return _checked(config, file)


def open_weights(checkpoint: Checkpoint, config: dict[str, Any], plugins: Plugins) -> Iterable[tuple[str, Tensor]]:
    """Return the checkpoint's `(name, tensor)` stream; missing and truncated files are reported before it starts.

    One tensor is alive at a time: copy it before asking for the next, and the peak of resident memory stays within
    the largest tensor plus some ten megabytes.

    :raises FileNotFoundError: there are no weights, or a shard is missing.
    :raises ValueError: a file is truncated, or `load_format` is one that no plugin reads.
    """
    weights = plugins.hook.open_weights(checkpoint=checkpoint, config=config)
    if weights is not None:
        return weights
    if checkpoint.load_format not in ("auto", "safetensors"):
        raise ValueError(
            f"load_format is {checkpoint.load_format!r}, and no plugin reads {checkpoint.path} in that format; "
            "`modelport plugins` lists what is loaded, blocked or broken"
        )
    if checkpoint.path.is_file():
        raise FileNotFoundError(_no_reader(checkpoint.path))
    return open_safetensors(checkpoint.path)


def _checked(config: Any, source: Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"{source} holds a {type(config).__name__}, not a JSON object; is it a model's config.json?")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        given = "names no architectures" if names is None else f"has architectures = {names!r}"
        kind = f" (model_type is {config['model_type']!r})" if config.get("model_type") else ""
        raise ValueError(
            f"{source} {given}{kind}; add the name of the model's class as a list, "
            'such as "architectures": ["...ForCausalLM"]; `modelport models` lists the names that are known'
        )
    return config


def _expand(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # "~nobody": no such user
        return Path(name)


def _is_plainly_a_path(name: str) -> bool:
    """Asking a hub for these would only delay the answer."""
    return name.startswith(("/", "~", "./", "../", ".\\", "..\\")) or name in (".", "..") or Path(name).is_absolute()


def _not_found(name: str, plugins: Plugins) -> str:
    looks_like_a_file = name.endswith(_FILE_ENDINGS) or _is_plainly_a_path(name)
    if looks_like_a_file:
        return f"model {name!r}: this path does not exist (looked at {_expand(name).absolute()}); check its spelling"
    asked = sorted(impl.plugin_name for impl in plugins.hook.resolve_checkpoint.get_hookimpls())
    tried = f"no such path here, and no source knows the name (asked: {', '.join(asked) or 'none is loaded'})"
    cure = "give the path of a local checkpoint"
    if _HUB_NAME.fullmatch(name):
        cure += "; `modelport plugins` lists the sources that are loaded, blocked or broken"
    else:
        cure += ', or a name as a hub writes it, "organisation/model"'
    return f"model {name!r}: {tried}; {cure}"


def _no_reader(path: Path) -> str:
    if path.suffix in (".safetensors", ".json"):
        return f"{path} is one file of a checkpoint; give the folder that holds it: {path.parent}"
    if path.suffix in (".bin", ".pt", ".pth"):
        return f'{path} is one file of a checkpoint; give the folder that holds it, {path.parent}, and load_format="pt"'
    return (
        f"no plugin reads the file {path}; `modelport plugins` lists what is loaded, blocked or broken, "
        "or give a folder with config.json and *.safetensors"
    )
