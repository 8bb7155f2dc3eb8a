"""Build a tokenizer from the header of a GGUF file.

Decisions: the file names its way of splitting text (`tokenizer.ggml.pre`) and each name stands here with what it
means; a name that is not here is refused, because text that is split otherwise gives ids that look right and are not.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from modelport.inputs import tokenizer as inputs

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "gpt-2": "",  # the byte-level step's own pattern
    "default": "",
    "smollm": "digits",  # every digit by itself, then as gpt-2
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": _LETTERS + r"|\p{N}{1,3}" + _REST,
    "llama3": _LETTERS + r"|\p{N}{1,3}" + _REST,
    "llama-v3": _LETTERS + r"|\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"|\p{N}" + _REST,
    "deepseek-r1-qwen": _LETTERS + r"|\p{N}" + _REST,
}


def build_tokenizer(fields: dict[str, Any]) -> inputs.Tokenizer:
    """Build the tokenizer that the header `fields` describe.

    :raises ValueError: there is none, or it is of a kind that is not known here.
    """
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"the GGUF file holds a tokenizer of kind {kind!r}, and only 'gpt2' and 'llama' are known; "
            "pass tokenizer= with the folder of the original model's tokenizer"
        )
    backend = _byte_level(tokens, fields) if kind == "gpt2" else _sentencepiece(tokens, fields)
    types = fields.get("tokenizer.ggml.token_type") or ()
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == _CONTROL)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    roles = {
        role: tokens[token_id] for role, token_id in ids.items() if token_id is not None and token_id < len(tokens)
    }
    # files of before the flags existed: a sentencepiece vocabulary begins each text with its bos token
    add_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in roles
    add_eos = fields.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in roles
    if add_bos or add_eos:
        ends = [role for role, wanted in (("bos_token", add_bos), ("eos_token", add_eos)) if wanted]
        backend.post_processor = processors.TemplateProcessing(
            single=[*([roles["bos_token"]] if add_bos else []), "$A", *([roles["eos_token"]] if add_eos else [])],
            special_tokens=[(roles[role], ids[role]) for role in ends],
        )
    return inputs.Tokenizer(backend, roles, _chat_templates(fields))


def _byte_level(tokens: list[str], fields: dict[str, Any]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _SPLITS:
        raise ValueError(
            f"the GGUF file splits text as {pre!r} (tokenizer.ggml.pre), known are {', '.join(sorted(_SPLITS))}; "
            "pass tokenizer= with the folder of the original model's tokenizer"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    whole_words = "llama" in pre  # Llama 3 looks a word up before it merges
    backend = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=whole_words))
    split = _SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("", "digits"))
    if split == "":
        backend.pre_tokenizer = byte_level
    else:
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if split == "digits"
            else pre_tokenizers.Split(Regex(split), behavior="isolated")
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], fields: dict[str, Any]) -> Tokenizer:
    vocab = _ids(tokens)
    for token, token_id in list(vocab.items()):  # some writers spell runs of spaces with real spaces
        if " " in token and not token.strip():
            vocab.setdefault("▁" * len(token), token_id)
            del vocab[token]
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab,
            _implied_merges(vocab),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _implied_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Sentencepiece stores no merges: any two tokens that join to a third do merge, earlier tokens first."""
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted((cut for cut in cuts if cut[0] in vocab and cut[1] in vocab), key=lambda c: vocab[c[0]])
    return merges


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}


def _chat_templates(fields: dict[str, Any]) -> dict[str, str]:
    start = "tokenizer.chat_template"
    named = {key.removeprefix(start + "."): text for key, text in fields.items() if key.startswith(start + ".")}
    return named | ({"default": fields[start]} if start in fields else {})
