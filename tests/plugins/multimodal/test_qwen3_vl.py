"""Qwen3-VL: preprocessing, sizes of films, positions and rows of the tower against transformers; times in films."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.qwen3_vl import DeepBlock, film_size
from modelport.testing import check
from modelport.testing.reference import ModuleReference

NAME = "Qwen3VLForConditionalGeneration"
IMAGE, FILM, START, END = 318, 319, 316, 317
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def reference() -> ModuleReference:
    return ModuleReference(load_plugins().find([NAME]))


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    import tokenizers

    folder = reference.save(tmp_path_factory.mktemp("qwen3_vl") / "files")
    for name, content in reference.architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    places = {"<|image_pad|>": IMAGE, "<|video_pad|>": FILM, "<|vision_start|>": START, "<|vision_end|>": END}
    words = {chr(33 + i): i for i in range(94)} | {f"w{i}": i for i in range(94, 316)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, **places}, unk_token="!"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(list(places))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(str(folder), max_model_len=512, dtype="float32")


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (30, 30), (300, 200), (7, 5)])
def test_preprocessing_is_the_references(llm, size):
    from transformers import Qwen2VLImageProcessorPil

    settings = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 1600}}
    item = llm._front.media.read({"image": picture(1, *size)})["image"][0]
    wanted = Qwen2VLImageProcessorPil(**settings)([picture(1, *size)], return_tensors="pt")
    assert (item.tensors["pixel_values"] - wanted["pixel_values"]).abs().max() <= 1e-5
    assert item.tensors["image_grid_thw"].tolist() == wanted["image_grid_thw"][0].tolist()


def test_sizes_of_films_are_the_references():
    smart_resize = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize
    source = np.random.default_rng(0)
    for _ in range(300):
        frames, height, width = (int(source.integers(*span)) for span in ((2, 40), (5, 900), (5, 900)))
        fewest, most = 256 * int(source.integers(1, 40)), 40_000 * int(source.integers(1, 200))
        wanted = smart_resize(frames, height, width, 2, 32, fewest, most)
        assert film_size(frames, height, width, 32, fewest, most) == wanted
    with pytest.raises(ValueError, match="over 200 times"):
        film_size(4, 32, 32 * 300, 32, 256, 1 << 20)


def test_frames_and_their_times(llm):
    processor = llm._front.media.processor
    assert list(processor.pick_frames(100, 25.0)) == np.linspace(0, 99, 8).round().astype(int).tolist()
    assert list(processor.pick_frames(3, None)) == [0, 1, 2]
    assert len(processor.pick_frames(100_000, 25.0)) == 768
    film = np.stack([np.asarray(picture(i, 16, 16)) for i in range(5)])
    prompt = {"prompt": "a<|vision_start|><|video_pad|><|vision_end|>b", "multi_modal_data": {"video": film}}
    output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    item = llm._front.media.read({"video": film})["video"][0]
    rows = item.num_rows // 2

    def frame(time: str) -> list[int]:
        return [*(ord(c) - 33 if c != " " else 0 for c in f"<{time} seconds>"), START, *[FILM] * rows, END]

    # four of the five frames, 0, 1, 3 and 4, at 24 a second where nobody says
    wanted = [ord("a") - 33, *frame("0.0"), *frame("0.1"), ord("b") - 33]
    assert list(output.prompt_token_ids) == wanted


@torch.inference_mode()
def test_positions_and_rows_are_the_references(reference, llm):
    pictures = [picture(1, 40, 52), picture(2, 91, 33)]
    film = np.stack([np.asarray(picture(i, 40, 30)) for i in range(3)])
    front = llm._front
    items = front.media.read({"image": pictures, "video": film})
    ids = [5, START, IMAGE, END, 6, FILM, 7, IMAGE, IMAGE]
    items["image"].append(items["image"][0])  # two that touch
    expanded = front.media.processor.expand(ids, items)
    found = torch.tensor([expanded.token_ids])
    kinds = (found == IMAGE) + 2 * (found == FILM)
    grids = torch.stack([item.tensors["image_grid_thw"] for item in items["image"]])
    # transformers takes a run of places for one picture, so the two that touch are told apart
    touching = expanded.media[-1].start
    kinds[0, touching:] = 3
    model = reference.model.model
    films = items["video"][0].tensors["video_grid_thw"][None]
    kinds = kinds[:, :touching]
    wanted, _ = model.get_rope_index(found[:, :touching], kinds, grids[:2], films)
    assert np.array_equal(expanded.axes[:, :touching], wanted[:, 0].numpy())
    last = expanded.axes[:, touching:]
    assert last.min() == wanted[:, 0].max() + 1
    for modality, features in (("image", model.get_image_features), ("video", model.get_video_features)):
        several = items[modality]
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        grid = torch.stack([item.tensors[f"{modality}_grid_thw"] for item in several])
        out = features(torch.cat([item.tensors[name] for item in several]), grid, return_dict=True)
        parts = [torch.cat(list(part)) for part in (out.pooler_output, *out.deepstack_features)]
        rows = torch.cat(front.engine.model.embed_media(modality, [item.tensors for item in several]))
        assert (rows - torch.cat(parts, dim=1)).abs().max() <= 1e-4


def test_what_the_inner_layers_say_is_added(monkeypatch):
    def without(self, state, batch):
        return super(DeepBlock, self).forward(state[0] if isinstance(state, tuple) else state, batch)

    monkeypatch.setattr(DeepBlock, "forward", without)
    report = check(NAME, only="media")
    assert report["media"].status == report["tied:media"].status == "failed"
    assert "whose logit is larger" in report["media"].detail + report["tied:media"].detail
