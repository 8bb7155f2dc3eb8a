"""Pictures of every kind are read the right way up, wrong ones are refused at once, and hashes tell two items apart."""

import base64
import io
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from modelport.inputs.media import (
    Audio,
    MediaError,
    MediaLimits,
    Video,
    content_hash,
    read_audio,
    read_image,
    read_video,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def writable() -> list[tuple[str, str]]:
    """Kinds of colours: SPIDER holds measurements, and the others need programs to be drawn."""
    Image.init()
    kinds = []
    for kind in sorted(set(Image.SAVE) & set(Image.ID) - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "SPIDER"}):
        for mode in ("RGB", "L", "1"):
            try:
                saved(PICTURE.convert(mode), kind)
            except (OSError, ValueError, KeyError):
                continue
            kinds.append((kind, mode))
            break
    return kinds


@pytest.mark.parametrize(("kind", "mode"), writable())
def test_every_kind_that_can_be_written_is_read(kind: str, mode: str) -> None:
    original = PICTURE.resize((64, 64)) if kind == "ICNS" else PICTURE
    data = saved(original.convert(mode), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    found = read_image(data)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_the_sources_of_a_picture(tmp_path: Path) -> None:
    png = saved(PICTURE, "PNG")
    (tmp_path / "a.png").write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    sources = [
        PICTURE,
        PIXELS,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        png,
        bytearray(png),
    ]
    for source in [*sources, url, tmp_path / "a.png", str(tmp_path / "a.png")]:
        assert np.array_equal(np.asarray(read_image(source)), PIXELS)
    assert np.array_equal(np.asarray(read_image(PIXELS / 255)), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_was_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(PICTURE, "PNG", exif=exif)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }
    assert np.array_equal(np.asarray(read_image(data)), turned[orientation])
    assert np.array_equal(np.asarray(read_image(Image.open(io.BytesIO(data)))), turned[orientation])


def test_the_users_picture_is_not_the_one_returned() -> None:
    mine = PICTURE.copy()
    found = read_image(mine)
    mine.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(found), PIXELS)


def test_sixteen_bits_are_scaled() -> None:
    data = saved(Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)), "PNG")
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [0, 128, 255]


def bomb() -> bytes:
    """The header of a PNG of 20,000 by 20,000 pixels, and nothing behind it."""
    data = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"These are words.\n", r"that is no picture of a known kind; it starts with b'These are wo'"),
        (b"", "empty"),
        (bomb(), "exceeds limit of .* pixels|more than the limit of 64000000"),
        (np.zeros((2, 40_000_000), np.uint8), "40000000x2 pixels are more than the limit of 64000000"),
        (saved(PICTURE, "PNG")[:-40], r"image 2 \(.* bytes\): it is broken"),
        (saved(PICTURE, "JPEG")[:-40], "truncated"),
        (saved(PICTURE, "WEBP")[:-40], "broken|no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "no picture of a known kind"),
        (np.zeros((3, 4, 5, 6), np.uint8), r"image 2: an array of shape \(3, 4, 5, 6\) is no picture"),
        (np.zeros((3, 4), np.int64), "image 2: a picture is uint8"),
        (Image.fromarray(np.full((2, 2), -5.0, np.float32)), "image 2: pixels from -5.0 to -5.0 are no colours"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), "image 2: .*BFloat16"),
        (Image.new("RGB", (0, 5)), r"no pixels \(0x5\)"),
        (42, "int is no picture"),
        ("nowhere.png", r"image 2 \(nowhere.png\): no such file"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_wrong_pictures_are_refused_within_a_second(source: Any, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError, match=message):
        read_image(source, name="image 2")
    assert time.monotonic() - start < 1


def test_the_limit_of_pixels_is_looked_at_before_decoding() -> None:
    data = saved(PICTURE, "PNG")[:60]  # the header alone
    with pytest.raises(MediaError, match="17x13 pixels are more than the limit of 200"):
        read_image(data, MediaLimits(max_pixels=200))


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=300), st.sampled_from(["", "png", "jpeg", "gif", "riff", "mp4", "webm", "tiff", "wav", "flac"])
)
@example(b"", "")
def test_garbage_is_only_ever_a_media_error(data: bytes, magic: str) -> None:
    starts = {
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "jpeg": b"\xff\xd8\xff\xe0",
        "gif": b"GIF89a",
        "riff": b"RIFF\xff\0\0\0WEBPVP8 ",
        "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0",
        "webm": b"\x1a\x45\xdf\xa3",
        "tiff": b"II*\0\x08\0\0\0",
        "wav": b"RIFF\xff\0\0\0WAVEfmt ",
        "flac": b"fLaC",
    }
    content = starts.get(magic, b"") + data
    for read in (read_image, read_video, read_audio):
        with suppress(MediaError):
            read(content)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_pictures_are_only_ever_a_media_error(data: st.DataObject) -> None:
    kind = data.draw(
        st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "PPM", "ICO", "QOI", "JPEG2000"])
    )
    content = bytearray(saved(PICTURE, kind))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MediaError):
        assert read_image(bytes(content)).mode == "RGB"


