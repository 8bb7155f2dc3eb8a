"""LLaVA-NeXT: tiles, placeholders and wrong media; what it computes is the kit's to check."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.llava_next import LlavaNextConfig, LlavaNextInputs, best_resolution, num_patches
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SIZES = [(40, 52), (91, 33), (18, 18), (7, 60), (300, 5), (1, 1), (36, 36), (35, 37)]
IMAGE = 319


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


@pytest.fixture(scope="module")
def architecture():
    return load_plugins().find(["LlavaNextForConditionalGeneration"])


@pytest.fixture(scope="module")
def inputs(architecture, tmp_path_factory) -> LlavaNextInputs:
    folder = tmp_path_factory.mktemp("files")
    settings = architecture.files["preprocessor_config.json"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return LlavaNextInputs(LlavaNextConfig.model_validate(architecture.tiny), None, ProcessorFiles(folder), None)


def published(architecture):
    from transformers import LlavaNextImageProcessorPil

    settings = architecture.files["preprocessor_config.json"]
    return LlavaNextImageProcessorPil(**{k: v for k, v in settings.items() if k != "image_processor_type"})


@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_rows_are_the_published_processors(architecture, inputs, size):
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    image, theirs = picture(1, *size), published(architecture)
    item, wanted = inputs.image(image), theirs(image, return_tensors="pt")
    assert item.tensors["image_sizes"].tolist() == wanted["image_sizes"][0].tolist()
    assert (item.tensors["pixel_values"] - wanted["pixel_values"][0]).abs().max() <= 1e-5
    counting = object.__new__(LlavaNextProcessor)
    counting.image_processor, counting.patch_size, counting.num_additional_image_tokens = theirs, 6, 1
    assert len(item.token_ids) == counting._get_number_of_features(size[1], size[0], 18, 18) - 1
    assert set(item.token_ids) == {IMAGE}


def test_what_is_transparent_shows_white(inputs):
    image = picture(2, 20, 20, "RGBA")
    image.putalpha(0)
    white = inputs.image(Image.new("RGB", (20, 20), (255, 255, 255)))
    assert torch.equal(inputs.image(image).tensors["pixel_values"], white.tensors["pixel_values"])


def test_published_sizes_have_the_published_numbers_of_rows():
    from transformers.image_processing_utils import select_best_resolution

    choices = LlavaNextConfig.model_fields["image_grid_pinpoints"].default
    for size in [(480, 640), (336, 336), (1, 5000), (672, 672), (2000, 1000), (337, 335)]:
        assert best_resolution(size, choices) == select_best_resolution(size, [list(c) for c in choices])
    for size, total in [((480, 640), 2340), ((1336, 1000), 2352)]:
        rows, columns = num_patches(size, best_resolution(size, choices), 336, 24)
        assert 576 + rows * (columns + 1) == total


def test_rows_of_an_image_may_be_given_and_wrong_media_say_why(architecture, tmp_path):
    folder = ModuleReference(architecture).save(tmp_path / "files")
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    llm = LLM(str(folder), skip_tokenizer_init=True, max_model_len=256, dtype="float32")

    def run(ids, image):
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        return list(llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    front, image = llm._front, picture(3, 50, 20)
    item = front.media.read({"image": image})["image"][0]
    with torch.inference_mode():
        rows = front.engine.model.embed_media("image", [item.tensors])[0].clone()
    assert rows.shape == (len(item.token_ids), 64)
    assert run([5, IMAGE, 7], rows) == run([5, IMAGE, 7], image)
    assert run([5, IMAGE, 7, IMAGE], [picture(4, 9, 9), rows]) == run([5, IMAGE, 7, IMAGE], [picture(4, 9, 9), image])
    for ids, given, said in [
        ([5, IMAGE], torch.ones(3, 7), "rows"),
        ([5, IMAGE, IMAGE], image, "placeholders"),
        ([5, IMAGE], b"no picture", "image 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(ids, given)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"vision_feature_select_strategy": "full"}, "'default' can"),
        ({"image_grid_pinpoints": [[18, 40]]}, r"\[18, 40\]"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(architecture, entries, said):
    with pytest.raises(ValueError, match=said):
        LlavaNextConfig.model_validate({**architecture.tiny, **entries})


def test_pinpoints_that_differ_are_refused(architecture, tmp_path):
    files = ProcessorFiles(tmp_path, {"image_grid_pinpoints": [[18, 18]]})
    with pytest.raises(ValueError, match="must be the same"):
        LlavaNextInputs(LlavaNextConfig.model_validate(architecture.tiny), None, files, None)
