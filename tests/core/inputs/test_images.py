"""Pictures become the very arrays that the published processors make of them."""

import numpy as np
import pytest
from PIL import Image

from modelport.inputs import images
from modelport.inputs.images import ImageSettings, preprocess
from modelport.inputs.media import MediaError

SIZES = [(1, 1), (31, 57), (57, 31), (224, 224), (225, 224), (223, 640), (640, 223), (100, 1), (336, 500)]  # (h, w)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA" if mode in ("RGBA", "LA") else None)
    return image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)


def reference(family: str, settings: dict, image: Image.Image) -> np.ndarray:
    if family == "clip":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    elif family == "siglip":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor
    elif family == "llava":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    else:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as Processor
    return np.asarray(Processor(**settings)(image, return_tensors="np")["pixel_values"][0])


PUBLISHED = {  # as the files of clip-vit-large-patch14-336, siglip-base, llava-1.5, blip2 and others say it
    "old clip": (
        "clip",
        {"crop_size": 56, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 56},
    ),
    "new clip": (
        "clip",
        {
            "crop_size": {"height": 48, "width": 56},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.5, 0.4, 0.3],
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 40},
        },
    ),
    "crop larger than the picture": (
        "clip",
        {"crop_size": {"height": 301, "width": 290}, "do_center_crop": True, "do_resize": False},
    ),
    "siglip": (
        "siglip",
        {"size": {"height": 38, "width": 44}, "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5] * 3},
    ),
    "both edges": (
        "siglip",
        {"size": {"shortest_edge": 30, "longest_edge": 50}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "max height and width": (
        "siglip",
        {"size": {"max_height": 300, "max_width": 200}, "resample": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "no normalizing": ("siglip", {"size": {"height": 20, "width": 30}, "do_normalize": False, "resample": 0}),
    "no rescaling": (
        "siglip",
        {"size": {"height": 20, "width": 30}, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ),
    "llava": ("llava", {"crop_size": 56, "size": 56, "do_center_crop": True, "do_pad": True}),
    "blip": ("blip", {"size": {"height": 41, "width": 41}}),
}


# A line one pixel wide has no short edge left where the long one is bounded.
CASES = [(case, size) for case in PUBLISHED for size in SIZES if (case, size) != ("both edges", (100, 1))]


@pytest.mark.parametrize(("case", "size"), CASES, ids=str)
def test_equals_the_published_processor(case: str, size: tuple[int, int]) -> None:
    family, settings = PUBLISHED[case]
    image = picture(*size)
    found = preprocess(image, ImageSettings.model_validate(settings))
    expected = reference(family, settings, image)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_equals_the_published_processor(mode: str) -> None:
    """Of transparent pictures the one laid over white: older versions of that processor drop the transparency."""
    settings = {"crop_size": 24, "size": 24, "do_center_crop": True}
    image = opaque = picture(31, 45, mode)
    if mode in ("LA", "RGBA"):
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    found = preprocess(image, ImageSettings.model_validate(settings))
    assert np.abs(found - reference("clip", settings, opaque)).max() <= 1e-5


def test_an_array_is_taken_like_the_picture() -> None:
    image = picture(30, 40)
    settings = ImageSettings(size={"height": 20, "width": 20})
    assert np.array_equal(preprocess(np.asarray(image), settings), preprocess(image, settings))


@pytest.mark.parametrize(
    ("keys", "size", "crop"),
    [
        ({"size": 30}, {"height": 30, "width": 30}, None),
        ({"size": 30, "do_center_crop": True, "crop_size": 20}, {"shortest_edge": 30}, {"height": 20, "width": 20}),
        ({"size": 30, "default_to_square": False}, {"shortest_edge": 30}, None),
        ({"size": [20, 30]}, {"height": 20, "width": 30}, None),
        (
            {"size": {"shortest_edge": 5, "height": None}, "crop_size": [7, 8]},
            {"shortest_edge": 5},
            {"height": 7, "width": 8},
        ),
    ],
)
def test_spellings_of_sizes(keys: dict, size: dict, crop: dict | None) -> None:
    settings = ImageSettings.model_validate(keys | {"feature_extractor_type": "CLIPFeatureExtractor"})
    assert (settings.size, settings.crop_size) == (size, crop)


def test_one_mean_for_all_channels() -> None:
    assert ImageSettings(image_mean=0.5, image_std=1).image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("size", "expected"), [((100, 200), (25, 50)), ((30, 20), (50, 33)), ((1, 1000), (1, 50))])
def test_longest_edge_is_filled(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert images.resized(*size, {"longest_edge": 50}) == expected


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shortest_edge or longest_edge, got {'edge': 3}"):
        images.resized(3, 4, {"edge": 3})


def test_a_line_is_not_blown_up_to_gigabytes() -> None:
    settings = ImageSettings.model_validate({"size": 224, "crop_size": 224, "do_center_crop": True})
    with pytest.raises(MediaError, match="60000x1 pixels would be resized to 13440000x224"):
        preprocess(Image.new("RGB", (60_000, 1)), settings)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (20, 20), (7, 10)])
def test_pad_to_square_equals_the_published_one(size: tuple[int, int]) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    image = picture(*size)
    expected = LlavaImageProcessorPil().pad_to_square(np.asarray(image).transpose(2, 0, 1), (1, 2, 3))
    assert np.array_equal(np.asarray(images.pad_to_square(image, (1, 2, 3))).transpose(2, 0, 1), expected)


def test_patches_are_cut_row_by_row() -> None:
    from transformers.image_transforms import divide_to_patches

    pixels = np.arange(3 * 12 * 20).reshape(3, 12, 20)
    assert np.array_equal(images.patches(pixels, (4, 5)), np.stack(divide_to_patches(pixels, (4, 5))))
    with pytest.raises(ValueError, match=r"do not divide a picture of \(12, 20\)"):
        images.patches(pixels, (5, 5))


@pytest.mark.parametrize(
    ("array", "mode", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), "I;16", [0, 1, 255]),
        (np.array([[0, 200, 255]], np.int32), "I", [0, 200, 255]),
        (np.array([[0, 32768, 65535]], np.int32), "I", [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), "F", [0, 128, 255]),
        (np.array([[0, 2, 255]], np.float32), "F", [0, 2, 255]),
    ],
)
def test_more_than_eight_bits_are_scaled(array: np.ndarray, mode: str, expected: list[int]) -> None:
    image = Image.fromarray(array)
    assert image.mode == mode
    assert np.asarray(images.to_rgb(image))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("values", [[-1.0, 0], [np.nan, 0], [0, 256.0]])
def test_colours_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(MediaError, match="are no colours; scale them"):
        images.to_rgb(Image.fromarray(np.array([values], np.float32)))


def test_transparency_is_dropped_or_laid_over_a_background() -> None:
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 0))
    assert images.to_rgb(image).getpixel((0, 0)) == (200, 0, 0)
    assert images.to_rgb(image, (255, 255, 255)).getpixel((0, 0)) == (255, 255, 255)
    palette = image.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert images.to_rgb(palette, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (np.zeros((4, 5), np.uint8), (5, 4)),
        (np.zeros((4, 5, 1), np.uint8), (5, 4)),
        (np.zeros((4, 5, 4), np.uint8), (5, 4)),
        (np.zeros((3, 4, 5), np.float32), (5, 4)),
        (np.ones((4, 5), np.bool_), (5, 4)),
    ],
)
def test_arrays_become_pictures(array: np.ndarray, size: tuple[int, int]) -> None:
    image = images.to_rgb(images.from_array(array))
    assert (image.mode, image.size) == ("RGB", size)


def test_floats_reach_white() -> None:
    assert images.from_array(np.array([[0, 0.5, 1]], np.float64)).tobytes() == bytes([0, 128, 255])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 6, 2), np.uint8), r"shape \(5, 6, 2\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (np.zeros((4, 5, 3), np.int64), "not int64"),
        (np.full((4, 5, 3), 255.0), "from 0 to 1; give uint8"),
        (np.full((4, 5, 3), np.nan), "from 0 to 1"),
        (np.array([[object()]]), "not object"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        images.from_array(array)
