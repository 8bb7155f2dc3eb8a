"""The frames that were picked are the frames that come, of every container; broken films are refused."""

import io
import threading
import time
from contextlib import suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelport.inputs.media import MediaError, MediaLimits, Video, read_video

KINDS = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
    ("gif", "gif"),
    ("mpegts", "mpeg2video"),
]


def film(
    kind: str = "mp4", codec: str = "libx264", count: int = 20, rate: int | Fraction = 25, height: int = 48
) -> bytes:
    """Grey frames, each lighter by 10 than the one before."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 64, height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for index in range(count):
            pixels = np.full((height, 64, 3), 10 * (index % 25), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_picked_frames_of_every_container(kind: str, codec: str) -> None:
    asked = []

    def pick(total: int, fps: float | None) -> list[int]:
        asked.append((total, fps))
        return [0, 3, 19, 7, 7]  # any order, and repetitions

    video = read_video(film(kind, codec), None, pick)
    assert asked == [(20, 25.0)]
    assert (video.indices, video.total, video.fps) == ((0, 3, 19, 7, 7), 20, 25.0)
    assert (video.frames.shape, video.frames.dtype) == ((5, 48, 64, 3), np.uint8)
    tolerance = 20 if codec == "gif" else 3  # that many greys a palette of 256 colours has
    assert np.abs(video.frames.mean((1, 2, 3)) - np.array([0, 30, 190, 70, 70])).max() < tolerance


def test_frames_equal_those_of_the_published_reader(tmp_path: Path) -> None:
    from transformers.video_utils import read_video_pyav

    (tmp_path / "a.mp4").write_bytes(film(rate=Fraction(30000, 1001)))
    expected, metadata = read_video_pyav(str(tmp_path / "a.mp4"), lambda metadata, **_: [1, 5, 18])
    video = read_video(tmp_path / "a.mp4", None, lambda total, fps: [1, 5, 18])
    assert np.array_equal(video.frames, expected)
    assert (video.total, video.fps) == (metadata.total_num_frames, metadata.fps)


def test_only_the_wanted_frames_are_decoded_and_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelport.inputs import video as module

    converted = []
    upright = module._upright
    monkeypatch.setattr(module, "_upright", lambda frame: converted.append(frame.pts) or upright(frame))
    read_video(film(), None, lambda total, fps: [2, 4])
    assert len(converted) == 2


def test_a_film_that_was_held_sideways_stands_upright() -> None:
    data = film(count=2)
    matrix = data.index(b"tkhd") + 4 + 40  # of version 0: nine numbers of 16.16 and 2.30 bits
    turned = b"".join(number.to_bytes(4, "big", signed=True) for number in (0, 1 << 16, 0, -(1 << 16), 0, 0))
    video = read_video(data[:matrix] + turned + data[matrix + 24 :])
    assert video.frames.shape == (2, 64, 48, 3)


def test_upright_turns_as_the_matrix_says() -> None:
    """A turn of 90 degrees to the right for display, as cameras write it, takes the left column to the top."""
    from modelport.inputs.video import _upright

    class Frame:
        rotation = -90

        def to_ndarray(self, format: str) -> np.ndarray:
            return np.arange(6, dtype=np.uint8).reshape(2, 3, 1)

    assert _upright(Frame())[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


FRAMES = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "source",
    [
        FRAMES,
        list(FRAMES),
        [Image.fromarray(frame) for frame in FRAMES],
        torch.from_numpy(FRAMES),
        list(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)),
        FRAMES / 255,
    ],
)
def test_frames_in_memory(source: Any) -> None:
    video = read_video(source, None, lambda total, fps: [0, total - 1])
    assert np.array_equal(video.frames, FRAMES[[0, 5]])
    assert (video.fps, video.indices, video.total) == (None, (0, 5), 6)
    video = read_video((source, {"fps": 2, "duration": 3.0}))
    assert np.array_equal(video.frames, FRAMES)
    assert video.fps == 2.0


def test_frames_that_were_picked_before_are_all_kept() -> None:
    known = {"fps": 24.0, "do_sample_frames": False, "frames_indices": [0, 8, 16, 24, 32, 40], "total_num_frames": 48}
    video = read_video((FRAMES, known), None, lambda total, fps: [0])
    assert np.array_equal(video.frames, FRAMES)
    assert (video.indices, video.total, video.fps) == ((0, 8, 16, 24, 32, 40), 48, 24.0)
    numbers = np.arange(6) * 2
    assert read_video((FRAMES, {"do_sample_frames": False, "frames_indices": numbers})).indices == (0, 2, 4, 6, 8, 10)
    assert read_video((FRAMES, {"do_sample_frames": False})).indices == (0, 1, 2, 3, 4, 5)


def test_an_animated_picture() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second], duration=100)
    assert read_video(Image.open(buffer)).frames[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert read_video(buffer.getvalue()).frames[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_what_is_known_of_a_file_goes_before_what_it_says() -> None:
    assert read_video((film(count=3), {"fps": 5})).fps == 5.0


def test_a_header_that_promises_too_many_frames_is_not_believed() -> None:
    """As in films that were cut without encoding them again: picking starts anew with the true number."""
    data = film("avi", "mpeg4", 20)
    frames = data.index(b"strh") + 8 + 32
    assert int.from_bytes(data[frames : frames + 4], "little") == 20
    lying = data[:frames] + (500).to_bytes(4, "little") + data[frames + 4 :]
    asked = []
    video = read_video(lying, None, lambda total, fps: asked.append(total) or [0, total - 1])
    assert asked == [500, 20]
    assert (video.indices, video.total) == ((0, 19), 20)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"These are words, not a film.\n" * 20, "broken, or of no kind that can be read"),
        (film()[:700], "broken, or of no kind"),
        (b"\0" * 5000, "broken, or of no kind"),
        (np.zeros((4, 5, 3), np.uint8), r"shape \(4, 5, 3\) is no film"),
        ([], "it has no frames"),
        (np.zeros((0, 5, 4, 3), np.uint8), "it has no frames"),
        ([FRAMES[0], FRAMES[0, :3]], "frame 1 has 7x3 pixels, and others have 7x5"),
        ([FRAMES[0], "a.png"], "frame 1: str is no picture"),
        ([FRAMES[0].astype(np.int64)], "frame 0: a picture is uint8"),
        ((FRAMES, {"fps": -1}), "fps must be a positive number, got -1"),
        ((FRAMES, {"do_sample_frames": False, "frames_indices": [1]}), "6 frames of 2, but frames_indices has 1 num"),
        ((FRAMES, {"do_sample_frames": False, "total_num_frames": 5}), "6 frames of 5, but"),
        ((FRAMES, {"do_sample_frames": False, "frames_indices": "abcdef"}), "must be whole numbers"),
        (3, "int is no film"),
        ("nowhere.mp4", "no such file"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16), "cannot be made an array"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_wrong_films_are_refused(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=f"^video 2.*{message}"):
        read_video(source, name="video 2")


def test_a_sound_is_no_film() -> None:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(8000), 8000, format="WAV")
    with pytest.raises(MediaError, match="it has no pictures in it"):
        read_video(buffer.getvalue())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (MediaLimits(max_frames=19), "20 frames are more than the limit of 19"),
        (MediaLimits(max_pixels=3000), "64x48 pixels are more than the limit of 3000"),
        (MediaLimits(max_video_pixels=60_000), "20 frames of 64x48 are more than the limit of 60000 pixels"),
        (MediaLimits(timeout_s=0), "1 frames were decoded within 0 s"),
        (MediaLimits(max_bytes=100), "more than the limit of 100 bytes"),
    ],
)
def test_limits_of_a_film(limits: MediaLimits, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_video(film(), limits)
    read_video(film())


def test_limits_of_frames_in_memory() -> None:
    for source in (FRAMES, _animated()):
        with pytest.raises(MediaError, match="max_video_pixels"):
            read_video(source, MediaLimits(max_video_pixels=50))


def _animated() -> Image.Image:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    return Image.open(buffer)


@pytest.mark.parametrize("indices", [[], [-1], [20]])
def test_picking_what_is_not_there_is_the_familys_mistake(indices: list[int]) -> None:
    for source in (film(), np.zeros((20, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="of a film that has 20; pick at least one") as raised:
            read_video(source, None, lambda total, fps: indices)
        assert not isinstance(raised.value, MediaError)


def test_playlists_lead_nowhere(tmp_path: Path) -> None:
    """A file that names other files or addresses is no film: it could ask for what the sender may not see."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    (tmp_path / "a.ts").write_bytes(film("mpegts", "mpeg2video"))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for target in (
            f"http://127.0.0.1:{server.server_port}/a.ts",
            f"file://{tmp_path}/a.ts",
            str(tmp_path / "a.ts"),
        ):
            for text in (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile '{target}'\n",
                f"<?xml version='1.0'?><MPD><Period><AdaptationSet><Representation><BaseURL>{target}</BaseURL>"
                "</Representation></AdaptationSet></Period></MPD>",
                "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
            ):
                start = time.monotonic()
                with pytest.raises(MediaError):
                    read_video(text.encode())
                assert time.monotonic() - start < 2  # nor does it open a port and wait for what somebody may send
        server.shutdown()
    assert asked == []


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_films_are_only_ever_a_media_error(data: st.DataObject) -> None:
    kind, codec = data.draw(
        st.sampled_from([("avi", "mpeg4"), ("mov", "mpeg4"), ("gif", "gif"), ("mpegts", "mpeg2video")])
    )
    content = bytearray(SMALL[kind, codec])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MediaError):
        assert isinstance(read_video(bytes(content[: data.draw(st.integers(1, len(content)))])), Video)


SMALL = {(kind, codec): film(kind, codec, 4) for kind, codec in KINDS if codec in ("mpeg4", "gif", "mpeg2video")}
