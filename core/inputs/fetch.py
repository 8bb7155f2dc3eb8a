"""Get the bytes of a picture, a film or a sound: from a file, a `file://`, `http(s)://` or `data:` URL, or as they are.

Decisions: message parts of a server come from strangers, so nothing is unbounded and nothing inside the house can be
asked for. A URL's host is resolved once, every address it has must be a public one, and the connection goes to the
address that was checked, not to the name a second time; a redirect is a new URL and passes the same checks. One timer
closes the socket when the time is up, however slowly the other side sends. Proxies of the environment are not used:
they would do the resolving. The standard library's HTTP client is all that is needed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

from modelport import __version__

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|data:", re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_CHUNK = 1 << 16
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")  # both alphabets of base64 are in use
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Answers machines of one cloud about themselves, from an address that counts as public.
_AZURE_HOST = ipaddress.ip_address("168.63.129.16")


class MediaError(ValueError):
    """A picture, film or sound that cannot be used: the message says which, why, and what would help."""


@dataclass(frozen=True)
class MediaLimits:
    """How much one item may cost, and where it may come from.

    :param max_pixels: of one picture or one frame; known from the header, before anything is decoded.
    :param max_bytes: of a file, a download, or the content of a data URL.
    :param max_seconds: of sound.
    :param max_frames: how many frames of a film may be decoded to get at the wanted ones.
    :param max_video_pixels: of all frames together that are kept of one film (three bytes each).
    :param timeout_s: seconds for a download with all its redirects, and once more for decoding a film.
    :param allowed_local_path: the folder below which `file://` URLs may read; None: none may.
    :param allowed_domains: hosts that URLs may name, such as `example.com` or `*.example.com`; empty: any.
    :param allow_private: also addresses that are not public, such as an intranet's or this machine's own.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 256 << 20
    max_seconds: float = 1800.0
    max_frames: int = 36_000
    max_video_pixels: int = 1 << 29
    timeout_s: float = 30.0
    allowed_local_path: Path | None = None
    allowed_domains: tuple[str, ...] = ()
    allow_private: bool = False


def fetch(source: str | Path | bytes, limits: MediaLimits, *, trusted: bool = True, name: str = "media") -> bytes:
    """Return the bytes that `source` names.

    :param source: a path; a `file://`, `http://`, `https://` or `data:` URL; or the bytes themselves.
    :param trusted: whether a plain path may be read. What comes from strangers passes False.
    :param name: what error messages call the item, such as "image 2".
    :raises MediaError: there is nothing at that place, it is not allowed, too large, or too slow.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _bounded(bytes(source), limits, name)
    label = f"{name} ({shortened(source)})"
    if isinstance(source, str) and (match := _SCHEME.match(source)):
        scheme = (match[1] or "data").lower()
        if scheme == "data":
            return _data_url(source, limits, label)
        if scheme in ("http", "https"):
            return _download(source, limits, label)
        if scheme == "file":
            return _read(_local_path(source, limits, label), limits, label)
        raise MediaError(f"{label}: {scheme}:// is not supported; use http://, https://, data: or file://")
    if not trusted:
        raise MediaError(f"{label}: give an http://, https:// or data: URL; files of this machine are not open here")
    return _read(Path(source), limits, label)


def shortened(source: object) -> str:
    """`source` as an error message shows it: no credentials, no query, at most 80 characters."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        return type(source).__name__
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if text[:5].lower() == "data:":
        return text[:40] + ("…" if len(text) > 40 else "")
    if _SCHEME.match(text):
        text = re.sub(r"//[^/@]*@", "//", text).partition("?")[0]
    return text if len(text) <= 80 else f"{text[:50]}…{text[-29:]}"


def _bounded(data: bytes, limits: MediaLimits, label: str) -> bytes:
    if not data:
        raise MediaError(f"{label}: it is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise _too_large(label, len(data), limits)
    return data


def _too_large(label: str, size: int | None, limits: MediaLimits) -> MediaError:
    has = "more" if size is None else f"{size} bytes, more"
    return MediaError(
        f"{label}: it has {has} than the limit of {limits.max_bytes} bytes (max_bytes); send a smaller one"
    )


def _read(path: Path, limits: MediaLimits, label: str) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):  # a device or a pipe need never end
                raise MediaError(f"{label}: that is not a file")
            if info.st_size > limits.max_bytes:
                raise _too_large(label, info.st_size, limits)
            return _bounded(file.read(limits.max_bytes + 1), limits, label)
    except FileNotFoundError:
        raise MediaError(f"{label}: no such file") from None
    except (OSError, ValueError) as error:  # no permission, a folder, a name too long or with a zero byte
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{label}: cannot read it: {getattr(error, 'strerror', None) or error}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a named pipe waits for a writer otherwise


def _local_path(url: str, limits: MediaLimits, label: str) -> Path:
    parts = urlsplit(url)
    if limits.allowed_local_path is None:
        raise MediaError(f"{label}: file:// URLs are off; set allowed_local_path to the folder they may read from")
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{label}: a file:// URL has three slashes: file:///folder/name")
    try:
        path = Path(os.fsdecode(unquote_to_bytes(parts.path))).resolve()
    except (OSError, ValueError, RuntimeError):
        raise MediaError(f"{label}: that is not a path") from None
    if not path.is_relative_to(limits.allowed_local_path.resolve()):  # after `..` and links were followed
        raise MediaError(f"{label}: it lies outside {limits.allowed_local_path}, the folder that may be read")
    return path


