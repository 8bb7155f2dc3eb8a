"""Read a published tokenizer: `tokenizer.json`, and what its side files add to it.

Decisions: special tokens, flags and templates are taken from where transformers takes them, in its order; the
`add_bos_token` and `add_eos_token` of a `tokenizer_config.json` count for nothing beside a `tokenizer.json`, which
carries its own post-processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SideFiles:
    """What a folder says of its tokenizer beside the vocabulary itself.

    :ivar settings: `tokenizer_config.json`, with `special_tokens_map.json` over it where that still counts.
    :ivar special_tokens: role to token, `{"eos_token": "</s>"}`.
    :ivar added_tokens: id to token, as `added_tokens_decoder` and `added_tokens.json` declare them.
    :ivar extra_special_tokens: tokens without a role, which may or may not be in the vocabulary.
    :ivar chat_templates: name to jinja source; `"default"` is the one used when nobody names another.
    """

    settings: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    added_tokens: Mapping[int, tokenizers.AddedToken]
    extra_special_tokens: tuple[str, ...]
    chat_templates: Mapping[str, str]


def read_side_files(folder: Path) -> SideFiles:
    """Read what lies beside a vocabulary; files that are not there say nothing.

    :raises ValueError: one of the files is damaged.
    """
    settings = _settings(folder)
    added = {int(token_id): _added(token) for token_id, token in (settings.get("added_tokens_decoder") or {}).items()}
    for content, token_id in _json(folder / "added_tokens.json").items():
        added.setdefault(int(token_id), _added(content, special=True))
    extra = (_content(token) for token in _extra(settings))
    return SideFiles(
        settings,
        _roles(settings),
        added,
        tuple(token for token in extra if token is not None),
        _chat_templates(folder, settings),
    )


def read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str], bool]:
    """Read `tokenizer.json` and the files beside it, as the arguments that `Tokenizer` takes.

    :raises ValueError: one of the files is damaged.
    """
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file} cannot be read ({error}); download it again") from None
    settings = _settings(folder)
    roles = _roles(settings)
    _add_missing(backend, settings, roles)
    # transformers ignores the wish on BPE, where the spaces before punctuation are the text's own
    clean_up = settings.get("clean_up_tokenization_spaces") is True and not isinstance(
        backend.model, tokenizers.models.BPE
    )
    return backend, roles, _chat_templates(folder, settings), clean_up


def has_own_code(folder: Path) -> bool:
    """Whether the tokenizer is a Python class that lies beside it (or in another repository)."""
    auto_map = _json(folder / "tokenizer_config.json").get("auto_map")
    return "AutoTokenizer" in auto_map if isinstance(auto_map, dict) else bool(auto_map)


def _settings(folder: Path) -> dict[str, Any]:
    settings = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # files of before 2023 keep special tokens apart
        settings |= _json(folder / "special_tokens_map.json")
    return settings


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object; download it again")
    return content


def _roles(settings: Mapping[str, Any]) -> dict[str, str]:
    return {role: token for role in SPECIAL_TOKENS if (token := _content(settings.get(role))) is not None}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    return list(extra.values() if isinstance(extra, dict) else extra)


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Give the backend the tokens that only the side files know."""
    declared = {
        int(token_id): _added(token) for token_id, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    have = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(declared.items()) if repr(token) not in have]
    flags = {token.content: token for token in declared.values()}
    named = [value for key, value in settings.items() if key.endswith("_token")]
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | {token.content for token in new}
    for token in [*named, *_extra(settings)]:
        content = _content(token)
        if content is not None and content not in known:
            new.append(flags.get(content) or _added(token, special=True))
            known.add(content)
    for token in new:
        if token.content in roles.values():
            token.special = True
    if new:
        backend.add_tokens(new)


def _added(token: Any, special: bool = False) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=special)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = {name: bool(token[name]) for name in names if name in token}
    return tokenizers.AddedToken(token["content"], **({"special": special} | given))


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name; a file of its own wins over an entry in `tokenizer_config.json`."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: file.read_text("utf-8") for name, file in files.items()}
    return named_templates(settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template"))


def named_templates(template: Any) -> dict[str, str]:
    """Name to source: a single template is the default one, a list holds `{"name": ..., "template": ...}`."""
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return dict(template or {})
