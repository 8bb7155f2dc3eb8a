"""Fuyu's images and prompts: patches and tokens against the published processor; wrong images; embeddings."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.fuyu import FuyuConfig, FuyuInputs, language_entries
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SETTINGS = {"size": {"height": 24, "width": 48}, "patch_size": {"height": 6, "width": 6}}


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tokenizer(folder) -> None:
    """As the published one it puts a mark before every text."""
    special = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    architecture = load_plugins().find(["FuyuForCausalLM"])
    folder = ModuleReference(architecture, 0, {"image_token_id": 3}).save(tmp_path_factory.mktemp("fuyu") / "files")
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    write_tokenizer(folder)
    return folder


def make(folder, **settings) -> LLM:
    return LLM(str(folder), max_model_len=256, dtype="float32", **settings)


def theirs(folder):
    """The published processor; the image processor without torchvision cuts patches across each other."""
    from transformers import FuyuImageProcessorPil, FuyuProcessor, PreTrainedTokenizerFast

    class Mended(FuyuImageProcessorPil):
        def patchify_image(self, image, patch_size=None):
            high, wide = self.patch_size.height, self.patch_size.width
            image = torch.as_tensor(np.asarray(image)).reshape(3, *np.shape(image)[-2:])
            cut = image.unfold(1, high, high).unfold(2, wide, wide)
            return cut.reshape(3, -1, high, wide).permute(1, 2, 3, 0).flatten(1)

    class Marked(PreTrainedTokenizerFast):
        """The published tokenizer marks the placeholders' beginning too, and the processor takes that off again."""

        def __call__(self, text, **options):
            made = super().__call__(text, **options)
            if text.startswith("|SPEAKER|"):
                mark = self.convert_tokens_to_ids("▁")
                made["input_ids"] = torch.nn.functional.pad(made["input_ids"], (1, 0), value=mark)
                made["attention_mask"] = torch.nn.functional.pad(made["attention_mask"], (1, 0), value=1)
            return made

    tokenizer = Marked(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    processor = FuyuProcessor(image_processor=Mended(**SETTINGS), tokenizer=tokenizer)
    processor.tokenizer.pad_token = "<unk>"
    return processor


@pytest.mark.parametrize("size", [(30, 20), (48, 24), (7, 5), (90, 31), (33, 91), (200, 10)])
def test_patches_and_tokens_are_the_processors(folder, size):
    wanted = theirs(folder)(text="What is it?\n", images=[picture(*size)])
    front = make(folder)._front
    _, found = front._reader.read_media({"prompt": "What is it?\n", "multi_modal_data": {"image": picture(*size)}})
    assert found.token_ids == wanted["input_ids"][0].tolist()
    pixels = found.media[0].item.tensors["pixel_values"]
    wanted_pixels = wanted["image_patches"].reshape(pixels.shape)
    assert (pixels - wanted_pixels).abs().max() <= 1e-5


def test_a_written_placeholder_changes_nothing(folder):
    llm = make(folder)
    data = {"image": picture(30, 20)}
    bare, written = (
        llm.generate({"prompt": prompt, "multi_modal_data": data}, GREEDY, use_tqdm=False)[0]
        for prompt in ("What?\n", "|SPEAKER|What?\n")
    )
    assert bare.prompt_token_ids == written.prompt_token_ids
    assert list(bare.outputs[0].token_ids) == list(written.outputs[0].token_ids)


def test_rows_of_a_caller_stand_for_the_image(folder):
    llm = make(folder)
    image = {"image": picture(30, 20)}
    item = llm._front.media.read(image)["image"][0]
    with torch.inference_mode():
        rows = llm._front.engine.model.embed_media("image", [item.tensors])[0].clone()
    given = {"image": {"image_embeds": rows, "image_columns": 5}}
    first, second = (
        llm.generate({"prompt": "a", "multi_modal_data": data}, GREEDY, use_tqdm=False)[0] for data in (image, given)
    )
    assert first.prompt_token_ids == second.prompt_token_ids
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)
    with pytest.raises(ValueError, match="image_columns=7 does not divide"):
        llm.generate({"prompt": "a", "multi_modal_data": {"image": {"image_embeds": rows, "image_columns": 7}}}, GREEDY)


def test_one_image_only(folder):
    with pytest.raises(ValueError, match="2 items of 'image'; at most 1"):
        make(folder).generate({"prompt": "a", "multi_modal_data": {"image": [picture(30, 20)] * 2}}, GREEDY)


def test_names_of_transformers_5_load(folder, tmp_path):
    """The kit's checkpoint has the published names."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "new")
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
        name = name.removeprefix("model.")
        renamed[name if name.startswith("lm_head.") else f"model.{name}"] = tensor
    assert {name.split(".")[1] for name in renamed} == {"language_model", "vision_embed_tokens", "weight"}
    save_file(renamed, copy / "model.safetensors")
    prompt = {"prompt": "a", "multi_modal_data": {"image": picture(30, 20)}}
    one, other = (make(f).generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for f in (folder, copy))
    assert list(one) == list(other)


def test_first_published_files_have_the_language_models_entries_outside():
    flat = {"architectures": ["FuyuForCausalLM"], "model_type": "fuyu", "hidden_size": 64, "vocab_size": 320}
    found = language_entries(flat)
    assert found == {"architectures": ["PersimmonForCausalLM"], "model_type": "persimmon", "hidden_size": 64,
                     "vocab_size": 320}  # fmt: skip
    assert language_entries({**flat, "text_config": {"hidden_size": 8}})["hidden_size"] == 8


def test_an_image_that_fits_is_not_enlarged(tmp_path):
    inputs = FuyuInputs(FuyuConfig(), _Text(), ProcessorFiles(tmp_path), None)
    item = inputs.image(picture(31, 30))
    assert item.num_rows == 2
    assert list(item.token_ids) == [71011, 71011, 71019, 1]
    assert len(inputs.image(picture(3840, 1080)).row_places) == 64 * 18


class _Text:
    bos_token_id = 1
