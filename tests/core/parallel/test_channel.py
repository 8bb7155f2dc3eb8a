"""Messages between processes: what is sent arrives, whole and unchanged, from those who know the secret alone."""

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modelport.parallel import channel as module
from modelport.parallel.channel import Channel, ChannelError, Frame, Kind, Listener, connect, new_secret


@pytest.fixture(params=["unix", "tcp"])
def ends(request, tmp_path) -> Iterator[tuple[Channel, Channel]]:
    secret = new_secret() if request.param == "tcp" else None
    listener = Listener(("127.0.0.1", 0) if request.param == "tcp" else str(tmp_path / "here"), secret)
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(connect, listener.address, secret)
        accepted = listener.accept()
        yield accepted, caller.result()
    for one in (accepted, caller.result(), listener):
        one.close()


def test_messages_arrive(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    rows = torch.arange(12.0).view(3, 4)
    tensors = {"0/rows": rows[:, 1:3], "1/rows": rows, "n": torch.tensor([1, 2])}
    for _ in range(2):
        here.send(Frame.of(Kind.STEP, {"text": "größer", "list": [1, None]}, 2**40, tensors))
        there.send(Frame(Kind.PONG))
        found = there.receive()
        assert (found.kind, found.number, found.message) == (Kind.STEP, 2**40, {"text": "größer", "list": [1, None]})
        assert {name: t.tolist() for name, t in found.tensors().items()} == {n: t.tolist() for n, t in tensors.items()}
        assert here.receive() == Frame(Kind.PONG)
    there.close()
    with pytest.raises(EOFError):
        here.receive()


def test_a_message_that_somebody_interrupted_is_read_on(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    there.limit(0.05)
    kept, here._socket = here._socket, Pieces(here._socket)
    here.send(Frame.of(Kind.RESULT, "x" * 100))
    with pytest.raises(BlockingIOError):  # as long as the rest does not come
        there.receive()
    kept.sendall(here._socket.rest)
    assert there.receive().message == "x" * 100
    here._socket = kept


class Pieces:
    """Sends the first 30 bytes."""

    def __init__(self, real: socket.socket):
        self.real, self.rest = real, b""

    def sendall(self, data: bytes) -> None:
        self.real.sendall(data[:30])
        self.rest = data[30:]


def between(secret: bytes, change) -> tuple[Channel, Channel]:
    """Two ends with somebody in between, who passes every message from the caller through `change`."""
    listener, proxy = Listener(("127.0.0.1", 0), secret), socket.create_server(("127.0.0.1", 0))
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(listener.accept)
        caller = pool.submit(connect, f"tcp:127.0.0.1:{proxy.getsockname()[1]}", secret)
        outer, _ = proxy.accept()
        inner = socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2])))
        for first, second in ((outer, inner), (inner, outer)):
            second.sendall(module._exactly(first, 35))
        for first, second in ((outer, inner), (inner, outer)):
            second.sendall(module._exactly(first, 32))
        ends = accepted.result(), caller.result()

    def pass_on() -> None:
        while data := outer.recv(1 << 16):
            inner.sendall(change(data))

    threading.Thread(target=pass_on, daemon=True).start()
    return ends


@pytest.mark.parametrize("change", [lambda d: d.replace(b"no", b"ok"), lambda d: d + d, lambda d: d[:-1] + b"\0"])
def test_a_message_that_was_changed_or_repeated_is_refused(change) -> None:
    here, there = between(new_secret(), change)
    there.send(Frame.of(Kind.STEP, "no"))
    with pytest.raises(ChannelError, match="wrong code"):
        _ = [here.receive() for _ in range(2)]


def test_who_does_not_know_the_secret_does_not_get_in() -> None:
    listener = Listener(("127.0.0.1", 0), new_secret())
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(connect, listener.address, new_secret())
        assert listener.accept() is None
        with pytest.raises(ChannelError, match="same MODELPORT_SECRET"):
            caller.result()
    stranger = socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2])))
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n")
    assert listener.accept() is None


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE", 0.1)
    listener = Listener(("127.0.0.1", 0), new_secret())
    with socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2]))):
        assert listener.accept() is None


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", "no message of modelport"),
        (struct.pack("!2sBBQIQ", b"mP", 9, 1, 0, 2, 0) + b"{}", "version 9"),
        (struct.pack("!2sBBQIQ", b"mP", 1, 1, 0, 2, 2**60) + b"{}", "no message of modelport"),
    ],
)
def test_what_is_no_message_is_refused(sent: bytes, told: str) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    with pytest.raises(ChannelError, match=told):
        Channel(ours).receive()
