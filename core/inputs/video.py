"""Films to frames: the wanted ones of a file, an array, a list of pictures or an animated picture.

Decisions: frames are decoded with PyAV in the order they are shown, and only those that the family picks are kept. How
many there are is asked of the header and, where it does not say (WebM, GIF) or says wrong, counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport.inputs._decoders import open_container, refusing
from modelport.inputs.fetch import MediaError, MediaLimits, fetch, shortened
from modelport.inputs.images import from_array, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from PIL.Image import Image

Pick = Callable[[int, float | None], Sequence[int]]
"""Given how many frames a film has and how many it shows each second (None: unknown), which ones to keep."""


@dataclass(frozen=True, eq=False)
class Video:
    """The kept frames of a film.

    :param frames: (frames, height, width, 3) uint8.
    :param fps: frames that the source shows in a second, or None where it does not say.
    :param indices: which frames of the source were kept; one number for each of `frames`.
    :param total: frames in the source.
    """

    frames: np.ndarray
    fps: float | None
    indices: tuple[int, ...]
    total: int


def every_frame(total: int, fps: float | None) -> Sequence[int]:
    """Keep all frames."""
    return range(total)


def read_video(
    source: Any,
    limits: MediaLimits | None = None,
    pick: Pick = every_frame,
    *,
    trusted: bool = True,
    name: str = "video",
) -> Video:
    """Return the frames of a film that `pick` chooses.

    :param source: what `fetch` takes; (frames, height, width, 3) uint8; a list of pictures or of arrays of one size; an
        animated picture; or a pair of one of these and a dictionary with what is known about it: `fps`, and, of frames
        that were picked before, `do_sample_frames=False` with `frames_indices` and `total_num_frames`.
    :param pick: frame numbers to keep, in any order and with repetitions.
    :param trusted: whether a plain path may be read.
    :param name: what error messages call it, such as "video 2".
    :raises MediaError: no film, a broken one, or one beyond the limits.
    :raises ImportError: PyAV is not installed.
    """
    limits = limits or MediaLimits()
    known: Mapping[str, Any] = {}
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
        source, known = source
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        label = f"{name} ({shortened(source)})"
        return _decode(fetch(source, limits, trusted=trusted, name=name), known, limits, pick, label)
    frames = _frames(source, limits, name)
    fps = _fps(known.get("fps"), name)
    if known.get("do_sample_frames") is False:
        total, indices = _picked_before(known, len(frames), name)
        places = tuple(range(len(frames)))
    else:
        total, indices = len(frames), _picked(pick, len(frames), fps)
        places = indices
    images = {place: _pixels(frames[place], place, name) for place in dict.fromkeys(places)}
    return Video(_stacked(images, places, limits, name), fps, indices, total)


def _fps(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < float(value) < 1e6:
        raise MediaError(f"{name}: fps must be a positive number, got {value!r}")
    return float(value)


def _picked_before(known: Mapping[str, Any], count: int, name: str) -> tuple[int, tuple[int, ...]]:
    numbers, total = known.get("frames_indices"), known.get("total_num_frames")
    try:
        indices = tuple(range(count)) if numbers is None else tuple(int(number) for number in numbers)
        total = max(indices) + 1 if total is None else int(total)
    except (TypeError, ValueError):
        raise MediaError(f"{name}: frames_indices must be whole numbers, and total_num_frames one") from None
    if len(indices) != count or min(indices) < 0 or max(indices) >= total:
        raise MediaError(
            f"{name}: {count} frames of {total}, but frames_indices has {len(indices)} numbers, "
            f"from {min(indices, default=None)} to {max(indices, default=None)}"
        )
    return total, indices


def _picked(pick: Pick, total: int, fps: float | None) -> tuple[int, ...]:
    indices = tuple(int(index) for index in pick(total, fps))
    if not indices or min(indices) < 0 or max(indices) >= total:
        raise ValueError(f"frames {indices} were picked of a film that has {total}; pick at least one, from 0")
    return indices


def _frames(source: Any, limits: MediaLimits, name: str) -> Sequence[Any]:
    """What can be indexed by frame: pictures or arrays, none of them converted yet."""
    if hasattr(source, "seek") and hasattr(source, "getbands"):  # a picture of Pillow
        return _animation(source, limits, name)
    if hasattr(source, "__array__"):
        try:
            source = np.asarray(source)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MediaError(f"{name}: cannot be made an array: {error}") from None
        if source.ndim != 4:
            raise MediaError(f"{name}: an array of shape {source.shape} is no film; give (frames, height, width, 3)")
    if not isinstance(source, (list, tuple, np.ndarray)):
        raise MediaError(f"{name}: {type(source).__name__} is no film; give a file, a URL, bytes, an array or a list")
    if len(source) == 0:
        raise MediaError(f"{name}: it has no frames")
    return source


def _animation(image: Image, limits: MediaLimits, name: str) -> list[Image]:
    found = []
    with refusing(name):
        count = getattr(image, "n_frames", 1)
        _check_size(count, image.height, image.width, limits, name)
        for index in range(count):
            image.seek(index)
            found.append(image.convert("RGB"))
    return found


def _pixels(frame: Any, index: int, name: str) -> np.ndarray:
    """(height, width, 3) uint8."""
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[-1] == 3:
        return frame
    try:
        if hasattr(frame, "getbands"):
            return np.asarray(to_rgb(frame))
        if hasattr(frame, "__array__"):
            return np.asarray(to_rgb(from_array(np.asarray(frame))))
    except MediaError as error:
        raise MediaError(f"{name}, frame {index}: {error}") from None
    except Exception as error:  # of a file that is opened here for the first time
        raise MediaError(f"{name}, frame {index}: cannot be decoded: {error}") from None
    raise MediaError(f"{name}, frame {index}: {type(frame).__name__} is no picture; give pictures or arrays")


def _stacked(images: Mapping[int, np.ndarray], places: Sequence[int], limits: MediaLimits, name: str) -> np.ndarray:
    first = images[places[0]]
    for place, image in images.items():
        if image.shape != first.shape:
            raise MediaError(
                f"{name}: frame {place} has {image.shape[1]}x{image.shape[0]} pixels, and others have "
                f"{first.shape[1]}x{first.shape[0]}; all must have one size"
            )
    height, width, _ = first.shape
    _check_size(len(places), height, width, limits, name)
    return np.stack([images[place] for place in places])


def _check_size(count: int, height: int, width: int, limits: MediaLimits, name: str) -> None:
    if height < 1 or width < 1:
        raise MediaError(f"{name}: its frames have no pixels ({width}x{height})")
    if height * width > limits.max_pixels:
        raise MediaError(
            f"{name}: frames of {width}x{height} pixels are more than the limit of {limits.max_pixels} (max_pixels)"
        )
    if count * height * width > limits.max_video_pixels:
        raise MediaError(
            f"{name}: {count} frames of {width}x{height} are more than the limit of {limits.max_video_pixels} pixels "
            "(max_video_pixels); send a shorter or smaller film"
        )


def _decode(data: bytes, known: Mapping[str, Any], limits: MediaLimits, pick: Pick, label: str) -> Video:
    until = time.monotonic() + limits.timeout_s
    with refusing(label):
        total, fps, height, width = _measure(data, label)
    fps = _fps(known.get("fps"), label) or fps
    for _ in range(2):
        if not total:
            break
        if total > limits.max_frames:
            raise MediaError(
                f"{label}: {total} frames are more than the limit of {limits.max_frames} (max_frames); "
                "send a shorter film"
            )
        indices = _picked(pick, total, fps)
        wanted = set(indices)
        _check_size(len(wanted), height, width, limits, label)
        with refusing(label), open_container(data) as container:
            kept, seen = _kept(container, wanted, until, limits, label)
        if len(kept) == len(wanted):
            return Video(_stacked(kept, indices, limits, label), fps, indices, total)
        total = seen  # the header promised more than there is, as after cutting a film without encoding it again
    raise MediaError(f"{label}: no frame of it can be decoded")


def _measure(data: bytes, label: str) -> tuple[int, float | None, int, int]:
    """Return how many frames there are, how many are shown in a second, and the height and width of one."""
    with open_container(data) as container:
        if not container.streams.video:
            raise MediaError(f"{label}: it has no pictures in it")
        stream = container.streams.video[0]
        rate = stream.average_rate
        # each packet of a video stream is one frame, and finding them decodes nothing
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return total, float(rate) if rate else None, stream.height, stream.width


def _kept(
    container: InputContainer, wanted: set[int], until: float, limits: MediaLimits, label: str
) -> tuple[dict[int, np.ndarray], int]:
    """Return the wanted frames, and how many were seen until all of them were found."""
    kept: dict[int, np.ndarray] = {}
    seen = 0
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"  # by default, most kinds of film are decoded by one processor
    for index, frame in enumerate(container.decode(stream)):
        seen = index + 1
        if time.monotonic() > until:
            raise MediaError(
                f"{label}: {seen} frames were decoded within {limits.timeout_s:g} s (timeout_s), and the film goes on; "
                "send a shorter or smaller one"
            )
        if index in wanted:
            if frame.is_corrupt:
                raise MediaError(f"{label}: frame {index} is damaged")
            _check_size(1, frame.height, frame.width, limits, label)  # it may change on the way
            kept[index] = _upright(frame)
            if len(kept) == len(wanted):
                break
    return kept, seen


def _upright(frame: VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90)  # how a telephone was held
    return np.rot90(pixels, turns) if turns % 4 else pixels
