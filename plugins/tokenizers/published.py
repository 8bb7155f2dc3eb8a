"""Tokenizers of models that published theirs as Python code: which files they have, and what that code did with them.

Decisions: a family is known by the tokenizer class that a checkpoint names, else by its architecture. `tokenizer.json`
wins wherever it lies in the folder, and a chat template that the checkpoint publishes wins over the one from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelport.plugin import Checkpoint, hookimpl
from modelport.plugins.tokenizers import templates

if TYPE_CHECKING:
    from modelport.inputs.tokenizer import Tokenizer
    from modelport.inputs.tokenizer_files import SideFiles

modelport_api = 1

_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_QWEN_VL = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
_GLM4 = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_GLM_ROLES),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_PHI3_SMALL = (
    *("<|dummy_id_2|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|dummy_id_0|>", "<|dummy_id_1|>", "<|end|>"),
    *(f"<|dummy_id_{i}|>" for i in range(3, 12)),
    "<|endofprompt|>",
    *(f"<|dummy_id_{i}|>" for i in range(12, 87)),  # they fill the embedding up to 100352 rows
)


@dataclass(frozen=True)
class Source:
    """What a tokenizer is built from.

    :ivar config: the model's `config.json`.
    :ivar generation: the model's `generation_config.json`.
    """

    folder: Path
    side: SideFiles
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one family's tokenizers are stored.

    :ivar names: tokenizer classes and architectures.
    :ivar file: the vocabulary.
    :ivar build: makes the tokenizer of it; None where `tokenizer.json` is all there ever was.
    :ivar template: the chat template for checkpoints that publish none.
    :ivar needs: tokens that this template writes; a vocabulary that lacks one does not get it.
    :ivar turn_ends: tokens with which the model ends its turn.
    """

    names: tuple[str, ...]
    file: str
    build: Callable[[Source, Family], Tokenizer] | None
    template: str | None
    needs: tuple[str, ...] = ()
    turn_ends: tuple[str, ...] = ()


@hookimpl
def load_tokenizer(checkpoint: Checkpoint, config: dict) -> Tokenizer | None:
    folder = checkpoint.path
    if not folder.is_dir():
        return None
    from modelport.inputs.tokenizer_files import read_side_files

    side = read_side_files(folder)
    config = config or _json(folder / "config.json")  # none is given for the folder of a tokenizer alone
    classes = side.settings.get("tokenizer_class"), config.get("tokenizer_class")
    family = _family(*classes, *(config.get("architectures") or ()))
    if family is None:
        return None
    if (folder / "tokenizer.json").is_file():
        return _with_template(folder, family) if family.build is None else None
    if family.build is None:
        return None
    if not (folder / family.file).is_file():
        if not side.settings:
            return None  # nothing of a tokenizer is here at all
        raise ValueError(
            f"{folder} has a tokenizer_config.json but not {family.file}, the vocabulary itself; download it too, "
            "or pass tokenizer= with a folder that holds it"
        )
    source = Source(folder, side, config, _json(folder / "generation_config.json"))
    return family.build(source, family)


def _family(*names: str | None) -> Family | None:
    return next((family for name in names for family in FAMILIES if name in family.names), None)


def _json(file: Path) -> dict[str, Any]:
    """:raises ValueError: the file is damaged."""
    try:
        content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object; download it again")
    return content


def _with_template(folder: Path, family: Family) -> Tokenizer | None:
    """A `tokenizer.json` without a chat template, with that of the family."""
    from modelport.inputs.tokenizer import Tokenizer
    from modelport.inputs.tokenizer_files import read_folder

    backend, roles, published, clean_up = read_folder(folder)
    return None if published else Tokenizer(backend, roles, {"default": family.template}, clean_up)


def _chat_templates(source: Source, family: Family, knows: Callable[[str], bool]) -> Mapping[str, str]:
    if source.side.chat_templates or family.template is None or not all(map(knows, family.needs)):
        return source.side.chat_templates
    return {"default": family.template}


def _of_pieces(
    source: Source,
    family: Family,
    appended: tuple[str, ...] = (),
    prefix: tuple[str, ...] | None = None,
    spelled: tuple[tuple[str, ...], ...] = (),
    hidden: tuple[str, ...] = (),
    roles: Mapping[str, int] | None = None,
) -> Tokenizer:
    """A sentencepiece model.

    :param appended: special tokens whose ids follow its pieces.
    :param prefix: tokens that begin a text; None for what the `add_bos_token` of its settings says.
    :param spelled: sequences of tokens that are found as a whole.
    :param hidden: special tokens that are not found by themselves.
    :param roles: special tokens by ids, where only ids are published.
    """
    from modelport.plugins.tokenizers.pieces import SentencePieceTokenizer, read_model

    model, side = read_model(source.folder / family.file), source.side
    size = model.get_piece_size()
    added = {size + i: token for i, token in enumerate(appended)}
    added |= {token_id: token.content for token_id, token in side.added_tokens.items()}
    pieces = set(model.id_to_piece(list(range(size))))
    ids = {token: token_id for token_id, token in added.items()}
    # what the published classes take when the settings are silent
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {role: token for role, token in usual.items() if token in pieces} | dict(side.special_tokens)
    named |= {role: added.get(token_id) or model.id_to_piece(token_id) for role, token_id in (roles or {}).items()}
    flagged = [token.content for token in side.added_tokens.values() if token.special]
    special = dict.fromkeys((*named.values(), *side.extra_special_tokens, *appended, *flagged))

    def id_of(token: str) -> int:
        return ids[token] if token in ids else model.piece_to_id(token)

    ends = [("bos_token", True), ("eos_token", False)]
    bos, eos = (
        [named[role]] if role in named and side.settings.get(f"add_{role}", default) else [] for role, default in ends
    )
    return SentencePieceTokenizer(
        model,
        added,
        tuple(special),
        named,
        _chat_templates(source, family, lambda token: token in ids or token in pieces),
        prefix=[id_of(token) for token in (bos if prefix is None else prefix)],
        suffix=[id_of(token) for token in (eos if prefix is None else ())],
        spelled={"".join(tokens): [id_of(token) for token in tokens] for tokens in spelled},
        hidden=hidden,
        turn_ends=family.turn_ends,
    )


