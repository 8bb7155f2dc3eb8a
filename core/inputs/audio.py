"""Sounds to samples: a file, an array or a pair of both, mixed to one channel and resampled.

Decisions: soundfile reads what it can, and PyAV the rest (m4a, WebM, the sound of a film); channels are averaged, in
blocks, so that only one channel is ever held whole; soxr resamples at its high quality, as librosa does, with which
the published feature extractors are used.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelport.inputs._decoders import INSTALL, open_container, refusing
from modelport.inputs.fetch import MediaError, MediaLimits, fetch, shortened

_RATES = (100, 1_000_000)  # Hz
_MOST_SAMPLES = 1 << 27  # half a gigabyte; 46 minutes at 48 kHz
_MOST_CHANNELS = 64
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound.

    :param samples: (samples,) float32, of a recording within -1 to 1.
    :param rate: samples in a second.
    """

    samples: np.ndarray
    rate: int


def read_audio(
    source: Any, limits: MediaLimits | None = None, rate: int = 16_000, *, trusted: bool = True, name: str = "audio"
) -> Audio:
    """Return a sound at `rate` samples in a second.

    :param source: what `fetch` takes; an array, which then has the wanted rate; or a pair (array, its rate). Arrays are
        (samples,), (samples, channels) or (channels, samples), and the shorter side is the channels; float within -1
        to 1, or integers over their whole range.
    :param trusted: whether a plain path may be read.
    :param name: what error messages call it, such as "audio 2".
    :raises MediaError: no sound, a broken or empty one, or one beyond the limits.
    :raises ImportError: a library that reading this needs is not installed.
    """
    limits = limits or MediaLimits()
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        name, data = f"{name} ({shortened(source)})", fetch(source, limits, trusted=trusted, name=name)
        samples, given = _decode(data, limits, name)
    else:
        samples, given = _from_array(source, rate, name)
    if not len(samples):
        raise MediaError(f"{name}: it has no samples")
    if not _RATES[0] <= given <= _RATES[1]:
        raise MediaError(f"{name}: a rate of {given:g} Hz is outside {_RATES[0]} to {_RATES[1]}")
    _check_length(len(samples), given, limits, name)
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: some samples are not numbers (NaN or infinite)")
    return Audio(_resampled(samples, given, rate, name), rate)


def _check_length(samples: int, rate: float, limits: MediaLimits, name: str) -> None:
    if samples > limits.max_seconds * rate:
        raise MediaError(
            f"{name}: it is longer than the limit of {limits.max_seconds:g} s (max_seconds); send a part of it"
        )
    if samples > _MOST_SAMPLES:
        raise MediaError(f"{name}: it has more than {_MOST_SAMPLES} samples; send a part, or fewer in a second")


def _resampled(samples: np.ndarray, given: float, rate: int, name: str) -> np.ndarray:
    if given == rate:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"{name} has {given:g} Hz, and is resampled to {rate} with soxr: {INSTALL}") from error
    found = soxr.resample(samples, given, rate)
    if not len(found):
        raise MediaError(f"{name}: too short, {len(samples)} samples at {given:g} Hz")
    return found


def _from_array(source: Any, rate: int, name: str) -> tuple[np.ndarray, float]:
    given: Any = rate
    if isinstance(source, tuple) and len(source) == 2 and np.ndim(source[1]) == 0:
        source, given = source
    if isinstance(given, bool) or not isinstance(given, (int, float, np.number)):
        raise MediaError(f"{name}: the rate must be a number of samples in a second, got {given!r}")
    if not (hasattr(source, "__array__") or isinstance(source, (list, tuple))):
        raise MediaError(f"{name}: {type(source).__name__} is no sound; give a file, a URL, bytes, or (array, rate)")
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"{name}: cannot be made an array: {error}") from None
    if array.ndim not in (1, 2) or not array.size:
        raise MediaError(f"{name}: an array of shape {array.shape} is no sound; give (samples,)")
    if array.ndim == 2:
        if min(array.shape) > _MOST_CHANNELS:
            raise MediaError(f"{name}: an array of shape {array.shape} is no sound; give (samples, channels)")
        array = array.T if array.shape[0] < array.shape[1] else array  # (samples, channels)
    if array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype.kind != "f":
        raise MediaError(f"{name}: samples are floats or integers, not {array.dtype}")
    mixed = _mixed(array)
    return mixed.copy() if np.may_share_memory(mixed, array) else mixed, float(given)  # the caller may go on using it


def _mixed(samples: np.ndarray) -> np.ndarray:
    """(samples,) or (samples, channels) to (samples,) float32."""
    mixed = samples.mean(axis=1) if samples.ndim == 2 else samples
    return np.ascontiguousarray(mixed, dtype=np.float32)


class _Tolerant(io.BytesIO):
    """Bytes that stay where they are when a broken file points before their start.

    soundfile asks from inside a callback, where an exception cannot be raised and would be printed.
    """

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _decode(data: bytes, limits: MediaLimits, name: str) -> tuple[np.ndarray, float]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: it is there, and its C library is not
        raise ImportError(f"sounds are read with soundfile: {INSTALL}") from error
    try:
        file = soundfile.SoundFile(_Tolerant(data))
    except (soundfile.SoundFileError, RuntimeError, TypeError):
        return _decode_with_ffmpeg(data, limits, name)
    with refusing(name), file:
        if file.frames < 1 << 62:  # the largest number stands for a length that the file does not tell
            _check_length(file.frames, file.samplerate, limits, name)
        parts, have = [], 0
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            parts.append(_mixed(block))
            have += len(block)
            _check_length(have, file.samplerate, limits, name)
        return np.concatenate(parts or [np.empty(0, np.float32)]), file.samplerate


def _decode_with_ffmpeg(data: bytes, limits: MediaLimits, name: str) -> tuple[np.ndarray, float]:
    with refusing(name), open_container(data) as container:
        if not container.streams.audio:
            raise MediaError(f"{name}: it has no sound in it")
        stream = container.streams.audio[0]
        from av import AudioResampler

        # changes the numbers' format alone: to one array of floats for each channel
        convert = AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        parts, have = [], 0
        for frame in container.decode(stream):
            for planar in convert.resample(frame):
                parts.append(_mixed(planar.to_ndarray().T))
                have += planar.samples
            _check_length(have, stream.rate, limits, name)
        return np.concatenate(parts or [np.empty(0, np.float32)]), stream.rate
