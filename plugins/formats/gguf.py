"""GGUF files: configuration, tokenizer and weights out of one file.

Decisions: weights are dequantised to float32 as they stream, one tensor at a time, read from the file and not mapped,
so that the peak is the largest tensor; names and layouts become those of the original checkpoint (llama.cpp reorders
and shifts some weights), so that a model's family file needs to know nothing of GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.plugin import Checkpoint, hookimpl
from modelport.plugins.formats.gguf_header import MAGIC, Header, read_header
from modelport.plugins.formats.gguf_models import Family, config_of, family_of
from modelport.plugins.formats.gguf_tensors import check_size, library, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from modelport.inputs.tokenizer import Tokenizer

modelport_api = 1

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@hookimpl
def read_config(checkpoint: Checkpoint) -> dict | None:
    path = _file(checkpoint, unless="config.json")
    if path is None:
        return None
    return config_of(read_header(path))


@hookimpl
def load_tokenizer(checkpoint: Checkpoint, config: dict) -> Tokenizer | None:
    path = _file(checkpoint, unless="tokenizer.json")
    if path is None:
        return None
    from modelport.plugins.formats.gguf_tokenizer import build_tokenizer

    return build_tokenizer(read_header(path).fields)


@hookimpl
def open_weights(checkpoint: Checkpoint, config: dict) -> Iterator[tuple[str, Tensor]] | None:
    path = _file(checkpoint, unless="*.safetensors")
    if path is None:
        return None
    library()  # its absence is known before anything is read
    header = read_header(path)
    check_size(header)
    return _stream(header)


def _file(checkpoint: Checkpoint, unless: str) -> Path | None:
    """The GGUF file of a checkpoint; a folder that also holds `unless` has that from there."""
    path, asked = checkpoint.path, checkpoint.load_format == "gguf"
    if checkpoint.load_format in ("safetensors", "pt"):
        return None
    if path.is_file():
        with path.open("rb") as file:
            mine = path.suffix == ".gguf" or file.read(4) == MAGIC
        if asked and not mine:
            raise ValueError(f'load_format is "gguf", but {path} is no GGUF file; give the *.gguf file')
        return path if mine else None
    if any(path.glob(unless)) and not (asked and unless == "*.safetensors"):
        return None
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{path} holds several GGUF files ({names}); give the path of one (parts of a split file: merge them)"
        )
    if asked and not files:
        raise FileNotFoundError(f'load_format is "gguf", but {path} holds no *.gguf file')
    return files[0] if files else None


def _stream(header: Header) -> Iterator[tuple[str, Tensor]]:
    family = family_of(header)
    for info in header.tensors:
        if info.name == "rope_freqs.weight":  # in the configuration already
            continue
        name = _original_name(info.name, family)
        yield name, family.restore(name, read_tensor(header, info), header)


def _original_name(name: str, family: Family) -> str:
    """A name that is not known stays as it is: the loader then refuses it by that name."""
    layer, (base, _, kind) = _LAYER.fullmatch(name), name.rpartition(".")
    if layer:
        number, base, kind = layer.groups()
        return f"{family.names[base].format(number)}.{kind}" if base in family.names else name
    return f"{family.names[base]}.{kind}" if base in family.names else name