def _of_ranks(
    source: Source,
    family: Family,
    pattern: str,
    special: tuple[str, ...],
    roles: Mapping[str, str],
    prefix: tuple[str, ...] = (),
    compose: bool = False,
) -> Tokenizer:
    from modelport.inputs.tokenizer import Tokenizer
    from modelport.plugins.tokenizers.ranks import build, read_ranks

    backend = build(read_ranks(source.folder / family.file), pattern, special, prefix, compose)
    return Tokenizer(
        backend,
        {**roles, **source.side.special_tokens},
        _chat_templates(source, family, special.__contains__),
        turn_ends=family.turn_ends,
    )


def _baichuan(source: Source, family: Family) -> Tokenizer:
    ids = {role: source.generation.get(f"{role}_id") for role in ("user_token", "assistant_token")}
    if None in ids.values():  # a base model
        return _of_pieces(source, replace(family, template=None))
    return _of_pieces(source, family, roles=ids)


def _chatglm(source: Source, family: Family) -> Tokenizer:
    from modelport.plugins.tokenizers.ranks import THREE_DIGITS, is_ranks

    if is_ranks(source.folder / family.file):
        glm4 = replace(family, template=templates.GLM4)
        begin = ("[gMASK]", "<sop>")
        return _of_ranks(source, glm4, THREE_DIGITS, _GLM4, {"eos_token": "<|endoftext|>"}, begin)
    name = f"{source.config.get('_name_or_path')} {source.side.settings.get('name_or_path')}"
    second = "chatglm2" in name.lower()  # the two differ in nothing but their format of chats
    return _of_pieces(
        source,
        replace(family, template=templates.CHATGLM2, turn_ends=()) if second else family,
        appended=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(() if second else _GLM_ROLES)),
        prefix=("[gMASK]", "sop"),
        spelled=(("[gMASK]", "sop"), ("[sMASK]", "sop")),
        hidden=("sop", "eop"),
    )


def _qwen(source: Source, family: Family) -> Tokenizer:
    from modelport.plugins.tokenizers.ranks import SINGLE_DIGITS

    if source.generation.get("chat_format") == "raw":  # a base model
        family = replace(family, template=None)
    special = _QWEN + (_QWEN_VL if source.config.get("visual") else ())
    return _of_ranks(source, family, SINGLE_DIGITS, special, {"eos_token": "<|endoftext|>"}, compose=True)


def _phi3_small(source: Source, family: Family) -> Tokenizer:
    from modelport.plugins.tokenizers.ranks import THREE_DIGITS

    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return _of_ranks(source, family, THREE_DIGITS, _PHI3_SMALL, roles)


_IM = ("<|im_start|>", "<|im_end|>")
_MODEL = "tokenizer.model"
FAMILIES = (
    Family(
        ("BaichuanTokenizer", "BaiChuanTokenizer", "BaichuanForCausalLM", "BaiChuanForCausalLM"),
        _MODEL,
        _baichuan,
        templates.BAICHUAN,
    ),
    Family(
        ("InternLMTokenizer", "InternLMForCausalLM"),
        _MODEL,
        _of_pieces,
        templates.INTERNLM,
        needs=("<eoh>", "<eoa>"),
        turn_ends=("<eoa>",),
    ),
    Family(
        ("InternLM2Tokenizer", "InternLM2ForCausalLM"),
        _MODEL,
        _of_pieces,
        templates.INTERNLM2,
        needs=_IM,
        turn_ends=_IM[1:],
    ),
    Family(("OrionTokenizer", "OrionForCausalLM"), _MODEL, _of_pieces, templates.ORION),
    Family(("ArcticTokenizer", "ArcticForCausalLM"), _MODEL, _of_pieces, templates.CHATML, _IM, _IM[1:]),
    Family(("MiniCPMForCausalLM",), _MODEL, _of_pieces, templates.MINICPM),
    Family(
        ("ChatGLMTokenizer", "ChatGLM4Tokenizer", "ChatGLMModel", "ChatGLMForConditionalGeneration"),
        _MODEL,
        _chatglm,
        templates.CHATGLM3,
        turn_ends=("<|user|>", "<|observation|>"),
    ),
    Family(("QWenTokenizer", "QWenLMHeadModel"), "qwen.tiktoken", _qwen, templates.QWEN, turn_ends=_IM[1:]),
    Family(
        ("Phi3SmallTokenizer", "Phi3SmallForCausalLM"),
        "cl100k_base.tiktoken",
        _phi3_small,
        templates.PHI3_SMALL,
        turn_ends=("<|end|>",),
    ),
    Family(("XverseForCausalLM",), "tokenizer.json", None, templates.XVERSE),
    Family(("DeepseekForCausalLM",), "tokenizer.json", None, templates.DEEPSEEK),
)
