"""What published `preprocessor_config.json` files ask for: pictures to arrays, number for number as their authors did.

Decisions: plain functions that a family puts together in its own order; `preprocess` is the order of CLIP and SigLIP.
Everything up to the last step works on eight-bit pixels, as the published processors do (Pillow's filters round to
eight bits, so that any other way gives other numbers). The last step looks up the value of each of the 256 levels,
which is exact and faster than computing it per pixel. Sizes are (height, width) everywhere; only Pillow turns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modelport.inputs.fetch import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

BICUBIC = 3  # Pillow's number, which is what the files hold
# A line one pixel high and 60,000 wide is a tiny file, and 13 million pixels wide once its short edge has 224.
_MOST_PIXELS = 1 << 26

Colour = tuple[int, int, int]


class ImageSettings(BaseModel):
    """The keys of a `preprocessor_config.json` that the CLIP and SigLIP families share, in old and new spelling.

    `size` and `crop_size` may be a number, a (height, width) pair, or a dictionary; a number is the short edge where a
    crop follows (CLIP) and both edges otherwise (ViT), unless `default_to_square` says which. What a file leaves out
    has the value of the published CLIP class, but for the crop, which happens only where the file asks for it.
    `do_pad` is LLaVA's: to a square in the mean colour, before everything else. Other keys are ignored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_convert_rgb: bool | None = True
    do_pad: bool | None = False
    do_resize: bool | None = True
    size: dict[str, int] = Field(default_factory=lambda: {"shortest_edge": 224})
    default_to_square: bool | None = None
    resample: int | None = Field(default=BICUBIC, ge=0, le=5)
    do_center_crop: bool | None = False
    crop_size: dict[str, int] | None = None
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="before")
    @classmethod
    def _short_edge_or_square(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping) or not isinstance(size := settings.get("size"), int):
            return settings
        square = settings.get("default_to_square")
        if square is None:
            square = not settings.get("do_center_crop")
        return {**settings, "size": {"height": size, "width": size} if square else {"shortest_edge": size}}

    @field_validator("size", "crop_size", mode="before")
    @classmethod
    def _as_dictionary(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {"height": value, "width": value}
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return {"height": value[0], "width": value[1]}
        if isinstance(value, Mapping):  # version 5 of transformers writes every key, most of them null
            return {key: edge for key, edge in value.items() if edge is not None}
        return value

    @field_validator("image_mean", "image_std", mode="before")
    @classmethod
    def _per_channel(cls, value: Any) -> Any:
        return (value,) * 3 if isinstance(value, (int, float)) else value


def preprocess(image: Image | np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Return what the published CLIP, SigLIP and LLaVA processors make of one picture.

    :param image: a picture, or (height, width, 3) uint8, such as a frame of a film.
    :return: (3, height, width) float32; without rescaling and normalizing the levels 0 to 255.
    :raises MediaError: the picture is so narrow that resizing would make it enormous.
    """
    if isinstance(image, np.ndarray):
        image = from_array(image)
    if image.mode != "RGB":
        image = to_rgb(image, background=(255, 255, 255))  # what the published processors lay a picture over
    if settings.do_pad:
        image = pad_to_square(image, mean_colour(settings.image_mean))
    if settings.do_resize:
        resample = BICUBIC if settings.resample is None else settings.resample
        image = resize(image, resized(image.height, image.width, settings.size), resample)
    pixels = np.asarray(image)
    if settings.do_center_crop:
        crop = settings.crop_size or settings.size
        if "height" not in crop or "width" not in crop:
            raise ValueError(f"crop_size must name a height and a width, got {crop}")
        pixels = center_crop(pixels, (crop["height"], crop["width"]))
    scale = settings.rescale_factor if settings.do_rescale else None
    if settings.do_normalize:
        return normalize(pixels, scale, settings.image_mean, settings.image_std)
    return normalize(pixels, scale)


def to_rgb(image: Image, background: Colour | None = None) -> Image:
    """Return the picture as eight-bit RGB.

    Palettes, CMYK and the rest are converted as Pillow does. Grey pictures with more than eight bits are scaled to
    eight, not cut off at white: sixteen-bit ones from 0..65535, floats from 0..1 (or, where they are larger, taken as
    0..255), 32-bit integers as the smallest of 0..255 and 0..65535 that holds them.

    :param background: what shows through where the picture is transparent; None drops the transparency, as
        `image.convert("RGB")` does, so that what lies hidden under it shows.
    :raises MediaError: float or 32-bit pixels outside these ranges, which have no meaning as a colour.
    """
    from PIL import Image as pil

    if image.mode.startswith("I;16"):
        image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = pil.fromarray(_levels(np.asarray(image)))
    if background is not None and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = pil.alpha_composite(pil.new("RGBA", image.size, (*background, 255)), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray) -> Image:
    """Return an array as a picture.

    :param array: (height, width), (height, width, 1, 3 or 4) or (1, 3 or 4, height, width); uint8, or floats in 0..1.
    :raises MediaError: another shape, another type, or values out of range.
    """
    from PIL import Image as pil

    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[-1] not in channels and array.shape[0] in channels:
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in channels) or not array.size:
        raise MediaError(f"an array of shape {array.shape} is no picture; give (height, width, 3)")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise MediaError("a picture of floats has values from 0 to 1; give uint8 for 0 to 255")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise MediaError(
            f"a picture is uint8, or floats from 0 to 1, not {array.dtype}; convert it with .astype('uint8')"
        )
    return pil.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array))


def _levels(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if (
        not (np.isfinite(low) and np.isfinite(high))
        or low < 0
        or high > 65535
        or (values.dtype.kind == "f" and high > 255)
    ):
        raise MediaError(f"pixels from {low} to {high} are no colours; scale them to 0..255 and convert to uint8")
    if values.dtype.kind == "f":
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    return (values >> 8 if high > 255 else values).astype(np.uint8)


def resized(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Return the (height, width) that `size` asks for, rounded as the published processors do.

    :param size: `height` and `width`; or `shortest_edge`, with or without a `longest_edge` that must not be exceeded;
        or `longest_edge`, or `max_height` and `max_width`, which the picture is made to fill.
    :raises ValueError: other keys.
    """
    match size:
        case {"shortest_edge": short, "longest_edge": longest}:
            return _within(height, width, short, longest)
        case {"shortest_edge": short}:
            long = int(short * max(height, width) / min(height, width))
            return (long, short) if width <= height else (short, long)
        case {"longest_edge": longest}:
            return _filling(height, width, longest, longest)
        case {"max_height": most_rows, "max_width": most_columns}:
            return _filling(height, width, most_rows, most_columns)
        case {"height": rows, "width": columns}:
            return rows, columns
    raise ValueError(f"size must have height and width, shortest_edge or longest_edge, got {dict(size)}")


def _within(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    exact: float = short
    if max(height, width) / min(height, width) * short > longest:
        exact = longest * min(height, width) / max(height, width)
        short = round(exact)
    if min(height, width) == short:
        return height, width
    return (int(exact * height / width), short) if width < height else (short, int(exact * width / height))


def _filling(height: int, width: int, most_rows: int, most_columns: int) -> tuple[int, int]:
    scale = min(most_rows / height, most_columns / width)
    return max(int(height * scale), 1), max(int(width * scale), 1)


def resize(image: Image, size: tuple[int, int], resample: int = BICUBIC) -> Image:
    """Return the picture resized to (height, width) with one of Pillow's filters, by its number.

    :raises MediaError: the result would be enormous, which is what very narrow pictures become.
    """
    height, width = size
    if height < 1 or width < 1 or height * width > _MOST_PIXELS:
        raise MediaError(
            f"a picture of {image.width}x{image.height} pixels would be resized to {width}x{height}; "
            "send one that is less narrow"
        )
    return image.resize((width, height), resample=resample)


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the middle of a picture; what it is too small for is black.

    :param pixels: (height, width, channels).
    :param size: (height, width) of the result.
    """
    for axis, (have, want) in enumerate(zip(pixels.shape, size, strict=False)):
        if want > have:  # one row more goes before the picture than after it, where they cannot be equal
            before = ceil((want - have) / 2)
            widths = [(0, 0)] * pixels.ndim
            widths[axis] = (before, want - have - before)
            pixels = np.pad(pixels, widths)
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]]


def pad_to_square(image: Image, colour: Colour = (0, 0, 0)) -> Image:
    """Return the picture in the middle of a square as large as its long edge."""
    from PIL import Image as pil

    if image.width == image.height:
        return image
    edge = max(image.size)
    square = pil.new(image.mode, (edge, edge), colour)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def mean_colour(mean: Sequence[float]) -> Colour:
    """The colour that normalizing turns into about zero, rounded down as LLaVA's authors do."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def normalize(
    pixels: np.ndarray,
    scale: float | None = 1 / 255,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> np.ndarray:
    """Return `(pixels * scale - mean) / std`, channels first.

    :param pixels: (height, width, channels) uint8.
    :param scale: None leaves the levels 0 to 255.
    :param mean: one for each channel; None (with `std` None) does not normalize.
    :return: (channels, height, width) float32.
    """
    assert pixels.dtype == np.uint8
    channels = pixels.shape[-1]
    levels = np.arange(256, dtype=np.float64)
    table = (levels if scale is None else levels * scale).astype(np.float32)  # (256,)
    tables = np.repeat(table[None], channels, axis=0)  # (channels, 256)
    if mean is not None and std is not None:
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"image_mean and image_std must have {channels} numbers, got {mean} and {std}")
        tables = (tables - np.float32(mean)[:, None]) / np.float32(std)[:, None]
    result = np.empty((channels, *pixels.shape[:2]), np.float32)
    for channel in range(channels):
        np.take(tables[channel], pixels[..., channel], out=result[channel], mode="clip")
    return result


def patches(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut a picture into patches, row after row.

    :param pixels: (channels, height, width).
    :param size: (height, width) of a patch, which must divide the picture.
    :return: (patches, channels, patch height, patch width), a copy.
    """
    channels, height, width = pixels.shape
    rows, columns = height // size[0], width // size[1]
    if (rows * size[0], columns * size[1]) != (height, width):
        raise ValueError(f"patches of {size} do not divide a picture of {(height, width)}; resize or pad it first")
    cut = pixels.reshape(channels, rows, size[0], columns, size[1]).transpose(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, channels, *size)
