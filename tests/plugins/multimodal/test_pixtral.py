"""Pixtral's pictures, in transformers' way and in its authors'; what it computes is the kit's to check."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modelport import LLM
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import Checkpoint, load_plugins
from modelport.plugins.multimodal.llava import LlavaConfig, LlavaInputs
from modelport.plugins.multimodal.pixtral import PixtralConfig, PixtralInputs, read_config

GOLDENS = Path(__file__).parents[2] / "goldens"
FOLDERS = [GOLDENS / "pixtral-native", GOLDENS / "pixtral-native-merge"]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (48, 48), (7, 60), (1, 1), (100, 99)])
def test_pictures_and_lines_are_transformers(tmp_path, size):
    from transformers import PixtralImageProcessorPil

    settings = {"size": {"longest_edge": 48}, "patch_size": {"height": 6, "width": 6}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    architecture = load_plugins().find(["LlavaForConditionalGeneration"])
    config = LlavaConfig.model_validate({**architecture.tiny, **architecture.variants["pixtral"]})
    item = LlavaInputs(config, None, ProcessorFiles(tmp_path), None).image(picture(*size))
    wanted = PixtralImageProcessorPil(**settings)(picture(*size), return_tensors="pt")
    assert item.tensors["image_sizes"].tolist() == wanted["image_sizes"][0].tolist()
    assert (item.tensors["pixel_values"] - wanted["pixel_values"][0]).abs().max() <= 1e-5
    rows, columns = (edge // 6 for edge in wanted["image_sizes"][0].tolist())
    line = [319] * columns  # the published processor cannot be imported without torchvision
    assert list(item.token_ids) == [*[*line, 12] * (rows - 1), *line, 13]
    assert [token == 319 for token in item.token_ids] == list(item.is_row)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pictures_are_the_authors(folder):
    golden, stored = json.loads((folder / "golden.json").read_text()), load_file(folder / "golden.safetensors")
    config = PixtralConfig.model_validate(read_config(Checkpoint(folder, folder.name)))
    inputs = PixtralInputs(config, None, ProcessorFiles(folder), None)
    for case in golden["cases"][1:]:
        for file, name in zip(case["files"], case["mm_inputs"]["pixel_values"], strict=True):
            found = inputs.image(Image.open(folder / file).convert("RGB")).tensors["pixel_values"]
            assert found.shape == stored[name].shape
            assert (found - stored[name]).abs().max() <= 2e-5  # OpenCV's weights are float32 too, summed otherwise


def test_a_dropped_patch_is_refused():
    architecture = load_plugins().find(["LlavaForConditionalGeneration"])
    entries = {**architecture.tiny, **architecture.variants["pixtral"], "vision_feature_select_strategy": "default"}
    with pytest.raises(ValueError, match="'full'"):
        LlavaConfig.model_validate(entries)


def test_rows_without_lines_and_wrong_media_are_refused():
    llm = LLM(str(FOLDERS[0]), skip_tokenizer_init=True, max_model_len=128, dtype="float32")
    for given, said in [
        (torch.ones(4, 64), "no embeddings"),
        (picture(5000, 1), "narrow"),
        (b"no picture", "image 0"),
        ([picture(9, 9)] * 2, "placeholders"),
    ]:
        with pytest.raises(ValueError, match=said):
            llm.generate({"prompt_token_ids": [1, 10, 3], "multi_modal_data": {"image": given}}, use_tqdm=False)


def test_a_damaged_params_file_is_named(tmp_path):
    (tmp_path / "params.json").write_text('{"vision_encoder": {}, "dim": 8}')
    with pytest.raises(ValueError, match=r"params\.json"):
        read_config(Checkpoint(tmp_path, "x"))
    (tmp_path / "params.json").write_text('{"dim": 8}')
    assert read_config(Checkpoint(tmp_path, "x")) is None
