"""Bytes come from where they may, within bounds of size and time, and from nowhere else."""

import base64
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelport.inputs import fetch as module
from modelport.inputs.fetch import MediaError, MediaLimits, fetch, shortened

HERE = MediaLimits(allow_private=True, timeout_s=10)


class Handler(BaseHTTPRequestHandler):
    seen: list[str] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        with suppress(OSError):
            getattr(self, self.path.strip("/").split("/")[0].split("?")[0])()

    def good(self) -> None:
        self.answer(200, b"content")

    def oversize(self) -> None:
        self.answer(200, b"x" * 2000)

    def oversize_unsaid(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"x" * 1000)

    def slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.drip()

    def slow_header(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        self.drip()

    def drip(self) -> None:
        for _ in range(60):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"only this")

    def moved(self) -> None:
        self.answer(302, b"", ("Location", "/good"))

    def around(self) -> None:
        self.answer(302, b"", ("Location", "/around"))

    def inside(self) -> None:
        self.answer(302, b"", ("Location", "http://169.254.169.254/latest/meta-data"))

    def to_file(self) -> None:
        self.answer(302, b"", ("Location", "file:///etc/passwd"))

    def nonsense(self) -> None:
        self.wfile.write(b"\x00\x01 what\r\n")

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.block_on_close = False
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_file_by_path(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"content")
    assert fetch(tmp_path / "a b.png", MediaLimits()) == b"content"
    assert fetch(str(tmp_path / "a b.png"), MediaLimits()) == b"content"
    assert fetch(b"content", MediaLimits()) == b"content"


@pytest.mark.parametrize("source", ["missing.png", Path("missing.png")])
def test_a_missing_file_is_named(source: str | Path) -> None:
    with pytest.raises(MediaError, match=r"^image 2 \(missing.png\): no such file$"):
        fetch(source, MediaLimits(), name="image 2")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"Is a directory|not a file"):
        fetch(tmp_path, MediaLimits())
    for source, message in (("/dev/zero", "not a file"), ("a" * 5000, "name too long"), ("a\0b", "null byte")):
        with pytest.raises(MediaError, match=message):
            fetch(source, MediaLimits())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a file"):  # and nobody waits for somebody to write into it
        fetch(tmp_path / "pipe", MediaLimits())
    (tmp_path / "empty").touch()
    with pytest.raises(MediaError, match="it is empty"):
        fetch(tmp_path / "empty", MediaLimits())
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(MediaError, match="11 bytes, more than the limit of 10 bytes"):
        fetch(tmp_path / "large", MediaLimits(max_bytes=10))


def test_strangers_read_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png"):
        with pytest.raises(MediaError, match="files of this machine are not open here"):
            fetch(source, MediaLimits(allowed_local_path=tmp_path), trusted=False)


@pytest.mark.parametrize("trusted", [True, False])
def test_file_urls_read_below_the_allowed_folder_only(tmp_path: Path, trusted: bool) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a b.png").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "open-not").mkdir()
    (tmp_path / "open-not" / "a").write_bytes(b"secret")
    limits = MediaLimits(allowed_local_path=tmp_path / "open")
    assert fetch(f"file://{tmp_path}/open/a%20b.png", limits, trusted=trusted) == b"content"
    assert fetch(f"FILE://localhost{tmp_path}/open/a%20b.png", limits, trusted=trusted) == b"content"
    for path in ("secret", "open/../secret", "open/%2e%2e/secret", "open/link", "open-not/a"):
        with pytest.raises(MediaError, match="it lies outside"):
            fetch(f"file://{tmp_path}/{path}", limits, trusted=trusted)
    with pytest.raises(MediaError, match="set allowed_local_path"):
        fetch(f"file://{tmp_path}/open/a%20b.png", MediaLimits(), trusted=trusted)
    with pytest.raises(MediaError, match="three slashes"):
        fetch("file://open/a%20b.png", limits, trusted=trusted)
    with pytest.raises(MediaError):
        fetch("file:///a%00b", limits, trusted=trusted)


