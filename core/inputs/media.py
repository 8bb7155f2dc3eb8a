"""Read pictures, films and sounds that users send, and tell two of them apart.

Decisions: everything ends as plain decoded content (an RGB picture of Pillow, frames, samples), so that families never
see a file; whatever is wrong with a file is a `MediaError` that names the item. Decoding libraries are an extra and are
imported where they are used. This module needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport.inputs._decoders import INSTALL, refusing
from modelport.inputs.audio import Audio as Audio
from modelport.inputs.audio import read_audio as read_audio
from modelport.inputs.fetch import MediaError as MediaError
from modelport.inputs.fetch import MediaLimits as MediaLimits
from modelport.inputs.fetch import fetch, shortened
from modelport.inputs.images import Colour, from_array, to_rgb
from modelport.inputs.video import Video as Video
from modelport.inputs.video import read_video as read_video

if TYPE_CHECKING:
    from PIL.Image import Image

# Drawing these runs other programs, or needs ones that are not there.
_NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


def read_image(
    source: Any,
    limits: MediaLimits | None = None,
    *,
    trusted: bool = True,
    name: str = "image",
    background: Colour | None = None,
) -> Image:
    """Return a picture as eight-bit RGB, the right way up. Of an animated one, the first frame.

    :param source: what `fetch` takes; a picture of Pillow; or an array or tensor: (height, width), (height, width, 1, 3
        or 4) or channels first, uint8 or floats from 0 to 1.
    :param trusted: whether a plain path may be read.
    :param name: what error messages call it, such as "image 2".
    :param background: see `to_rgb`, which also says what becomes of more than eight bits.
    :raises MediaError: no picture, a broken one, or one beyond the limits; the size is known before decoding.
    :raises ImportError: Pillow is not installed.
    """
    limits = limits or MediaLimits()
    try:
        from PIL import Image as pil
        from PIL import ImageOps
    except ImportError as error:
        raise ImportError(f"pictures are read with Pillow: {INSTALL}") from error
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        data = fetch(source, limits, trusted=trusted, name=name)
        name = f"{name} ({shortened(source)})"
        image = _open(data, name)
    elif isinstance(source, pil.Image):
        image = source
    elif hasattr(source, "__array__"):
        with refusing(name):
            array = np.asarray(source)
            if array.ndim == 3 and array.size > 4 * limits.max_pixels:
                raise MediaError(f"{name}: an array of shape {array.shape} is too large")
            image = from_array(array)
    else:
        raise MediaError(f"{name}: {type(source).__name__} is no picture; give a file, a URL, bytes or an array")
    if image.width < 1 or image.height < 1:
        raise MediaError(f"{name}: it has no pixels ({image.width}x{image.height})")
    if image.width * image.height > limits.max_pixels:
        raise MediaError(
            f"{name}: {image.width}x{image.height} pixels are more than the limit of {limits.max_pixels} "
            "(max_pixels); make it smaller"
        )
    with refusing(name):
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), background)


def _open(data: bytes, name: str) -> Image:
    from PIL import Image as pil

    pil.init()
    kinds = [kind for kind in pil.ID if kind not in _NOT_DECODED]
    try:
        return pil.open(io.BytesIO(data), formats=kinds)
    except pil.DecompressionBombError as error:
        raise MediaError(f"{name}: {error}; make it smaller") from None
    except pil.UnidentifiedImageError:
        start = data[:12]
        raise MediaError(f"{name}: that is no picture of a known kind; it starts with {start!r}") from None
    except Exception as error:  # whatever a format's reader trips over in a header
        raise MediaError(f"{name}: it is broken: {error}") from None


def content_hash(media: Any) -> bytes:
    """Return 32 bytes that are the same for the same decoded content, and else differ.

    :param media: a picture, a `Video`, an `Audio`, an array or a tensor (its shape, type and bytes count), None, text,
        bytes, numbers, or sequences and dictionaries of these, whose order counts.
    :raises TypeError: anything else.
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in _parts(media):
        # the length in front, or the end of one part could be read as the start of the next
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _parts(media: Any) -> Any:
    torch = sys.modules.get("torch")  # what is no tensor yet needs no torch
    if media is None or isinstance(media, (bool, int, float, str, np.generic)):
        yield f"{type(media).__name__} {media!r}".encode()
    elif isinstance(media, (bytes, bytearray, memoryview)):
        yield from (b"bytes", bytes(media))
    elif isinstance(media, Video):
        yield from (b"video", repr((media.fps, media.indices, media.total)).encode())
        yield from _parts(media.frames)
    elif isinstance(media, Audio):
        yield from (b"audio", repr(media.rate).encode())
        yield from _parts(media.samples)
    elif hasattr(media, "getbands"):
        yield from (b"image", f"{media.mode} {media.size}".encode(), media.tobytes())
        if media.mode in ("P", "PA"):
            yield repr(media.getpalette("RGBA")).encode()
    elif isinstance(media, np.ndarray):
        assert not media.dtype.hasobject
        yield from (
            b"array",
            f"{media.dtype.str} {media.shape}".encode(),
            np.ascontiguousarray(media).reshape(-1).view(np.uint8),
        )
    elif torch is not None and isinstance(media, torch.Tensor):
        plain = media.detach().cpu().contiguous()
        yield from (b"tensor", f"{plain.dtype} {tuple(plain.shape)}".encode())
        yield plain.reshape(-1).view(torch.uint8).numpy()  # NumPy does not know every type that torch has
    elif isinstance(media, Mapping):
        yield from (b"mapping", str(len(media)).encode())
        for key, value in media.items():
            yield from _parts(key)
            yield from _parts(value)
    elif isinstance(media, Sequence):
        yield from (b"sequence", str(len(media)).encode())
        for item in media:
            yield from _parts(item)
    else:
        raise TypeError(f"content_hash knows pictures, films, sounds, arrays and tensors, not {type(media).__name__}")
