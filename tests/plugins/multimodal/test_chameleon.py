"""Chameleon's images and prompts: pixels and tokens against the published processor; codes; wrong media."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.chameleon import BEGIN, CODE, END, IMAGE, SEPARATOR, ChameleonConfig, ChameleonInputs
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["", "pixel_attention"])
def reference(request) -> ModuleReference:
    architecture = load_plugins().find(["ChameleonForConditionalGeneration"])
    return ModuleReference(architecture, 0, architecture.variants.get(request.param, {}))


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = reference.save(tmp_path_factory.mktemp("chameleon") / "files")
    for name, content in reference.architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder, reference.entries["vocabulary_map"])
    return folder


def write_tokenizer(folder, special: dict[str, int]) -> None:
    ids = iter(i for i in range(2, 320) if i not in special.values())
    letters = {"<s>": 0, "</s>": 1, **{letter: next(ids) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, **special}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *special)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "sep_token": SEPARATOR}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make(folder, **settings) -> LLM:
    return LLM(str(folder), max_model_len=256, dtype="float32", **settings)


@pytest.mark.parametrize("sizes", [[(40, 52)], [(91, 33), (16, 16)]])
def test_pixels_and_tokens_are_the_processors(folder, sizes):
    from transformers import ChameleonImageProcessorPil, ChameleonProcessor, PreTrainedTokenizerFast

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = ChameleonProcessor(ChameleonImageProcessorPil(**settings), tokenizer, image_seq_length=16)
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    text = "".join(f"{IMAGE}and " for _ in sizes)
    wanted = processor(images=pictures, text=text, return_tensors="pt")
    _, found = make(folder)._front._reader.read_media({"prompt": text, "multi_modal_data": {"image": pictures}})
    assert found.token_ids == wanted["input_ids"][0].tolist()
    pixels = torch.stack([placed.item.tensors["pixel_values"] for placed in found.media])
    assert (pixels - wanted["pixel_values"]).abs().max() <= 1e-5


def test_codes_and_rows_are_the_references(reference, folder):
    llm = make(folder)
    items = llm._front.media.read({"image": [picture(1, 40, 52), picture(2, 91, 33)]})["image"]
    pixels = torch.stack([item.tensors["pixel_values"] for item in items])
    with torch.inference_mode():
        found = llm._front.engine.model.embed_media("image", [item.tensors for item in items])
        wanted = reference.model.get_image_features(pixels).pooler_output
    assert (torch.stack(found) - wanted).abs().max() <= 1e-5
    assert len(torch.unique(torch.cat(found), dim=0)) > 4  # several codes are used, or nothing was compared


def test_codes_are_never_generated(reference, folder):
    llm = make(folder)
    codes = {token for name, token in reference.entries["vocabulary_map"].items() if name.startswith(CODE)}
    free = SamplingParams(temperature=50.0, max_tokens=100, ignore_eos=True, seed=1)
    (output,) = llm.generate({"prompt_token_ids": [5, 6]}, free, use_tqdm=False)
    assert not codes & set(output.outputs[0].token_ids)


def test_rows_of_a_caller_stand_for_the_image(folder):
    llm = make(folder)
    item = llm._front.media.read({"image": picture(1, 40, 52)})["image"][0]
    with torch.inference_mode():
        rows = llm._front.engine.model.embed_media("image", [item.tensors])[0].clone()
    outputs = [
        llm.generate({"prompt": f"a{IMAGE}b", "multi_modal_data": {"image": image}}, GREEDY, use_tqdm=False)[0]
        for image in (picture(1, 40, 52), rows)
    ]
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    assert list(outputs[0].outputs[0].token_ids) == list(outputs[1].outputs[0].token_ids)


def test_published_names_of_codes_and_a_prompt_that_is_no_question(tmp_path):
    entries = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
               "num_attention_heads": 4}  # fmt: skip
    vocabulary = {"IMGIMGAZ": 4, "IMGIMGBFDAZ": 9, IMAGE: 8711, BEGIN: 8197, END: 8196}
    config = ChameleonConfig(**entries, vocabulary_map=vocabulary)
    assert config.codes == {0: 4, 1530: 9}
    inputs = ChameleonInputs(config, config, ProcessorFiles(tmp_path), _Letters())
    assert inputs.encode("ab", True) == "ab" + SEPARATOR
    assert inputs.encode("ab", False) == "ab"
    free = ChameleonInputs(config, config, ProcessorFiles(tmp_path, {"return_for_text_completion": True}), _Letters())
    assert free.encode("ab", True) == "ab"
    item = inputs.image(picture(0, 640, 480))
    assert (len(item.token_ids), item.num_rows) == (1026, 1024)
    with pytest.raises(ValueError, match=r"vocabulary_map of config\.json has no '<image>'"):
        ChameleonConfig(**entries, vocabulary_map={}).token(IMAGE)


class _Letters:
    def encode(self, text: str, add_special_tokens: bool) -> str:
        return text
