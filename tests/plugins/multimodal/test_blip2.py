"""BLIP-2: pictures, where their rows stand, and what is refused; what it computes is the kit's to check."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.blip2 import Blip2Config, Blip2Inputs
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
IMAGE = 319


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def architecture():
    return load_plugins().find(["Blip2ForConditionalGeneration"])


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (30, 30), (1, 1)])
def test_pictures_are_the_published_processors(architecture, tmp_path, size):
    from transformers import BlipImageProcessorPil

    settings = architecture.files["preprocessor_config.json"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    inputs = Blip2Inputs(Blip2Config.model_validate(architecture.tiny), None, ProcessorFiles(tmp_path), None)
    item = inputs.image(picture(1, *size))
    theirs = BlipImageProcessorPil(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    wanted = theirs(picture(1, *size), return_tensors="pt")["pixel_values"][0]
    assert (item.tensors["pixel_values"] - wanted).abs().max() <= 1e-5
    assert list(item.token_ids) == [IMAGE] * 5


def test_rows_stand_before_everything_or_where_a_placeholder_is(architecture, tmp_path):
    folder = ModuleReference(architecture).save(tmp_path / "files")
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    llm = LLM(str(folder), skip_tokenizer_init=True, max_model_len=64, dtype="float32")

    def run(ids, image):
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    image = picture(2, 50, 20)
    first = run([2, 7, 8], image)
    assert list(first.prompt_token_ids) == [IMAGE] * 5 + [2, 7, 8]
    placed = run([IMAGE, 2, 7, 8], image)
    assert placed.outputs[0].token_ids == first.outputs[0].token_ids
    assert list(run([2, IMAGE, 7], image).prompt_token_ids) == [2, *[IMAGE] * 5, 7]
    item = llm._front.media.read({"image": image})["image"][0]
    with torch.inference_mode():
        rows = llm._front.engine.model.embed_media("image", [item.tensors])[0].clone()
    assert run([2, 7, 8], rows).outputs[0].token_ids == first.outputs[0].token_ids
    for ids, given, said in [
        ([2], [image, image], "at most 1"),
        ([IMAGE, 2, IMAGE], image, "placeholders"),
        ([2], torch.ones(5, 7), "rows"),
        ([2], b"no picture", "image 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(ids, given)


def test_without_a_token_of_their_own_rows_stand_outside_the_vocabulary(architecture, tmp_path):
    entries = {**architecture.tiny, "image_token_index": None}
    folder = ModuleReference(architecture).save(tmp_path / "files")
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Blip2Config.model_validate(entries).image_token_index is None
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    llm = LLM(str(folder), skip_tokenizer_init=True, max_model_len=64, dtype="float32")
    prompt = {"prompt_token_ids": [2, 7], "multi_modal_data": {"image": picture(1, 9, 9)}}
    output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert list(output.prompt_token_ids) == [320] * 5 + [2, 7]
    assert len(output.outputs[0].token_ids) == 8


@pytest.mark.parametrize(
    ("entries", "said"),
    [({"text_config": {"model_type": "t5"}}, "'t5'.*OPT"), ({"vision_config": {"qkv_bias": False}}, "qkv_bias")],
)
def test_what_is_not_built_is_refused_by_name(architecture, tmp_path, entries, said):
    folder = ModuleReference(architecture).save(tmp_path / "files")
    config = json.loads((folder / "config.json").read_text())
    for key, changed in entries.items():
        config[key].update(changed)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        LLM(str(folder), skip_tokenizer_init=True)