def _data_url(url: str, limits: MediaLimits, label: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"{label}: a data URL has a comma before its content: data:image/png;base64,iVBOR…")
    if len(body) > 4 * limits.max_bytes:  # percent-encoding triples, base64 adds a third
        raise _too_large(label, None, limits)
    if not head.lower().rstrip().endswith(";base64"):
        return _bounded(unquote_to_bytes(body), limits, label)
    text = unquote_to_bytes(body) if "%" in body else body.encode("ascii", "replace")
    text = text.translate(_PLAIN_ALPHABET, b" \t\r\n").rstrip(b"=")
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{label}: the content is not base64: {error}") from None
    return _bounded(data, limits, label)


class _Deadline:
    """Closes the connection in use when the time is up, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
            if self.expired:
                self._close()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            # the plain method: that of a TLS socket would take the TLS state away under a reader in another thread
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    """HTTP(S) to an address that was checked, for a host that is named in the request and the certificate."""

    def __init__(self, url: SplitResult, address: str, timeout: float, deadline: _Deadline) -> None:
        self._secure = url.scheme == "https"
        port = url.port or (443 if self._secure else 80)
        super().__init__(url.hostname, port, timeout=timeout)
        self.default_port = 443 if self._secure else 80  # so that the Host header is right
        self._address, self._deadline = address, deadline

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self._deadline.watch(plain)
        self.sock = plain
        if self._secure:
            # the wrapped socket takes over the descriptor
            self.sock = ssl.create_default_context().wrap_socket(
                plain, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._deadline.watch(self.sock)
            self.sock.do_handshake()


def _download(source: str, limits: MediaLimits, label: str) -> bytes:
    url = source
    with _Deadline(limits.timeout_s) as deadline:
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                found = _get(_checked_url(url, limits, label), limits, deadline, label)
                if isinstance(found, bytes):
                    if deadline.expired:
                        raise TimeoutError
                    return found
                url = urljoin(url, found[0])
        except MediaError:
            if not deadline.expired:
                raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not deadline.expired and not isinstance(error, TimeoutError):
                reason = str(error) or type(error).__name__
                raise MediaError(f"{label}: the download failed: {reason}") from None
        else:
            raise MediaError(f"{label}: more than {_MOST_REDIRECTS} redirects; give the address of the file itself")
    raise MediaError(f"{label}: no answer, or not all of it, within {limits.timeout_s:g} s (timeout_s)")


def _get(url: SplitResult, limits: MediaLimits, deadline: _Deadline, label: str) -> bytes | tuple[str]:
    """The body, or where a redirect leads."""
    connection = None
    try:
        for address in (addresses := _addresses(url, limits, label)):
            connection = _Connection(url, address, limits.timeout_s, deadline)
            try:
                connection.connect()
                break
            except OSError:
                connection.close()
                if address == addresses[-1] or deadline.expired:
                    raise
        target = quote(url.path or "/", safe="/%:@!$&'()*+,;=~") + (
            "?" + quote(url.query, safe="/%:@!$&'()*+,;=~?[]|") if url.query else ""
        )
        headers = {"User-Agent": f"modelport/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and answer.headers.get("Location"):
            return (answer.headers["Location"],)
        if answer.status != 200:
            raise MediaError(f"{label}: the server answered {answer.status} {answer.reason}".rstrip())
        if answer.length is not None and answer.length > limits.max_bytes:
            raise _too_large(label, answer.length, limits)
        body = bytearray()
        while chunk := answer.read1(_CHUNK):
            body += chunk
            if len(body) > limits.max_bytes:
                raise _too_large(label, None, limits)
        if answer.length:
            raise MediaError(f"{label}: the download ended {answer.length} bytes early; try again")
        return _bounded(bytes(body), limits, label)
    finally:
        if connection is not None:
            connection.close()


def _checked_url(url: str, limits: MediaLimits, label: str) -> SplitResult:
    if re.search(r"[\s\\\x00-\x1f\x7f]", url):  # parsers disagree about where such a URL leads
        raise MediaError(f"{label}: a URL has no spaces, control characters or backslashes; percent-encode them")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise MediaError(f"{label}: that is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise MediaError(f"{label}: it leads to {shortened(url)}, which is no http:// or https:// address")
    if limits.allowed_domains and not any(_matches(host, domain) for domain in limits.allowed_domains):
        allowed = ", ".join(limits.allowed_domains)
        raise MediaError(f"{label}: the host {host} is not among the allowed domains ({allowed})")
    return parts


def _matches(host: str, domain: str) -> bool:
    host, domain = host.lower().rstrip("."), domain.lower().rstrip(".")
    return host.endswith(domain[1:]) if domain.startswith("*.") else host == domain


def _addresses(url: SplitResult, limits: MediaLimits, label: str) -> list[str]:
    host = url.hostname
    assert host is not None
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise MediaError(f"{label}: the host {host} has no address") from None
    addresses = list(dict.fromkeys(answer[4][0] for answer in answers))
    if not limits.allow_private:
        for address in addresses:  # all of them, or the choice among them would be the stranger's
            if not _is_public(address):
                # the address itself stays unsaid: it would draw a map of the house for strangers
                raise MediaError(f"{label}: the host {host} is not public; allow_private=True permits others")
    return addresses


def _is_public(address: str) -> bool:
    """Whether the address, and the IPv4 address that may be written inside it, belongs to the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:  # what names of IPv4 hosts become in a network that has IPv6 alone
            return _is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        inside = (found.ipv4_mapped, found.sixtofour, *(found.teredo or ()))
        if any(part is not None and not _is_public(str(part)) for part in inside):
            return False
        if found.ipv4_mapped is not None:
            return True
    return found.is_global and not found.is_multicast and not found.is_reserved and found != _AZURE_HOST
