"""Tokenizer files of dead families, made small: a sentencepiece model, a file of ranks, checkpoints that hold them."""

import base64
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelport.inputs.tokenizer import load_tokenizer
from modelport.plugin import Checkpoint, load_plugins

GOLDENS = Path(__file__).parents[2] / "goldens"
FEW_LETTERS = ["the tea eats the hat", "at the heath he ate a hot oat", "one tone, no hat", "a  note"] * 8
CORPUS = [
    "the quick brown fox jumps over the lazy dog, doesn't it? It's 1234 o'clock in philosophy",
    "def main():\n    return [i ** 2 for i in range(10)]  # squares\n",
    "你好 世界 今天 天气 怎么样",
] * 8


@pytest.fixture(scope="session")
def spm() -> Callable[..., bytes]:
    """Makes a sentencepiece model; keywords are options of its trainer."""

    def make(**options: Any) -> bytes:
        from sentencepiece import SentencePieceTrainer

        written = io.BytesIO()
        usual = {"model_type": "bpe", "vocab_size": 315, "byte_fallback": True, "normalization_rule_name": "identity"}
        SentencePieceTrainer.train(
            sentence_iterator=iter(FEW_LETTERS),
            model_writer=written,
            minloglevel=2,
            **{**usual, "remove_extra_whitespaces": False, "character_coverage": 1.0} | options,
        )
        return written.getvalue()

    return make


@pytest.fixture(scope="session")
def model(spm) -> bytes:
    """315 pieces, with the reserved ones of Baichuan and the marks of InternLM's first chats."""
    return spm(user_defined_symbols=["<reserved_106>", "<reserved_107>", "<eoh>", "<eoa>"])


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Every byte, the last one first, then the 34 pairs that merge first in the corpus: 290 ranks."""
    words = [[bytes([byte]) for byte in word.encode()] for line in CORPUS for word in re.findall(r" ?\w+|\W", line)]
    found = [bytes([byte]) for byte in reversed(range(256))]
    while len(found) < 290:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in found:
            found.append(left + right)
        for word in words:
            for at in reversed(range(len(word) - 1)):
                if word[at : at + 2] == [left, right]:
                    word[at : at + 2] = [left + right]
    return {token: rank for rank, token in enumerate(found)}


@pytest.fixture(scope="session")
def rank_file(ranks) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    """Writes a folder: JSON files by their stem, other files by their name."""

    def write(**files: Any) -> Path:
        for name, content in files.items():
            if isinstance(content, bytes):
                (tmp_path / {"spm": "tokenizer.model", "qwen": "qwen.tiktoken"}.get(name, name)).write_bytes(content)
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.fixture
def read() -> Callable:
    """Reads a folder's tokenizer as an engine does."""
    plugins = load_plugins()

    def of(path: Path, config: dict[str, Any] | None = None):
        return load_tokenizer(Checkpoint(path, str(path)), config or {}, plugins)

    return of


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., Path]:
    """Copies a golden checkpoint; its vocabulary grows to `vocab_size` rows."""

    def copy(name: str, vocab_size: int) -> Path:
        shutil.copytree(GOLDENS / name, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        key = "padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"
        tensors = load_file(tmp_path / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for at, tensor in tensors.items():
            if tensor.ndim == 2 and tensor.shape[0] == config[key] and any(w in at for w in ("wte", "head", "embed")):
                more = torch.randn(vocab_size - config[key], tensor.shape[1], generator=generator) * tensor.std()
                tensors[at] = torch.cat([tensor, more.to(tensor.dtype)])
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps({**config, key: vocab_size}))
        return tmp_path

    return copy
