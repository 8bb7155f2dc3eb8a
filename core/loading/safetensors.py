"""Stream the tensors of a folder's safetensors files, one at a time, with bounded resident memory.

Decisions: every header is read before the first tensor is handed out, so that a missing or truncated shard is known
in milliseconds; a file is mapped, not read, and mapped anew every 32 MB, because pages that were touched stay
resident until the mapping goes: a consumer that copies each tensor sees a peak of that much plus the largest tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_BYTES = 32 * 2**20
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


def open_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Check the files of `folder` now, and return an iterator over their `(name, tensor)` pairs, in file order.

    :return: tensors on the CPU in the stored dtype; each maps its file, so copy it before asking for the next.
    :raises FileNotFoundError: there are no safetensors files, or a shard is missing.
    :raises ValueError: a file is truncated or not safetensors, the index is damaged, a tensor is stored in two files.
    """
    names = {file: _names(file) for file in _files(folder)}
    home: dict[str, Path] = {}
    for file, held in names.items():
        for name in held:
            if name in home:
                raise ValueError(
                    f"tensor {name!r} is stored in both {home[name]} and {file}; keep the files of one checkpoint only"
                )
            home[name] = file
    return _stream(names)


def _stream(names: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file, held in names.items():
        mapped, touched = None, 0
        for name in held:
            if mapped is None or touched >= WINDOW_BYTES:
                del mapped  # before the next one is opened; its pages go with it
                mapped, touched = safe_open(file, framework="pt"), 0
            tensor = mapped.get_tensor(name)
            touched += tensor.nbytes
            yield name, tensor
            del tensor  # it would hold the old mapping through the next window


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as header:
            return header.offset_keys()
    except (SafetensorError, ValueError) as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} ({size} bytes) is truncated or no safetensors file ({error}); download or copy it again"
            + ("; it looks like a git-lfs pointer: run `git lfs pull`" if _is_lfs_pointer(file) else "")
        ) from None


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs")


def _files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / INDEX
    if index.is_file():
        files = _indexed(index)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index} lists {', '.join(missing)}, which {folder} lacks; download what is missing"
            )
        return files
    consolidated = folder / "consolidated.safetensors"  # of checkpoints in their authors' own layout
    if consolidated.is_file() and not (folder / "config.json").is_file():
        return [consolidated]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and not _SHARD.fullmatch(found[0].name):
        return found
    if found:
        return _numbered(folder, found)
    raise FileNotFoundError(_nothing(folder))


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error!r}); download it again") from None
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} points outside its own folder: {name!r}; do not use this checkpoint")
    return files


def _numbered(folder: Path, found: list[Path]) -> list[Path]:
    """Shards without an index: good as long as their names say that they are all there."""
    shards = [_SHARD.fullmatch(file.name) for file in found]
    sets = {(m[1], m[3]) for m in shards if m}
    if len(sets) != 1 or not all(shards):
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"{folder} holds several safetensors files ({names}) and neither model.safetensors nor {INDEX}; "
            "keep those of one checkpoint, or add its index"
        )
    have, total = {int(m[2]) for m in shards if m}, int(next(iter(sets))[1])
    missing = sorted(set(range(1, total + 1)) - have)
    if missing:
        numbers = ", ".join(map(str, missing))
        raise FileNotFoundError(f"{folder} lacks shard {numbers} of {total}; download what is missing")
    return found


def _nothing(folder: Path) -> str:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return (
            f"{folder} holds no safetensors files, only pickled ones ({pickles[0].name}); unpickling can run code that "
            'hides in the file, so it is never automatic: pass load_format="pt" if you trust where it came from'
        )
    others = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return f"{folder} holds no *.safetensors files (it holds {others}); give the folder of a complete download"