@given(st.binary(min_size=1, max_size=50))
def test_data_urls(content: bytes) -> None:
    from urllib.parse import quote

    limits = MediaLimits()
    for text in (base64.b64encode(content), base64.urlsafe_b64encode(content), base64.b64encode(content).rstrip(b"=")):
        assert fetch(f"data:image/png;base64,{text.decode()}", limits, trusted=False) == content
    assert fetch("data:," + quote(content, safe=""), limits, trusted=False) == content
    assert fetch("DATA:a/b;base64," + quote(base64.b64encode(content)), limits, trusted=False) == content


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "has a comma"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,a*b", "not base64"),
        ("data:image/png;base64,abcde", "not base64"),
        ("data:,aaaaaaaaaaaa", "12 bytes, more than the limit of 10"),
        ("data:," + "a" * 99, "more than the limit of 10"),
        ("ftp://host/a", "ftp:// is not supported; use http://"),
    ],
)
def test_urls_that_hold_nothing(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        fetch(url, MediaLimits(max_bytes=10), trusted=False)


def test_a_download(server: str) -> None:
    assert fetch(f"{server}/good", HERE, trusted=False) == b"content"
    assert fetch(f"{server}/moved", HERE, trusted=False) == b"content"
    assert fetch(f"{server}/good/ü b?q=é&r=1#part".replace(" ", "%20"), HERE) == b"content"
    assert Handler.seen[-1] == "/good/%C3%BC%20b?q=%C3%A9&r=1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "the download failed|answered"),
        ("oversize", "2000 bytes, more than the limit of 1000"),
        ("oversize_unsaid", "more than the limit of 1000"),
        ("short", "ended 91 bytes early"),
        ("around", "more than 5 redirects"),
        ("to_file", "which is no http:// or https:// address"),
        ("nonsense", "the download failed"),
    ],
)
def test_downloads_that_fail(server: str, path: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        fetch(f"{server}/{path}", MediaLimits(allow_private=True, max_bytes=1000, timeout_s=5))


@pytest.mark.parametrize("path", ["slow", "slow_header"])
def test_a_slow_server_is_left_when_the_time_is_up(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"within 0.3 s \(timeout_s\)"):
        fetch(f"{server}/{path}", MediaLimits(allow_private=True, timeout_s=0.3))
    assert time.monotonic() - start < 1.5


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MediaError, match=r"the download failed: .*refused"):
        fetch(f"http://127.0.0.1:{port}/", HERE)


# fmt: off
INSIDE = [
    "127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::]", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254",
    "100.100.100.200", "168.63.129.16", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[::7f00:1]", "2130706433", "0x7f.1", "127.1", "[2002:7f00:1::]", "[64:ff9b::a00:1]", "224.0.0.1", "user@127.0.0.1",
]
# fmt: on


@pytest.mark.parametrize("host", INSIDE)
def test_addresses_inside_are_refused(host: str) -> None:
    with pytest.raises(MediaError, match=r"is not public|has no address"):
        fetch(f"http://{host}/", MediaLimits())


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_addresses_outside_are_allowed(address: str) -> None:
    assert module._is_public(address)


def test_a_redirect_is_checked_like_the_first_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public = module._is_public
    monkeypatch.setattr(module, "_is_public", lambda address: address == "127.0.0.1" or public(address))
    assert fetch(f"{server}/moved", MediaLimits()) == b"content"
    with pytest.raises(MediaError, match=r"the host 169.254.169.254 is not public"):
        fetch(f"{server}/inside", MediaLimits())
    with pytest.raises(MediaError, match=r"169.254.169.254 is not among the allowed domains"):
        fetch(f"{server}/inside", MediaLimits(allow_private=True, allowed_domains=("127.0.0.1",)))


def test_the_connection_goes_to_the_address_that_was_checked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means something else when asked again leads nowhere else."""
    port = int(server.rpartition(":")[2])
    asked = []

    def lookup(host: str, *_: object, **__: object) -> list:
        asked.append(host)
        if host == "changes.example" and asked.count(host) > 1:
            raise AssertionError("asked twice")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(f"http://changes.example:{port}/good", HERE) == b"content"
    assert asked[0] == "changes.example"


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(MediaError, match="is not public"):
        fetch("http://mixed.example/", MediaLimits())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("a.org", True),
        ("A.ORG", True),
        ("x.b.org", True),
        ("b.org", False),
        ("a.org.evil.com", False),
        ("xa.org", False),
    ],
)
def test_allowed_domains(host: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(MediaError, match="has no address" if allowed else "not among the allowed domains"):
        fetch(f"http://{host}/", MediaLimits(allowed_domains=("a.org", "*.b.org")))


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a",
        "http://a.org\\@127.0.0.1/",
        "http://a b/",
        "http://a\n.org/",
        "http://[::1",
        "http://a:99999/",
        "http://a:b/",
        f"https://{'a' * 300}.org/",
        "http://..../",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(MediaError):
        fetch(url, MediaLimits(timeout_s=5), trusted=False)


def test_messages_hold_no_secrets() -> None:
    assert shortened("https://user:word@host/a.png?key=secret") == "https://host/a.png"
    assert len(shortened("x" * 500)) == 80
    assert shortened("data:image/png;base64," + "A" * 100) == "data:image/png;base64,AAAAAAAAAAAAAAAAAA…"


def test_a_server_that_does_not_prove_who_it_is(server: str) -> None:
    with pytest.raises(MediaError, match=r"the download failed: .*SSL"):
        fetch(server.replace("http:", "https:") + "/good", HERE)


def test_a_handshake_that_never_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(MediaError, match=r"within 0.3 s"):
            fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/", MediaLimits(allow_private=True, timeout_s=0.3))
        assert time.monotonic() - start < 1.5
