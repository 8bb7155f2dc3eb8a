"""PaliGemma and Gemma 3 with images: preprocessing and prompts as their processors make them, a caller's own rows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.gemma3_vision import END, SOFT
from modelport.plugins.multimodal.gemma3_vision import PLACEHOLDER as START
from modelport.plugins.multimodal.paligemma import PLACEHOLDER as IMAGE
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
FIRST, SECOND = "PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration"
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, IMAGE: 319, SOFT: 319, START: 317, END: 318}


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tokenizer(folder, image: str) -> None:
    """Bytes, and line feeds that melt into one token, as in Gemma's vocabulary."""
    special = {token: i for token, i in SPECIAL.items() if i != 319 or token == image}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    feed = "Ċ"  # of bytes, the line feed
    pieces = [*alphabet, *(feed * n for n in (2, 3, 4))]
    vocabulary = {**special, **{piece: i for i, piece in enumerate(pieces, start=3)}}
    merges = [(feed, feed), (feed * 2, feed), (feed * 2, feed * 2)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    own |= {"boi_token": START, "eoi_token": END, "image_token": image}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=[FIRST, SECOND])
def folder(request, tmp_path_factory):
    architecture = load_plugins().find([request.param])
    folder = ModuleReference(architecture).save(tmp_path_factory.mktemp("gemmas") / request.param)
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder, IMAGE if request.param == FIRST else SOFT)
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(str(folder), max_model_len=256, dtype="float32")


@pytest.fixture(scope="module")
def processor(folder):
    import transformers

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if folder.name == FIRST:
        # the class has no such argument, and the processor reads it from there
        images = transformers.SiglipImageProcessorPil(**settings)
        images.image_seq_length = 25
        return transformers.PaliGemmaProcessor(images, tokenizer)
    return transformers.Gemma3Processor(transformers.Gemma3ImageProcessorPil(**settings), tokenizer, image_seq_length=9)


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (30, 30), (300, 200), (1, 1)])
def test_preprocessing_is_the_references(llm, processor, size):
    image = picture(1, *size)
    item = llm._front.media.read({"image": image})["image"][0]
    wanted = processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
    assert (item.tensors["pixel_values"] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("text", ["{0}what is it", "{0}{0}both\n", "{0} caption en\n\n", "a\n{0}\nb", "x{0}"])
def test_prompts_are_the_processors(llm, processor, folder, text):
    text = text.format(IMAGE if folder.name == FIRST else START)
    images = [picture(i, 40, 30) for i in range(text.count("<image>") + text.count(START))]
    output = llm.generate({"prompt": text, "multi_modal_data": {"image": images}}, GREEDY, use_tqdm=False)[0]
    wanted = processor(images=[images], text=[text])["input_ids"][0]
    assert list(output.prompt_token_ids) == list(wanted)


def test_images_whose_places_are_not_written(llm, processor, folder):
    images = [picture(1, 40, 30)]
    prompt = {"prompt": "what is it", "multi_modal_data": {"image": images}}
    if folder.name == SECOND:
        with pytest.raises(ValueError, match="0 placeholders '<start_of_image>' for 1 items"):
            llm.generate(prompt, GREEDY, use_tqdm=False)
        return
    output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert list(output.prompt_token_ids) == list(processor(images=[images], text=["what is it"])["input_ids"][0])


def test_embeddings_are_the_image(llm):
    image = picture(1, 40, 50)
    item = llm._front.media.read({"image": image})["image"][0]
    with torch.inference_mode():
        rows = llm._front.engine.model.embed_media("image", [item.tensors])[0].clone()
    prompts = [{"prompt_token_ids": [5, 319, 7], "multi_modal_data": {"image": one}} for one in (image, rows)]
    given = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert given[0] == given[1]


def test_a_token_changes_what_comes_before_it_only_where_tokens_see_each_other(llm, folder):
    """PaliGemma's prompts do when there is an image; Gemma 3's text never does."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)

    def told(last: int, media: dict) -> float:
        ids = [*([319] if media else []), 5, 6, 7, 8, last]
        output = llm.generate({"prompt_token_ids": ids, "multi_modal_data": media}, params, use_tqdm=False)[0]
        return next(iter(output.prompt_logprobs[-3].values())).logprob

    image = {"image": picture(1, 30, 30)}
    assert (told(9, image) != told(10, image)) == (folder.name == FIRST)
    assert told(9, {}) == told(10, {})


def test_wrong_media_fail_alone(llm):
    for data, said in (
        ({"image": b"no picture"}, "image 0"),
        ({"video": picture(0, 30, 30)}, "takes 'image'"),
        ({"image": torch.ones(25, 7)}, "rows"),
        ({"image": [picture(0, 30, 30)] * 1000}, "1000 items"),
    ):
        with pytest.raises(ValueError, match=said):
            llm.generate({"prompt_token_ids": [5, 319], "multi_modal_data": data}, GREEDY, use_tqdm=False)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


@pytest.mark.parametrize("folder", [SECOND], indirect=True)
@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}, r"do_pan_and_scan=True.*mm_processor_kwargs"),
        ("config.json", {"mm_tokens_per_image": 10}, "mm_tokens_per_image=10 are no square"),
        ("config.json", {"mm_tokens_per_image": 16}, "6 x 6 patches"),
    ],
)
def test_what_gemma3_cannot_do_is_refused(folder, tmp_path, file, entries, said):
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **entries}))
    with pytest.raises(ValueError, match=said):
        LLM(str(tmp_path), skip_tokenizer_init=True)
    if "do_pan_and_scan" in entries:
        LLM(str(tmp_path), skip_tokenizer_init=True, mm_processor_kwargs={"do_pan_and_scan": False})
