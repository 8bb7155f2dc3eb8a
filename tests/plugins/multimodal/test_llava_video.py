"""LLaVA-NeXT-Video and LLaVA-OneVision: tiles, frames and rows; what they compute is the kit's to check."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.inputs.video import read_video
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

NEXT, ONEVISION = "LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
IMAGE, VIDEO = 319, 318


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(frames: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def write(architecture, folder):
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(params=[NEXT, ONEVISION])
def architecture(request):
    return load_plugins().find([request.param])


@pytest.fixture
def inputs(architecture, tmp_path):
    config = architecture.config.model_validate(architecture.tiny)
    return architecture.inputs(config, None, ProcessorFiles(write(architecture, tmp_path)), None)


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (18, 18), (60, 7), (1, 1), (37, 35)])
@pytest.mark.parametrize("most", [1, 9])
def test_onevisions_tiles_and_rows_are_the_published_processors(tmp_path, size, most):
    from transformers import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    architecture = load_plugins().find([ONEVISION])
    entries = {**architecture.tiny, "vision_aspect_ratio": f"anyres_max_{most}"}
    config = architecture.config.model_validate(entries)
    item = architecture.inputs(config, None, ProcessorFiles(write(architecture, tmp_path)), None).image(picture(*size))
    theirs = LlavaOnevisionImageProcessorPil(**architecture.files["preprocessor_config.json"])
    wanted = theirs(picture(*size), return_tensors="pt")
    assert item.tensors["image_sizes"].tolist() == wanted["image_sizes"][0].tolist()
    assert (item.tensors["pixel_values"] - wanted["pixel_values"][0]).abs().max() <= 1e-5
    counting = object.__new__(LlavaOnevisionProcessor)
    counting.image_processor, counting.num_image_tokens = theirs, 9
    counting.vision_aspect_ratio = f"anyres_max_{most}"
    assert len(item.token_ids) == counting._get_number_of_features(size[1], size[0], 18, 18)


def test_frames_are_prepared_as_pictures_are(architecture, inputs):
    from transformers import CLIPImageProcessorPil

    frames = film(3, 40, 31)
    item = inputs.video(read_video(frames, pick=inputs.pick_frames))
    settings = architecture.files["video_preprocessor_config.json"]
    wanted = CLIPImageProcessorPil(**settings)([Image.fromarray(f) for f in frames], return_tensors="pt")
    assert (item.tensors["pixel_values_videos"] - wanted["pixel_values"]).abs().max() <= 1e-5
    assert len(item.token_ids) == {NEXT: 3 * 1, ONEVISION: 3 * 2 * 2 + 1}[architecture.name]
    assert set(item.token_ids) == {VIDEO}


def test_long_films_are_looked_at_in_even_distances(architecture, tmp_path):
    config = architecture.config.model_validate(architecture.tiny)
    inputs = architecture.inputs(config, None, ProcessorFiles(write(architecture, tmp_path), {"num_frames": 8}), None)
    for total in (9, 64, 100, 1001):
        published = torch.arange(0, total, total / 8, dtype=torch.float64).int().tolist()
        assert list(inputs.pick_frames(total, 24.0)) == published
    assert list(inputs.pick_frames(5, None)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="num_frames"):
        architecture.inputs(config, None, ProcessorFiles(tmp_path, {"num_frames": "all"}), None)


def test_films_of_several_lengths_in_one_batch_and_wrong_ones(architecture, tmp_path):
    folder = write(architecture, ModuleReference(architecture).save(tmp_path / "files"))
    llm = LLM(str(folder), skip_tokenizer_init=True, max_model_len=256, dtype="float32")

    def prompt(ids, **media):
        return {"prompt_token_ids": ids, "multi_modal_data": media}

    def run(prompts):
        return [tuple(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)]

    prompts = [
        prompt([5, VIDEO, 7], video=film(2, 20, 30)),
        prompt([VIDEO, 7, VIDEO, 8], video=[film(5, 20, 30), film(2, 20, 30)]),
        prompt([VIDEO, 7, IMAGE], video=film(4, 31, 18), image=picture(40, 20)),
        prompt([5, 6], video=[]),
    ]
    alone = [run([one])[0] for one in prompts]
    assert run(prompts) == alone
    for wrong, said in [
        (prompt([5, VIDEO], video=b"no film"), "video 0"),
        (prompt([5, IMAGE], video=film(2, 20, 30)), "placeholders"),
        (prompt([5, VIDEO], video=torch.ones(4, 64)), "no embeddings"),
    ]:
        with pytest.raises(ValueError, match=said):
            run([wrong])


@pytest.mark.parametrize(
    ("name", "entries"),
    [(NEXT, {"spatial_pool_mode": "conv"}), (ONEVISION, {"vision_aspect_ratio": "square"})],
)
def test_other_settings_are_refused_by_name(name, entries):
    architecture = load_plugins().find([name])
    with pytest.raises(ValueError, match=next(iter(entries))):
        architecture.config.model_validate({**architecture.tiny, **entries})
