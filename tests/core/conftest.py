"""A tiny model with a byte-level tokenizer and a chat template, as files."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """320 tokens: 64 special ones, then every byte."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", *(f"<extra_{i}>" for i in range(59))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A folder with a tiny random Llama."""
    folder = tmp_path_factory.mktemp("tiny")
    ModuleReference(load_plugins().find(["LlamaForCausalLM"])).save(folder)
    write_tokenizer(folder)
    return str(folder)
