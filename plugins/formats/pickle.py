"""Pickled checkpoints (`*.bin`, `*.pt`), for those who ask for them with `load_format="pt"`.

Decisions: never automatic; torch's restricted unpickler reads nothing but tensors; the file is mapped, and one file is
open at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.plugin import Checkpoint, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

modelport_api = 1

_INDEX = "pytorch_model.bin.index.json"


@hookimpl
def open_weights(checkpoint: Checkpoint, config: dict) -> Iterator[tuple[str, Tensor]] | None:
    return _stream(_files(checkpoint.path)) if checkpoint.load_format == "pt" else None


def _stream(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        tensors = _load(file)
        for name in list(tensors):
            yield name, tensors.pop(name)
        del tensors  # before the next file is opened


def _load(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # unpickling errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{file} cannot be read as plain tensors ({reason}); it is truncated, or holds more than tensors, "
            "which is refused because it could run code: convert the checkpoint to safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} is no dictionary of tensors (a training checkpoint?); save its state_dict instead")
    return tensors


def _is_zip(file: Path) -> bool:
    """Files of before torch 1.6 are no zip archives, and cannot be mapped."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of weights ({error!r}); download it again") from None
        files = [path / Path(name).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index} lists {', '.join(missing)}, not found beside it; download what is missing"
            )
        return files
    files = sorted(path.glob("pytorch_model*.bin")) or sorted([*path.glob("*.pt"), *path.glob("*.pth")])
    if not files:
        raise FileNotFoundError(f'load_format is "pt", but {path} holds no pytorch_model*.bin, *.pt or *.pth file')
    return files