def test_hashes_tell_contents_apart() -> None:
    frames = np.stack([PIXELS, PIXELS])
    different = [
        PICTURE,
        PICTURE.convert("L"),
        PICTURE.resize((13, 17)),
        Image.new("RGB", (2, 3)),
        Image.new("RGB", (3, 2)),
        PIXELS,
        PIXELS.astype(np.int16),
        PIXELS.reshape(17, 13, 3),
        torch.from_numpy(PIXELS),
        torch.zeros(4, 2),
        torch.zeros(2, 4),
        torch.zeros(4, 2, dtype=torch.bfloat16),
        torch.zeros(4, 2, dtype=torch.float16),
        Video(frames, 2.0, (0, 1), 2),
        Video(frames, 4.0, (0, 1), 2),
        Video(frames, 2.0, (0, 2), 3),
        Video(frames, 2.0, (0, 2), 4),
        Video(frames + 1, 2.0, (0, 1), 2),
        Audio(np.zeros(4, np.float32), 16000),
        Audio(np.zeros(4, np.float32), 8000),
        Audio(np.zeros(5, np.float32), 16000),
        np.zeros(4, np.float32),
        {"a": torch.zeros(2), "b": torch.zeros(2)},
        {"a": torch.zeros(2), "c": torch.zeros(2)},
        [[b"a"], b"b"],
        [[b"a", b"b"]],
        [b"a", b"b"],
        [b"ab", b""],
        "1",
        1,
        1.0,
        True,
        None,
    ]
    hashes = [content_hash(item) for item in different]
    assert {len(found) for found in hashes} == {32}
    assert len(set(hashes)) == len(different)


def test_hashes_are_of_the_content_alone() -> None:
    assert content_hash(read_image(saved(PICTURE, "PNG"))) == content_hash(read_image(saved(PICTURE, "BMP")))
    assert content_hash(PIXELS[:, ::-1]) == content_hash(np.ascontiguousarray(PIXELS[:, ::-1]))
    matrix = torch.arange(6.0).reshape(2, 3)
    assert content_hash(matrix.T) == content_hash(matrix.T.contiguous())
    assert content_hash(torch.zeros(0)) == content_hash(torch.zeros(0))
    with pytest.raises(TypeError, match="not object"):
        content_hash(object())


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, modelport.inputs.media;"
        "sys.exit(' '.join({'torch', 'transformers', 'PIL', 'av', 'soundfile', 'soxr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize(
    ("missing", "read", "source"),
    [
        ("PIL", read_image, b"a"),
        ("av", read_video, b"a"),
        ("soundfile", read_audio, b"a"),
        ("soxr", read_audio, (np.zeros(9), 100)),
    ],
)
def test_a_missing_library_is_named(missing: str, read: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'modelport\[media\]'"):
        read(source)
