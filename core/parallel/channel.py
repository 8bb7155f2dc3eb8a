"""Messages between an engine and the processes that work for it: a fixed header, JSON, and tensors as safetensors.

Decisions: nothing is ever unpickled. Within a machine messages go through a socket in a folder that only this user can
enter. Between machines both ends first prove that they know a secret, and every message carries a code (HMAC-SHA256)
over its number in the conversation, so that none can be forged, changed, repeated or left out. Nothing is encrypted:
neither are the tensors that gloo and NCCL send, so the network has to be a trusted one. Nothing here imports torch,
because whoever forks workers starts with it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_HEADER = struct.Struct("!2sBBQIQ")  # magic, version, kind, number, bytes of JSON, bytes of tensors
_MAGIC, _VERSION = b"mP", 1
_CODE = 32  # bytes of a code
_MOST_JSON, _MOST_TENSORS = 1 << 28, 1 << 36
_LOST = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 11_000))
"""A machine that is silent for 11 s is lost. The last one, in milliseconds, is for when it has not acknowledged what it
was sent, which the system would repeat for a quarter of an hour."""

HANDSHAKE = 5.0
"""Seconds that a peer gets to prove itself."""


class ChannelError(ConnectionError):
    """What came is no message of ours: another program, another version, or the wrong secret."""


class Kind(enum.IntEnum):
    """What a message is about."""

    HELLO = 1  # who connects: an agent's node, or a worker's rank
    PLUGINS = 2  # engine to agent: load these; back: they are loaded
    FORK = 3  # engine to agent: start workers
    KILL = 4  # engine to agent: end them; back: they are gone
    ENDED = 5  # agent to engine: one of them ended
    MEET = 6  # engine to worker: make a meeting point; back: where it is
    LOAD = 7  # engine to worker: load your part; back: what it has
    STEP = 8  # engine to worker: run this plan
    RESULT = 9  # worker to engine: what the step found
    PING = 10
    PONG = 11
    ERROR = 12


@dataclass(frozen=True)
class Frame:
    """One message; `number` ties an answer to what it answers."""

    kind: Kind
    number: int = 0
    json: bytes = b"{}"
    packed: bytes = b""

    @classmethod
    def of(cls, kind: Kind, message: Any = None, number: int = 0, tensors: Mapping[str, Tensor] | None = None) -> Frame:
        packed = b""
        if tensors:
            import torch
            from safetensors.torch import save

            # a copy of each, since several may be views of one
            packed = save({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
        return cls(kind, number, json.dumps({} if message is None else message, separators=(",", ":")).encode(), packed)

    @property
    def message(self) -> Any:
        return json.loads(self.json)

    def tensors(self) -> dict[str, Tensor]:
        if not self.packed:
            return {}
        from safetensors.torch import load

        return load(self.packed)


class Channel:
    """One end of a conversation; any thread may send, one receives.

    :param keys: (ours, theirs) when messages carry codes.
    """

    def __init__(self, sock: socket.socket, keys: tuple[bytes, bytes] | None = None):
        self._socket, self._keys = sock, keys
        self._sending = threading.Lock()
        self._sent = self._received = 0
        self._partial = bytearray()  # of the message that is coming, in case somebody interrupts
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is cut off says no goodbye
            for name, value in _LOST:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def limit(self, seconds: float) -> None:
        """The longest that a peer may keep `send` and `receive` waiting in the middle of a message."""
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def send(self, frame: Frame) -> None:
        """:raises OSError: the other end is gone; `BlockingIOError` when it takes nothing (`limit`)."""
        header = _HEADER.pack(_MAGIC, _VERSION, frame.kind, frame.number, len(frame.json), len(frame.packed))
        with self._sending:
            code = b""
            if self._keys is not None:
                code = _code(self._keys[0], self._sent, header, frame.json, frame.packed)
            self._sent += 1
            self._socket.sendall(b"".join((header, frame.json, frame.packed, code)))

    def receive(self) -> Frame:
        """The next message.

        :raises EOFError: the other end is gone.
        :raises ChannelError: what came is no message of ours.
        """
        magic, version, kind, number, size, more = _HEADER.unpack(self._need(_HEADER.size))
        if magic != _MAGIC or size > _MOST_JSON or more > _MOST_TENSORS:
            raise ChannelError("what came is no message of modelport")
        if version != _VERSION:
            raise ChannelError(f"the other end speaks version {version} of our messages, this one {_VERSION}")
        code = _CODE if self._keys else 0
        whole = self._need(_HEADER.size + size + more + code)
        end = _HEADER.size + size
        header, text, packed = whole[: _HEADER.size], whole[_HEADER.size : end], whole[end : end + more]
        if self._keys is not None:
            wanted = _code(self._keys[1], self._received, header, text, packed)
            if not hmac.compare_digest(wanted, whole[end + more :]):
                raise ChannelError("a message carries the wrong code: it was changed, repeated, or is a stranger's")
        self._received += 1
        self._partial.clear()
        return Frame(Kind(kind), number, text, packed)

    def _need(self, count: int) -> bytes:
        """The first `count` bytes of the coming message; no byte of the one after it is taken."""
        while len(self._partial) < count:
            found = self._socket.recv(min(count - len(self._partial), 1 << 20))
            if not found:
                raise EOFError("the other end closed its connection")
            self._partial += found
        return bytes(self._partial[:count])

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def own_address(self) -> str:
        """The address of this machine under which the other end knows it; empty within a machine."""
        return "" if self._socket.family == socket.AF_UNIX else self._socket.getsockname()[0]

    def close(self) -> None:
        self._socket.close()


class Listener:
    """Where workers and agents connect to.

    :param place: a path for a socket of this machine, or (host, port) for a TCP port; port 0 is any that is free.
    :param secret: what those who connect have to know; None within a machine.
    """

    def __init__(self, place: str | tuple[str, int], secret: bytes | None = None):
        assert secret is not None or isinstance(place, str), "what listens on a port asks for a secret"
        self._secret = secret
        if isinstance(place, str):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(place)
            self._socket.listen(128)
            self.address = f"unix:{place}"
        else:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            self._socket = socket.create_server(place, family=family, backlog=128)
            self.address = f"tcp:{place[0]}:{self._socket.getsockname()[1]}"

    def accept(self) -> Channel | None:
        """The next that connects; None when it could not prove itself."""
        found, _ = self._socket.accept()
        if self._secret is None:
            return Channel(found)
        try:
            return Channel(found, _prove(found, self._secret, listens=True))
        except OSError:
            found.close()
            return None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def connect(address: str, secret: bytes | None = None) -> Channel:
    """Connect to a `Listener`.

    :param address: the listener's.
    :raises OSError: nobody listens there.
    :raises ChannelError: the secrets differ.
    """
    kind, _, where = address.partition(":")
    if kind == "unix":
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        found.connect(where)
        return Channel(found)
    host, _, port = where.rpartition(":")
    found = socket.create_connection((host, int(port)), timeout=HANDSHAKE)
    try:
        return Channel(found, _prove(found, secret or b"", listens=False))
    except OSError:
        found.close()
        raise


def new_secret() -> bytes:
    return secrets.token_hex(32).encode()


def _prove(sock: socket.socket, secret: bytes, listens: bool) -> tuple[bytes, bytes]:
    """Both ends send a random number, and then a code over both numbers that only the secret can make.

    :return: the keys of what this end sends and of what it receives, of this conversation alone.
    """
    sock.settimeout(HANDSHAKE)
    ours = os.urandom(32)
    sock.sendall(_MAGIC + bytes([_VERSION]) + ours)
    greeting = _exactly(sock, 35)
    if greeting[:2] != _MAGIC or greeting[2] != _VERSION:
        raise ChannelError("what answers is no modelport, or one of another version")
    both = (ours, greeting[3:]) if listens else (greeting[3:], ours)
    keys = [_code(secret, 0, name, *both) for name in (b"listener", b"caller")]
    mine, theirs = keys if listens else reversed(keys)
    sock.sendall(_code(mine, 0, b"proof"))
    proof = _exactly(sock, _CODE)
    if not hmac.compare_digest(proof, _code(theirs, 0, b"proof")):
        raise ChannelError("the other end knows another secret; set the same MODELPORT_SECRET on every machine")
    sock.settimeout(None)
    return mine, theirs


def _exactly(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = sock.recv(count - len(found))
        if not more:
            raise ChannelError("the other end closed its connection; set the same MODELPORT_SECRET on every machine")
        found += more
    return found


def _code(key: bytes, number: int, *parts: bytes) -> bytes:
    made = hmac.new(key, number.to_bytes(8, "big"), hashlib.sha256)
    for part in parts:
        made.update(len(part).to_bytes(8, "big"))
        made.update(part)
    return made.digest()
