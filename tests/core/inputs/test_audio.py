"""Sounds of every kind come as one channel at the wanted rate; broken and endless ones are refused."""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.inputs.media import Audio, MediaError, MediaLimits, read_audio

RATE = 16_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def written(kind: str, samples: np.ndarray = TONE, rate: int = RATE, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def contained(kind: str, codec: str, rate: int = 48_000, pictures: bool = False) -> bytes:
    """One second of the tone on two channels, of which the right one is silent."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        if pictures:
            film = container.add_stream("mpeg4", rate=5)
            film.width = film.height = 16
            film.pix_fmt = "yuv420p"
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        planar = np.stack([tone, np.zeros_like(tone)]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout="stereo")
        frame.rate = rate
        if pictures:
            container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            container.mux(film.encode())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def loudest(samples: np.ndarray, rate: int = RATE) -> float:
    """The strongest frequency, in Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


KINDS = [kind for kind in soundfile.available_formats() if kind not in ("RAW", "SD2", "XI", "WVE", "HTK")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_soundfile_writes_is_read(kind: str) -> None:
    audio = read_audio(written(kind), rate=RATE)
    assert (audio.rate, audio.samples.dtype) == (RATE, np.float32)
    assert abs(len(audio.samples) - RATE) <= 2500  # MP3 adds silence
    assert abs(loudest(audio.samples) - 440) < 3
    if kind not in ("MP3", "OGG", "SVX"):
        assert np.abs(audio.samples[:RATE] - TONE).max() < 2e-2


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("matroska", "ac3"), ("adts", "aac"), ("mpegts", "mp2")]
)
def test_containers_that_soundfile_does_not_know(kind: str, codec: str) -> None:
    samples = read_audio(contained(kind, codec), rate=RATE).samples
    assert abs(len(samples) - RATE) < 2500
    assert abs(loudest(samples) - 440) < 3
    assert 0.2 < np.abs(samples[2000:-2000]).max() < 0.3  # the mean of 0.5 and silence


def test_the_sound_of_a_film() -> None:
    assert abs(loudest(read_audio(contained("mp4", "aac", pictures=True)).samples) - 440) < 3


def test_samples_in_memory_and_in_files_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(data := written("WAV", subtype="FLOAT"))
    sources: list[Any] = [TONE, TONE.astype(np.float64), torch.from_numpy(TONE), (TONE, RATE), (TONE.tolist(), RATE)]
    for source in [*sources, data, tmp_path / "a.wav", str(tmp_path / "a.wav")]:
        assert np.array_equal(read_audio(source, rate=RATE).samples, TONE)


def test_the_callers_samples_are_not_the_ones_returned() -> None:
    mine = TONE.copy()
    found = read_audio(mine)
    mine[:] = 0
    assert np.array_equal(found.samples, TONE)


def test_channels_are_averaged() -> None:
    stereo = np.stack([TONE, -0.5 * TONE], axis=1)
    for source in ((stereo, RATE), (stereo.T, RATE), written("WAV", stereo, subtype="FLOAT")):
        assert np.abs(read_audio(source).samples - TONE / 4).max() < 1e-6


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([-32768, 0, 16384], np.int16, [-1, 0, 0.5]),
        ([-(2**31), 0, 2**30], np.int32, [-1, 0, 0.5]),
        ([0, 128, 192], np.uint8, [-1, 0, 0.5]),
        ([-1, 0, 0.5], np.float16, [-1, 0, 0.5]),
    ],
)
def test_integers_are_scaled(values: list[float], dtype: type, expected: list[float]) -> None:
    assert read_audio(np.array(values, dtype)).samples.tolist() == expected


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_is_that_of_librosa(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    audio = read_audio((tone, rate), rate=RATE)
    assert isinstance(audio, Audio)
    assert len(audio.samples) == RATE
    assert np.array_equal(audio.samples, soxr.resample(tone, rate, RATE, quality="HQ"))
    assert np.array_equal(read_audio(written("WAV", tone, rate, "FLOAT"), rate=RATE).samples, audio.samples)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros(0, np.float32), RATE), r"shape \(0,\) is no sound"),
        (written("WAV", np.zeros(0)), "it has no samples"),
        (b"These are words, not a sound.\n" * 20, "broken, or of no kind that can be read"),
        (b"", "empty"),
        (written("FLAC")[:60], "broken|no samples"),
        (np.zeros((3, 4, 5)), r"shape \(3, 4, 5\) is no sound"),
        (np.zeros((300, 400)), r"shape \(300, 400\) is no sound"),
        (np.array([0, np.nan]), "some samples are not numbers"),
        (np.array(["a"]), "samples are floats or integers"),
        ((TONE, -5), "a rate of -5 Hz is outside 100"),
        ((TONE, float("nan")), "a rate of nan Hz is outside"),
        ((TONE, "fast"), "the rate must be a number"),
        (7, "int is no sound"),
        ("nowhere.wav", "no such file"),
        ([[1.0], [1.0, 2.0]], "cannot be made an array"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_wrong_sounds_are_refused(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=f"^audio 2.*({message})"):
        read_audio(source, name="audio 2")


def test_a_film_without_sound() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="it has no sound in it"):
        read_audio(buffer.getvalue())


def test_a_sound_that_is_too_long() -> None:
    for source in ((TONE, RATE), written("WAV"), contained("mp4", "aac")):
        with pytest.raises(MediaError, match=r"longer than the limit of 0.5 s \(max_seconds\)"):
            read_audio(source, MediaLimits(max_seconds=0.5))


def test_strangers_read_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(written("WAV"))
    with pytest.raises(MediaError, match="files of this machine are not open here"):
        read_audio(str(tmp_path / "a.wav"), trusted=False)


SMALL = {kind: written(kind, TONE[:2000]) for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF")}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_sounds_are_only_ever_a_media_error(data: st.DataObject) -> None:
    content = bytearray(SMALL[data.draw(st.sampled_from(sorted(SMALL)))])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 300) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MediaError):
        assert np.isfinite(read_audio(bytes(content[: data.draw(st.integers(1, len(content)))])).samples).all()
