"""Read the header of a GGUF file: its key-value fields and where its tensors lie.

Decisions: an own reader, because the `gguf` library's takes seconds for a vocabulary of 50,000 tokens (it builds one
array object per string) and this one a tenth of a second. Lengths are checked against the file before they are
trusted, so that a truncated download is named as such.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DAMAGED = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.

    :ivar shape: row-major, as torch has it (GGUF stores the fastest dimension first).
    :ivar type: number of its GGML type.
    :ivar offset: of its first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Fields by key (arrays as lists), and tensors in file order."""

    path: Path
    fields: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return self.fields.get("general.architecture", "")

    def get(self, key: str) -> Any:
        """A field of the architecture's own (`"block_count"` for `"llama.block_count"`), or None."""
        return self.fields.get(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> TensorInfo | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: Path) -> Header:
    """Read the header of `path`.

    :raises ValueError: it is no GGUF file of version 2 or 3, or it is truncated.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} does not begin with {MAGIC.decode()}: it is no GGUF file, or damaged; {_DAMAGED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _Reader(mapped, path).header()
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
                raise ValueError(f"the header of {path} is truncated or damaged ({error!r}); {_DAMAGED}") from None


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4

    def header(self) -> Header:
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF version {version}, and only 2 and 3 are read; convert it anew")
        tensor_count, field_count = self.scalar("Q"), self.scalar("Q")
        fields = {self.string(): self.value(self.scalar("I")) for _ in range(field_count)}
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        tensors = tuple(TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in infos)
        return Header(self.path, fields, tensors)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise struct.error(f"a string of {length} bytes")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data) - self.at:
            raise struct.error(f"an array of {count} values")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            return [self.value(kind) for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from(layout, self.data, self.at))
        self.at += struct.calcsize(layout)
        return values

    def strings(self, count: int) -> list[str]:
        """A vocabulary has a hundred thousand of them, hence no call per string."""
        data, at, length_at, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8 + length
            found.append(data[at - length : at].decode("utf-8"))
        if at > len(data):
            raise struct.error("an array of strings")
        self.at = at
        return found

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")
